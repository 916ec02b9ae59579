"""Samplers with the exact score on the line: the law after a few network evaluations, without random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from cmtool.theory.levels import Levels
from cmtool.theory.line import LineMixture
from cmtool.theory.population import Map, at

Array = NDArray[np.float64]


class BinnedLaw:
    """A law on the line as mass (n,) in equal bins between `edges` (n+1,); noise is added without any draw."""

    def __init__(self, edges: Array, mass: Array) -> None:
        self.edges, self.mass = edges, mass

    @classmethod
    def from_cdf(cls, cdf: Callable[[Array], Array], reach: float = 6.0, size: int = 1000) -> BinnedLaw:
        """The law with this distribution function, what lies beyond `reach` put into the end bins."""
        edges = np.linspace(-reach, reach, size + 1)
        values = cdf(edges)
        values[0], values[-1] = 0.0, 1.0
        return cls(edges, np.diff(values))

    @property
    def centers(self) -> Array:
        """Bin centers, (n,)."""
        return 0.5 * (self.edges[:-1] + self.edges[1:])

    def spread(self, mean: Map, std: float) -> BinnedLaw:
        """The law of mean(X) + std xi, xi ~ N(0, 1)."""
        rise = ndtr((self.edges[None, :] - mean(self.centers)[:, None]) / std)
        rise[:, 0], rise[:, -1] = 0.0, 1.0
        return BinnedLaw(self.edges, self.mass @ np.diff(rise, axis=1))

    def mapped(self, f: Map) -> BinnedLaw:
        """The law of f(X) for an increasing f."""
        places = np.maximum.accumulate(f(self.edges))
        total = np.concatenate([[0.0], np.cumsum(self.mass)])
        values = np.interp(self.edges, places, total, left=0.0, right=1.0)
        values[0], values[-1] = 0.0, 1.0
        return BinnedLaw(self.edges, np.diff(values))

    def w1(self, cdf: Callable[[Array], Array]) -> float:
        """W1 to the law with this distribution function: the area between the two."""
        total = np.concatenate([[0.0], np.cumsum(self.mass)])
        gap = np.abs(total - cdf(self.edges))
        return float(np.sum(0.5 * (gap[1:] + gap[:-1]) * np.diff(self.edges)))


def level_cdf(law: LineMixture, levels: Levels, index: int) -> Callable[[Array], Array]:
    """The distribution function of X at a level."""
    return lambda x: law.cdf(x, *at(levels, index))


def ancestral_step(law: LineMixture, levels: Levels, index: int) -> tuple[Map, float]:
    """Mean and sd of one reverse SDE step t -> t-1 (Ho et al. 2020, the smaller variance), with the exact denoiser."""
    (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
    keep = a_now / a
    fresh = b_now**2 - keep**2 * b**2
    pull = keep * b**2 / b_now**2

    def mean(x: Array) -> Array:
        clean = law.denoise(x, a_now, b_now)
        return a * clean + pull * (x - a_now * clean)

    return mean, float(b * np.sqrt(fresh) / b_now)


def sde_w1(law: LineMixture, levels: Levels) -> float:
    """W1 of ancestral sampling from N(0, 1) with T - 1 evaluations of the exact score."""
    state = BinnedLaw.from_cdf(ndtr)
    for index in range(levels.count - 1, 0, -1):
        state = state.spread(*ancestral_step(law, levels, index))
    return state.w1(level_cdf(law, levels, 0))


def multistep_w1(law: LineMixture, levels: Levels, functions: list[Map], indices: list[int]) -> float:
    """W1 of multistep consistency sampling: f at indices[0] from N(0, 1), then noise again up to each next index."""
    state = BinnedLaw.from_cdf(ndtr).mapped(functions[indices[0]])
    a_one, b_one = at(levels, 0)
    for index in indices[1:]:
        a, b = at(levels, index)
        keep = a / a_one
        state = state.spread(_scaled(keep), float(np.sqrt(b**2 - keep**2 * b_one**2))).mapped(functions[index])
    return state.w1(level_cdf(law, levels, 0))


def _scaled(factor: float) -> Map:
    return lambda x: factor * x


def second_order(law: LineMixture, levels: Levels) -> Map:
    """DPM-Solver++(2M) (Lu et al. 2022) with the exact denoiser: second order, one evaluation per step.

    Heun's method is not used on VP levels: in sigma = b / a the first step spans decades, and it blows up.
    """
    log_snr = np.log(levels.signal / levels.noise)

    def run(x: Array) -> Array:
        last: Array | None = None
        for index in range(levels.count - 1, 0, -1):
            (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
            clean = law.denoise(x, a_now, b_now)
            blend = clean
            if last is not None:
                ratio = (log_snr[index] - log_snr[index + 1]) / (log_snr[index - 1] - log_snr[index])
                blend = clean + (clean - last) / (2 * ratio)
            x, last = b / b_now * x + (a - a_now * b / b_now) * blend, clean
        return x

    return run


def gaussian_sde_sd(levels: Levels, std: float) -> float:
    """Output sd of ancestral sampling from N(0, 1) for data N(0, s^2): its exact variance recursion."""
    variance = 1.0
    for index in range(levels.count - 1, 0, -1):
        (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
        keep = a_now / a
        shrink = a_now * std**2 / (a_now**2 * std**2 + b_now**2)
        pull = keep * b**2 / b_now**2
        variance *= (a * shrink + pull * (1 - a_now * shrink)) ** 2
        variance += b**2 * (b_now**2 - keep**2 * b**2) / b_now**2
    return float(np.sqrt(variance))
