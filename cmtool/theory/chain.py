"""The population minimizer in any dimension by simulation: f_T(x) = E[Y_1 | Y_T = x] of the posterior-resampled chain.

The chain walks from T to 1 and re-draws X_0 from its posterior at every level; with the posterior *mean* in its place
the walk is DDIM, that is, distillation. It keeps every marginal, so no regression and no grid is needed, in any d.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cmtool.theory.laws import Mixture
from cmtool.theory.levels import Levels

Array = NDArray[np.float64]


def _step(x: Array, clean: Array, levels: Levels, index: int) -> Array:
    ratio = levels.noise[index - 1] / levels.noise[index]
    return ratio * x + (levels.signal[index - 1] - levels.signal[index] * ratio) * clean


def resample(law: Mixture, levels: Levels, x: Array, rng: np.random.Generator) -> Array:
    """One walk from each row of x (n, d) at level T down to level 1: draws of Y_1 given Y_T = x, (n, d)."""
    for index in range(levels.count - 1, 0, -1):
        clean = law.posterior_sample(x, levels.signal[index], levels.noise[index], rng)
        x = _step(x, clean, levels, index)
    return x


def consistency(law: Mixture, levels: Levels, x: Array, walks: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """f_T(x) for x (n, d) as the mean of `walks` walks, and its standard error, both (n, d)."""
    total, square = np.zeros_like(x), np.zeros_like(x)
    per_round = max(1, min(walks, 200_000 // max(1, len(x))))
    done = 0
    while done < walks:
        now = min(per_round, walks - done)
        ends = resample(law, levels, np.repeat(x, now, axis=0), rng).reshape(len(x), now, -1)
        total += ends.sum(axis=1)
        square += (ends**2).sum(axis=1)
        done += now
    mean = total / walks
    return mean, np.sqrt(np.maximum(square / walks - mean**2, 0) / max(walks - 1, 1))


def ddim(law: Mixture, levels: Levels, x: Array) -> Array:
    """The same walk with posterior means: what perfect distillation of the DDIM solver gives, (n, d)."""
    for index in range(levels.count - 1, 0, -1):
        x = _step(x, law.denoise(x, levels.signal[index], levels.noise[index]), levels, index)
    return x


def marginal(law: Mixture, levels: Levels, index: int, count: int, rng: np.random.Generator) -> Array:
    """`count` draws of X at the level with this index, (count, d)."""
    clean = law.sample(count, rng)
    return levels.signal[index] * clean + levels.noise[index] * rng.standard_normal(clean.shape)


def unbiased_trace_cov(ends: Array) -> float:
    """Tr Cov(f_T(X_T)) from walks (n, walks, d): the spread of the means less the part that is Monte Carlo noise."""
    count, walks, _ = ends.shape
    means = ends.mean(axis=1)
    noise = ends.var(axis=1, ddof=1).mean(axis=0).sum() / walks
    return float(means.var(axis=0, ddof=1).sum() - noise) if count > 1 else 0.0
