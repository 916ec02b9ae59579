"""The Frechet distance between two Gaussians, in a form that cannot turn complex.

For N(m1, C1) and N(m2, C2):  |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)   (Dowson & Landau 1982; Heusel et al.
2017). With any factors C = L L', tr (C1 C2)^(1/2) is the sum of the singular values of L1' L2. Singular values have an
absolute error of rounding size, so singular covariances, fewer images than features and identical sets need no offset.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array, Statistics, statistics

LARGE = 256  # dimensions from which the faster route to singular values is tried


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Frechet distance of two fitted Gaussians, float64; rounding may leave it just below zero."""
    _same_width(first.dim, second.dim)
    return _distance(first, second, covariance_factor(first.covariance), covariance_factor(second.covariance))


def frechet_from_features(first: Array, second: Array) -> float:
    """Frechet distance of features (n1, D) and (n2, D)."""
    _same_width(first.shape[1], second.shape[1])
    fit = statistics(second)
    return frechet_to_fit(first, fit, feature_factor(second, fit))


def frechet_to_fit(features: Array, fit: Statistics, factor: Array | None = None) -> float:
    """Frechet distance of features (n, D) to a fitted Gaussian.

    `factor` is a factor of `fit.covariance` where the caller has one already.
    """
    _same_width(features.shape[1], fit.dim)
    own = statistics(features)
    other = covariance_factor(fit.covariance) if factor is None else factor
    return _distance(own, fit, feature_factor(features, own), other)


def covariance_factor(covariance: Array) -> Array:
    """Return L (D, r) with L L' = `covariance` (D, D): Cholesky where that is safe, else eigenvectors."""
    symmetric = (covariance + covariance.T) / 2
    try:
        factor = np.linalg.cholesky(symmetric)
        pivots = np.diag(factor) ** 2
        if pivots.min() > 1e-9 * pivots.max():
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(symmetric)
    # Eigenvalues below rounding of the largest are noise; their square roots would add up over thousands of dimensions.
    keep = values > len(values) * np.finfo(np.float64).eps * max(values.max(initial=0.0), 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


def feature_factor(features: Array, fit: Statistics) -> Array:
    """A factor of the covariance of `features`: the rows themselves where they are no more than the dimensions."""
    if fit.count > fit.dim:
        return covariance_factor(fit.covariance)
    return (features.astype(np.float64) - fit.mean).T / np.sqrt(fit.count - 1)


def _distance(first: Statistics, second: Statistics, factor1: Array, factor2: Array) -> float:
    shift = first.mean - second.mean
    overlap = _singular_values(factor1.T @ factor2).sum() if factor1.size and factor2.size else 0.0
    return float(shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap)


def _singular_values(matrix: Array) -> Array:
    """Singular values; for large well-conditioned matrices from the eigenvalues of M'M, in under half the time."""
    if min(matrix.shape) >= LARGE:
        squares = np.linalg.eigvalsh(matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T)
        # An eigenvalue is exact to rounding of the largest, which moves its root by that over twice the root.
        if squares[0] > 0:
            roots = np.sqrt(squares)
            error = 10 * np.finfo(np.float64).eps * squares[-1] * (0.5 / roots).sum()
            if error < 1e-10 * roots.sum():
                return roots
    try:
        return scipy.linalg.svd(matrix, compute_uv=False, check_finite=False)
    except np.linalg.LinAlgError:
        # Divide and conquer can fail to converge on rare matrices; the slower QR iteration does not.
        return scipy.linalg.svd(matrix, compute_uv=False, lapack_driver="gesvd")


def _same_width(first: int, second: int) -> None:
    if first != second:
        raise DataError(
            f"the two sides have {first} and {second} features: they come from different feature networks.",
            "Give both sides the same --features.",
        )
