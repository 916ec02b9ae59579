"""Mixtures of normals on the line, where quantiles make every answer exact."""

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
