"""Data laws with exact scores, on the line and in any dimension, and their short notation (`gmm:.3,.7;-1,1;.4`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr, ndtri

from cmtool.errors import UserError

Array = NDArray[np.float64]


def checked_weights(weights: Array) -> tuple[Array, str | None]:
    """Weights that sum to one and, when they had to be scaled, a sentence that says so.

    Raises:
        UserError: for a weight that is negative or not finite, or weights that are all zero.
    """
    weights = np.asarray(weights, float)
    if weights.size == 0 or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise UserError(f"mixture weights must be non-negative with a positive sum, not {weights.tolist()}")
    total = float(weights.sum())
    notice = None if abs(total - 1) < 1e-9 else f"the mixture weights sum to {total:g}; they were divided by it"
    return weights / total, notice


@dataclass(frozen=True)
class LineMixture:
    """sum_j w_j N(mu_j, s_j^2); arrays (J,), s_j >= 0 (zero is a Dirac). Weights are scaled to sum to one.

    Methods take the signal a and the noise b of a level and speak of X = a X_0 + b Z; `x` has any shape.
    """

    weights: Array
    means: Array
    stds: Array
    notice: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        weights, notice = checked_weights(self.weights)
        means, stds = np.asarray(self.means, float), np.asarray(self.stds, float)
        if not weights.shape == means.shape == stds.shape:
            raise UserError(f"{weights.size} weights, {means.size} means and {stds.size} widths do not make a mixture")
        if (stds < 0).any() or not np.isfinite(stds).all() or not np.isfinite(means).all():
            raise UserError("the widths of a mixture must be finite and not negative, its means finite")
        for name, value in (("weights", weights), ("means", means), ("stds", stds), ("notice", notice)):
            object.__setattr__(self, name, value)

    @property
    def mean(self) -> float:
        """E X_0."""
        return float(self.weights @ self.means)

    @property
    def variance(self) -> float:
        """Var X_0."""
        return float(self.weights @ (self.stds**2 + self.means**2) - self.mean**2)

    def components(self, a: float, b: float) -> tuple[Array, Array]:
        """Means and variances (J,) of the components of X."""
        return a * self.means, a**2 * self.stds**2 + b**2

    def _log_terms(self, x: Array, a: float, b: float) -> Array:
        means, variances = self.components(a, b)
        gap = np.asarray(x)[..., None] - means
        return -0.5 * gap**2 / variances - 0.5 * np.log(2 * np.pi * variances) + np.log(self.weights)

    def log_density(self, x: Array, a: float, b: float) -> Array:
        """Log density of X at x; needs b > 0 or no Diracs."""
        return logsumexp(self._log_terms(x, a, b), axis=-1)

    def responsibilities(self, x: Array, a: float, b: float) -> Array:
        """P(component j | X = x), shape x.shape + (J,)."""
        terms = self._log_terms(x, a, b)
        terms -= terms.max(axis=-1, keepdims=True)
        weights = np.exp(terms)
        return weights / weights.sum(axis=-1, keepdims=True)

    def score(self, x: Array, a: float, b: float) -> Array:
        """d/dx log density of X."""
        means, variances = self.components(a, b)
        pull = (means - np.asarray(x)[..., None]) / variances
        return np.sum(self.responsibilities(x, a, b) * pull, axis=-1)

    def denoise(self, x: Array, a: float, b: float) -> Array:
        """E[X_0 | X = x]."""
        means, variances = self.components(a, b)
        each = self.means + a * self.stds**2 / variances * (np.asarray(x)[..., None] - means)
        return np.sum(self.responsibilities(x, a, b) * each, axis=-1)

    def cdf(self, x: Array, a: float, b: float) -> Array:
        """P(X <= x), accurate in the lower tail."""
        means, variances = self.components(a, b)
        return ndtr((np.asarray(x)[..., None] - means) / np.sqrt(variances)) @ self.weights

    def survival(self, x: Array, a: float, b: float) -> Array:
        """P(X > x), accurate in the upper tail."""
        means, variances = self.components(a, b)
        return ndtr(-(np.asarray(x)[..., None] - means) / np.sqrt(variances)) @ self.weights

    def normal_score(self, x: Array, a: float, b: float) -> Array:
        """ndtri(P(X <= x)), from whichever tail is the smaller: the position of x on the scale of N(0, 1)."""
        low, high = self.cdf(x, a, b), self.survival(x, a, b)
        tiny = 1e-300
        return np.where(low < 0.5, ndtri(np.maximum(low, tiny)), -ndtri(np.maximum(high, tiny)))

    def quantile(self, z: Array, a: float, b: float) -> Array:
        """The x with P(X <= x) = ndtr(z): Newton steps on the log tail, kept inside a shrinking bracket."""
        z = np.asarray(z, float)
        means, variances = self.components(a, b)
        ends = means + np.sqrt(variances) * z[..., None]
        low, high = ends.min(axis=-1) - 1e-9, ends.max(axis=-1) + 1e-9
        target = ndtr(-np.abs(z))
        lower = z <= 0
        x = 0.5 * (low + high)
        for _ in range(100):
            tail = np.where(lower, self.cdf(x, a, b), self.survival(x, a, b))
            below = np.where(lower, tail < target, tail > target)
            low, high = np.where(below, x, low), np.where(below, high, x)
            slope = np.exp(np.clip(self.log_density(x, a, b), -700, 700)) / np.maximum(tail, 1e-300)
            move = np.log(np.maximum(tail, 1e-300) / target) / np.maximum(slope, 1e-300)
            step = np.where(lower, x - move, x + move)
            slack = 1e-13 * (1 + np.abs(x))  # rounding must not send a finished point back to bisection
            inside = (step > low - slack) & (step < high + slack)
            fresh = np.where(inside, step, 0.5 * (low + high))
            done = np.max(np.abs(fresh - x)) < 1e-13 * (1 + np.max(np.abs(fresh)))
            x = fresh
            if done:
                break
        return x

    def flow(self, x: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
        """The probability-flow map between two levels (a, b): on the line it keeps the order, so it matches ranks."""
        return self.quantile(self.normal_score(x, *start), *end)

    def sample(self, count: int, rng: np.random.Generator) -> Array:
        """`count` draws of X_0, (count,)."""
        which = rng.choice(len(self.weights), size=count, p=self.weights)
        return self.means[which] + self.stds[which] * rng.standard_normal(count)


# --- any dimension ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """N(mean, cov) on R^d: mean (d,), cov (d, d) symmetric and positive semidefinite, stored in its eigenbasis."""

    mean: Array
    cov: Array

    def __post_init__(self) -> None:
        mean, cov = np.atleast_1d(np.asarray(self.mean, float)), np.atleast_2d(np.asarray(self.cov, float))
        if cov.shape != (mean.size, mean.size):
            raise UserError(
                f"a mean of {mean.size} numbers needs a {mean.size} x {mean.size} covariance, not {cov.shape}"
            )
        if not np.allclose(cov, cov.T, atol=1e-12):
            raise UserError("the covariance is not symmetric", "give a symmetric positive semidefinite matrix")
        values, basis = np.linalg.eigh(cov)
        if values[0] < -1e-10 * max(1.0, values[-1]):
            raise UserError(
                f"the covariance is not positive semidefinite: its smallest eigenvalue is {values[0]:.3g}",
                "every eigenvalue of a covariance is a variance and cannot be negative",
            )
        for name, value in (("mean", mean), ("cov", cov), ("variances", np.maximum(values, 0.0)), ("basis", basis)):
            object.__setattr__(self, name, value)

    @property
    def eigen(self) -> tuple[Array, Array]:
        """Eigenvalues (d,) and eigenvectors (d, d, in columns) of the covariance."""
        return self.__dict__["variances"], self.__dict__["basis"]

    def _scaled(self, x: Array, factor: Array, a: float) -> Array:
        basis = self.eigen[1]
        return ((np.asarray(x) - a * self.mean) @ basis * factor) @ basis.T

    def score(self, x: Array, a: float, b: float) -> Array:
        """Gradient of the log density of a X_0 + b Z at x (n, d)."""
        return -self._scaled(x, 1 / (a * a * self.eigen[0] + b * b), a)

    def denoise(self, x: Array, a: float, b: float) -> Array:
        """E[X_0 | a X_0 + b Z = x] for x (n, d)."""
        values = self.eigen[0]
        return self.mean + self._scaled(x, a * values / (a * a * values + b * b), a)

    def flow(self, x: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
        """Phi between two levels (a, b): m_k + sqrt(V_k / V_t) (x - m_t), exact; x (n, d)."""
        values = self.eigen[0]
        ratio = (end[0] ** 2 * values + end[1] ** 2) / (start[0] ** 2 * values + start[1] ** 2)
        return end[0] * self.mean + self._scaled(x, np.sqrt(ratio), start[0])

    def sample(self, count: int, rng: np.random.Generator) -> Array:
        """`count` draws of X_0, (count, d)."""
        values, basis = self.eigen
        return self.mean + (rng.standard_normal((count, len(values))) * np.sqrt(values)) @ basis.T


@dataclass(frozen=True)
class Mixture:
    """sum_j w_j N(mu_j, s_j^2 I) on R^d: weights (J,), means (J, d), stds (J,); s_j = 0 makes it a sum of Diracs."""

    weights: Array
    means: Array
    stds: Array

    def __post_init__(self) -> None:
        weights, _ = checked_weights(self.weights)
        means, stds = np.asarray(self.means, float), np.asarray(self.stds, float)
        if means.ndim != 2 or means.shape[0] != weights.size or stds.shape != weights.shape:
            raise UserError(
                f"{weights.size} weights, means {means.shape} and widths {stds.shape} do not make a mixture"
            )
        if (stds < 0).any() or not np.isfinite(means).all():
            raise UserError("the widths of a mixture must not be negative and its means must be finite")
        for name, value in (("weights", weights), ("means", means), ("stds", stds)):
            object.__setattr__(self, name, value)

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    def log_terms(self, x: Array, a: float, b: float) -> Array:
        """Log of each component's share of the density of a X_0 + b Z at x (n, d): (n, J)."""
        means, variances = a * self.means, a**2 * self.stds**2 + b**2
        # ||x - m||^2 by products: n x J stays small where n x J x d would not (digits: 64 dimensions, 1797 modes).
        square = (x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)
        size = -0.5 * np.maximum(square, 0) / variances
        return size - 0.5 * self.dim * np.log(2 * np.pi * variances) + np.log(self.weights)

    def log_density(self, x: Array, a: float, b: float) -> Array:
        """Log density of a X_0 + b Z at x (n, d): (n,)."""
        return logsumexp(self.log_terms(x, a, b), axis=1)

    def responsibilities(self, x: Array, a: float, b: float) -> Array:
        """P(component j | x), (n, J)."""
        terms = self.log_terms(x, a, b)
        share = np.exp(terms - terms.max(axis=1, keepdims=True))
        return share / share.sum(axis=1, keepdims=True)

    def denoise(self, x: Array, a: float, b: float) -> Array:
        """E[X_0 | x], (n, d)."""
        share = self.responsibilities(x, a, b)
        pull = a * self.stds**2 / (a**2 * self.stds**2 + b**2)
        return share @ (self.means * (1 - a * pull)[:, None]) + (share @ pull)[:, None] * x

    def score(self, x: Array, a: float, b: float) -> Array:
        """Gradient of the log density, (n, d), by Tweedie's formula: (a E[X_0|x] - x) / b^2."""
        return (a * self.denoise(x, a, b) - x) / b**2

    def posterior_sample(self, x: Array, a: float, b: float, rng: np.random.Generator) -> Array:
        """One draw of X_0 given a X_0 + b Z = x, for each row of x (n, d)."""
        share = self.responsibilities(x, a, b).cumsum(axis=1)
        which = (share < rng.random((len(x), 1))).sum(axis=1).clip(0, len(self.weights) - 1)
        variance = a**2 * self.stds**2 + b**2
        center = self.means[which] + (a * self.stds**2 / variance)[which, None] * (x - a * self.means[which])
        spread = (self.stds * b / np.sqrt(variance))[which, None]
        return center + spread * rng.standard_normal(x.shape)

    def sample(self, count: int, rng: np.random.Generator) -> Array:
        """`count` draws of X_0, (count, d)."""
        which = rng.choice(len(self.weights), size=count, p=self.weights)
        return self.means[which] + self.stds[which, None] * rng.standard_normal((count, self.dim))


