"""Closed forms for Gaussian data: covariances commute, so that every coordinate is a matter of single numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad

from cmtool.theory.distances import chi_mean, folded
from cmtool.theory.levels import Levels

Array = NDArray[np.float64]


def moments(levels: Levels, mean: float, std: float) -> tuple[Array, Array]:
    """m_t and v_t of X_t for data N(mean, std^2), each (T,)."""
    return levels.signal * mean, levels.signal**2 * std**2 + levels.noise**2


def flow_map(levels: Levels, mean: float, std: float, start: int, end: int, x: float) -> float:
    """Phi_{start->end}(x) with levels counted from 1: m_k + sqrt(v_k / v_t) (x - m_t)."""
    m, v = moments(levels, mean, std)
    return float(m[end - 1] + np.sqrt(v[end - 1] / v[start - 1]) * (x - m[start - 1]))


def _covariances(levels: Levels, std: float) -> Array:
    a, b = levels.signal, levels.noise
    return a[1:] * a[:-1] * std**2 + b[1:] * b[:-1]


def gains(levels: Levels, std: float) -> Array:
    """A_t of the population minimizers f_t(x) = m_1 + A_t (x - m_t), (T,): the product of c_k / v_k."""
    v = moments(levels, 0.0, std)[1]
    return np.concatenate([[1.0], np.cumprod(_covariances(levels, std) / v[1:])])


def consistency(levels: Levels, mean: float, std: float, x: float) -> float:
    """f_T(x), the population minimizer at the last level."""
    m = moments(levels, mean, std)[0]
    return float(m[0] + gains(levels, std)[-1] * (x - m[-1]))


def no_intercept_gain(levels: Levels, mean: float, std: float) -> float:
    """B_T of the best f_t(x) = B_t x (no intercept): equal to A_T only for mean 0."""
    m, v = moments(levels, mean, std)
    return float(np.prod((_covariances(levels, std) + m[:-1] * m[1:]) / (v[1:] + m[1:] ** 2)))


def shrinkage(levels: Levels, std: float) -> float:
    """Eta = 1 - prod_t cos(dtheta_t): how much too narrow the output is."""
    return float(-np.expm1(np.sum(np.log(np.cos(np.diff(levels.angles(std)))))))


def smallest_shrinkage(steps: int, angle: float = np.pi / 2) -> float:
    """The eta that no schedule of `steps` steps over `angle` radians beats: equal steps, about angle^2 / (2 steps)."""
    return float(-np.expm1(steps * np.log(np.cos(angle / steps))))


def li_constant(std: float) -> float:
    """I(s), the limit of T eta / (c1 log T) on the theorem's schedule: 1/8 at both ends, .1545 at s = 1."""

    def rate(alpha: float, pace: float) -> float:
        return pace**2 * alpha / ((1 - alpha) * (1 - alpha + std**2 * alpha) ** 2)

    # u = e^tau turns the first piece into an integral over alpha = e^-u, u in (0, 1).
    early = quad(
        lambda u: u * np.exp(-u) / (-np.expm1(-u) * (-np.expm1(-u) + std**2 * np.exp(-u)) ** 2),
        0,
        1,
        points=[min(std**2, 0.5), min(10 * std**2, 0.9)],
        limit=400,
    )[0]
    late = quad(lambda tau: rate(np.exp(-1 - tau), 1.0), 0, 60, limit=400)[0]
    return float(std**2 / 8 * (early + late))


def output_error(levels: Levels, mean: float, std: float, start: str = "normal") -> tuple[float, float]:
    """(bias, spread) such that the output's quantile minus that of X_1 is bias + spread z.

    `start` is "normal" for X_T ~ N(0, 1), as in the theorem, or "exact" for X_T ~ p_T.
    """
    m, v = moments(levels, mean, std)
    gain = gains(levels, std)[-1]
    if start == "exact":
        return 0.0, float(gain * np.sqrt(v[-1]) - np.sqrt(v[0]))
    return float(-gain * m[-1]), float(gain - np.sqrt(v[0]))


def distances(levels: Levels, mean: float, std: float, dim: int = 1, start: str = "normal") -> tuple[float, float, str]:
    """W1, W2 and how W1 was found, for N(mean 1, std^2 I) in `dim` dimensions against X_1.

    W2 is exact. W1 is exact on the line (folded normal) and for mean 0 (radial); otherwise W2 stands in as upper bound.
    """
    bias, spread = output_error(levels, mean, std, start)
    w2 = float(np.sqrt(dim) * np.hypot(bias, spread))
    if dim == 1:
        return float(folded(bias, spread)), w2, "exact"
    if bias == 0.0:
        return abs(spread) * chi_mean(dim), w2, "exact"
    return w2, w2, "upper bound (W2)"


def finite_sample_sd(levels: Levels, std: float, count: int) -> float:
    """Relative sd of the gain when each level is fitted by least squares on `count` fresh pairs: it falls with T."""
    return float(np.sqrt(np.sum(np.tan(np.diff(levels.angles(std))) ** 2) / count))


def lipschitz(levels: Levels, std: float) -> float:
    """L_f = max over k < t of sqrt(v_k / v_t)."""
    v = moments(levels, 0.0, std)[1]
    return float(np.sqrt(np.max(v / np.minimum.accumulate(v[::-1])[::-1])))
