"""The Frechet distance between two Gaussians, in a form that cannot become complex.

For N(m1, C1) and N(m2, C2):  |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)   (Dowson & Landau 1982; Heusel et al.
2017). With any factors C = L L', tr (C1 C2)^(1/2) is the sum of the singular values of L1' L2. The absolute error of a
singular value is of the size of rounding, so singular covariances, fewer images than features, and identical sets need
no offset. A result below that error is not a distance: it is returned as zero.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array, Statistics, statistics

LARGE = 256  # dimensions from which the faster route to singular values is tried
EPS = float(np.finfo(np.float64).eps)
# Two routes to the same covariance differ by up to seven EPS of the traces (measured up to 2,048 features).
ROUNDING = 16 * EPS


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Return the Frechet distance of two Gaussians, float64: 0 if they differ only by rounding, never negative."""
    _same_width(first.dim, second.dim)
    return _distance(first, second, covariance_factor(first.covariance), covariance_factor(second.covariance))


def frechet_from_features(first: Array, second: Array) -> float:
    """Return the Frechet distance of features (n1, D) and (n2, D)."""
    _same_width(first.shape[1], second.shape[1])
    fit = statistics(second)
    return frechet_to_fit(first, fit, feature_factor(second, fit))


def frechet_to_fit(features: Array, fit: Statistics, factor: Array | None = None) -> float:
    """Return the Frechet distance of features (n, D) to a fitted Gaussian.

    `factor` is a factor of `fit.covariance`, if the caller already has one.
    """
    _same_width(features.shape[1], fit.dim)
    own = statistics(features)
    other = covariance_factor(fit.covariance) if factor is None else factor
    return _distance(own, fit, feature_factor(features, own), other)


def covariance_factor(covariance: Array) -> Array:
    """Return L (D, r) with L L' = `covariance` (D, D), by Cholesky if that is safe, else from eigenvectors."""
    symmetric = (covariance + covariance.T) / 2
    try:
        factor = np.linalg.cholesky(symmetric)
        pivots = np.diag(factor) ** 2
        if pivots.min() > 1e-9 * pivots.max():
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(symmetric)
    # Eigenvalues below the rounding of the largest are noise; over thousands of dimensions their roots would add up.
    keep = values > len(values) * EPS * max(values.max(initial=0.0), 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


def feature_factor(features: Array, fit: Statistics) -> Array:
    """Return a factor of the covariance of `features`: the rows themselves if they are no more than the dimensions."""
    if fit.count > fit.dim:
        return covariance_factor(fit.covariance)
    return (features.astype(np.float64) - fit.mean).T / np.sqrt(fit.count - 1)


def _distance(first: Statistics, second: Statistics, factor1: Array, factor2: Array) -> float:
    return _between_means(first, second) + _between_covariances(first, second, factor1, factor2)


def _between_means(first: Statistics, second: Statistics) -> float:
    """Return the squared distance of the means. Nothing cancels here: only the means' own rounding counts as zero."""
    shift = first.mean - second.mean
    size = first.mean @ first.mean + second.mean @ second.mean + np.trace(first.covariance + second.covariance)
    squared = float(shift @ shift)
    return squared if squared > (4 * EPS) ** 2 * size else 0.0


def _between_covariances(first: Statistics, second: Statistics, factor1: Array, factor2: Array) -> float:
    """Return tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), the traces taken from the factors: equal factors then cancel."""
    held = [float(np.square(factor).sum()) for factor in (factor1, factor2)]
    traces = [float(np.trace(fit.covariance)) for fit in (first, second)]
    left_out = sum(abs(trace - kept) for trace, kept in zip(traces, held, strict=True))
    nothing = ROUNDING * sum(traces) + left_out
    product = factor1.T @ factor2
    overlap, error = _overlap(product)
    value = sum(held) - 2 * overlap
    if error and abs(value) <= 2 * error + nothing:
        value = sum(held) - 2 * float(_svd(product).sum())
    return value if value > nothing else 0.0


def _overlap(matrix: Array) -> tuple[float, float]:
    """Return the sum of the singular values, and a bound on its error (0: only rounding).

    For large well-conditioned matrices it comes from the eigenvalues of M'M, in under half the time.
    """
    if not matrix.size:
        return 0.0, 0.0
    if min(matrix.shape) >= LARGE:
        squares = np.linalg.eigvalsh(matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T)
        # Each eigenvalue is off by the rounding of the largest; its root is off by that, divided by twice the root.
        if squares[0] > 0:
            roots = np.sqrt(squares)
            error = 10 * EPS * squares[-1] * (0.5 / roots).sum()
            if error < 1e-10 * roots.sum():
                return float(roots.sum()), float(error)
    return float(_svd(matrix).sum()), 0.0


def _svd(matrix: Array) -> Array:
    """Return the singular values of a matrix."""
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