def empirical(points: Array) -> Mixture:
    """The law that draws one of `points` (n, d) at random."""
    points = np.asarray(points, float)
    if points.ndim != 2 or len(points) == 0:
        raise UserError(f"data points must be a table of n rows and d columns, not of shape {points.shape}")
    if not np.isfinite(points).all():
        raise UserError("the data hold numbers that are not finite", "drop the rows with NaN or infinity")
    return Mixture(np.full(len(points), 1 / len(points)), points, np.zeros(len(points)))


def product(line: LineMixture, dim: int) -> Mixture:
    """The law of `dim` independent copies of a line mixture with one common width: J^dim isotropic components.

    Raises:
        UserError: when the widths differ (the components would not be isotropic) or there are over 4096 components.
    """
    if np.ptp(line.stds) > 0:
        raise UserError("a product of mixtures needs one common width")
    count = len(line.weights) ** dim
    if count > 4096:
        raise UserError(f"{dim} copies of {len(line.weights)} modes are {count} components, more than 4096")
    grids = np.meshgrid(*[np.arange(len(line.weights))] * dim, indexing="ij")
    index = np.stack([grid.ravel() for grid in grids], axis=1)
    return Mixture(line.weights[index].prod(axis=1), line.means[index], np.full(len(index), line.stds[0]))


