"""The typical set: how much of X_t lies where -log p_t(x) <= c3 d log T, and how well that constant is known.

The paper's own definition was not available to us; this is the reading of the preceding paper (arXiv 2306.09251).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from cmtool.theory.laws import Mixture, empirical
from cmtool.theory.levels import Levels
from cmtool.theory.line import LineMixture
from cmtool.theory.population import at

Array = NDArray[np.float64]


def gaussian_outside(dim: int, count: int, c3: float, variance: float = 1.0) -> float:
    """P(X outside) for N(0, v I_d) at T = `count`: P(chi2_d > 2 c3 d log T - d log(2 pi v)); 2 pi T^-2c3 for d = 2."""
    return float(chi2.sf(2 * c3 * dim * np.log(count) - dim * np.log(2 * np.pi * variance), dim))


def tail_constant(outside: float, dim: int, count: int) -> float:
    """The c4 for which P(outside) = T^(-c4 d); infinite when nothing lies outside."""
    return float(-np.log(outside) / (dim * np.log(count))) if outside > 0 else float("inf")


def outside_by_level(law: LineMixture, levels: Levels, c3: float) -> Array:
    """P(X_t outside) for each level of a law on the line, (T,), by integrating its density."""
    found = []
    for index in range(levels.count):
        a, b = at(levels, index)
        means, variances = law.components(a, b)
        reach = 12 * np.sqrt(variances.max())
        x = np.linspace(means.min() - reach, means.max() + reach, 20001)
        log_density = law.log_density(x, a, b)
        found.append(np.sum(np.exp(log_density) * (-log_density > c3 * np.log(levels.count))) * (x[1] - x[0]))
    return np.array(found)


def path_depths(
    law: LineMixture, levels: Levels, dim: int, rng: np.random.Generator, count: int = 8000
) -> dict[str, Array]:
    """-log p_t along `count` paths of `dim` copies of a line law, at up to 20 levels: two arrays (levels, count).

    "forward" paths keep one X_0 and one Z for all levels; "flow" paths carry one draw along the probability-flow ODE,
    as a generator would.
    """
    clean = law.sample(count * dim, rng).reshape(count, dim)
    noise = rng.standard_normal((count, dim))
    rank = rng.standard_normal((count, dim))
    depths: dict[str, list[Array]] = {"forward": [], "flow": []}
    for index in np.unique(np.linspace(0, levels.count - 1, 20).astype(int)):
        a, b = at(levels, index)
        for name, x in (("forward", a * clean + b * noise), ("flow", law.quantile(rank, a, b))):
            depths[name].append(-law.log_density(x, a, b).sum(axis=1))
    return {name: np.array(rows) for name, rows in depths.items()}


def ever_outside(depths: Array, c3: float, dim: int, count: int) -> float:
    """Share of paths that are outside at any of the levels; depths (levels, paths) from `path_depths`, T = `count`."""
    return float(np.any(depths > c3 * dim * np.log(count), axis=0).mean())


def score_moment(law: LineMixture, levels: Levels, index: int) -> tuple[float, float]:
    """E s_t(X_t)^2 and the bound 1 / (1 - alpha_t) that the proof uses, per dimension."""
    a, b = at(levels, index)
    means, variances = law.components(a, b)
    reach = 12 * np.sqrt(variances.max())
    x = np.linspace(means.min() - reach, means.max() + reach, 20001)
    value = np.sum(np.exp(law.log_density(x, a, b)) * law.score(x, a, b) ** 2) * (x[1] - x[0])
    return float(value), 1 / b**2


@dataclass(frozen=True)
class Constants:
    """What `count` draws say of one level: quantiles of -log p / (d log T) and of the step in its own unit.

    c3_density and c3_step hold the median and the largest value; nothing rarer than 1/count can be seen, so
    `c4_resolved`, log(count) / (d log T), is the largest c4 that the draws could show.
    """

    level: int
    c3_density: tuple[float, float]
    c3_step: tuple[float, float]
    c4_resolved: float
    at_c3: float
    c4_tail: float


def digits_points() -> Array:
    """The 1797 handwritten digits of scikit-learn, 8 x 8, scaled to [-1, 1]: (1797, 64)."""
    from sklearn.datasets import load_digits

    return load_digits().data / 8.0 - 1.0


def estimate_constants(
    law: Mixture, levels: Levels, picks: list[int], count: int, rng: np.random.Generator, at_c3: float = 0.5
) -> list[Constants]:
    """Estimate c3 (and the c4 that can be resolved) of a law with an exact density, at levels with indices `picks`.

    The step of the second condition is ||x_{t-1} - x_t / sqrt(1 - beta_t)|| <= c3 sqrt(d beta_t log T), along forward
    pairs with the same X_0 and Z.
    """
    size, log_count = law.dim, np.log(levels.count)
    clean = law.sample(count, rng)
    noise = rng.standard_normal(clean.shape)
    found = []
    for index in picks:
        (a, b), (a_before, b_before) = at(levels, index), at(levels, index - 1)
        x = a * clean + b * noise
        depth = -law.log_density(x, a, b) / (size * log_count)
        step = (a_before * clean + b_before * noise) - x * a_before / a
        length = np.linalg.norm(step, axis=1) / np.sqrt(size * (1 - (a / a_before) ** 2) * log_count)
        tail = norm.logsf((at_c3 - depth.mean()) / depth.std(ddof=1))
        found.append(
            Constants(
                index + 1,
                (float(np.median(depth)), float(depth.max())),
                (float(np.median(length)), float(length.max())),
                float(np.log(count) / (size * log_count)),
                at_c3,
                float(-tail / (size * log_count)),
            )
        )
    return found


def digits_law() -> Mixture:
    """The empirical law of the digits, as a mixture of Diracs."""
    return empirical(digits_points())