def _numbers(text: str, spec: str) -> Array:
    try:
        return np.array([float(part) for part in text.split(",")])
    except ValueError:
        raise UserError(f"cannot read '{text}' in '{spec}' as numbers", "write them as 0.3,0.7") from None


def parse_law(spec: str) -> LineMixture:
    """`gauss:MU;S`, `gmm:W,..;MU,..;S,..` or `diracs:W,..;MU,..` as a law on the line (one S serves all modes).

    Raises:
        UserError: for another notation, with the three that are known.
    """
    kind, _, rest = spec.partition(":")
    parts = [_numbers(part, spec) for part in rest.split(";")] if rest else []
    if kind == "gauss" and len(parts) == 2:
        return LineMixture(np.ones(1), parts[0], parts[1])
    if kind == "gmm" and len(parts) == 3:
        return LineMixture(
            parts[0], parts[1], np.broadcast_to(parts[2], parts[1].shape).copy() if parts[2].size == 1 else parts[2]
        )
    if kind == "diracs" and len(parts) == 2:
        return LineMixture(parts[0], parts[1], np.zeros_like(parts[1]))
    raise UserError(
        f"cannot read the data law '{spec}'",
        "write 'gauss:MU;S', 'gmm:W,W;MU,MU;S' or 'diracs:W,W;MU,MU' (quoted: ';' means something to the shell)",
    )


GMM_A = LineMixture(np.array([0.3, 0.7]), np.array([-1.0, 1.0]), np.array([0.4, 0.4]))
GMM_E = LineMixture(np.array([0.3, 0.7]), np.array([-0.5, 0.5]), np.array([0.2, 0.2]))
