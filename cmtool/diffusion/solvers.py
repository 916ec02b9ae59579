"""One step of the probability-flow ODE from t to r < t, with a denoiser (Karras et al. 2022, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from cmtool.diffusion.process import expand

Denoise = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]
Level = TypeVar("Level", float, Tensor)


def euler_step(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """First order: x + (r - t) (x - D(x, t)) / t. One call of `denoise`; x (B, ...), t and r (B,), 0 <= r < t."""
    slope = (x - denoise(x, t)) / expand(t, x)
    return x + expand(r - t, x) * slope


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Second order: the mean of the slopes at t and, after an Euler step, at r. Two calls of `denoise`.

    Where r is 0 the slope does not exist, and the step is Euler's.
    """
    slope = (x - denoise(x, t)) / expand(t, x)
    ahead = x + expand(r - t, x) * slope
    safe = torch.where(r > 0, r, t)
    slope_r = (ahead - denoise(ahead, safe)) / expand(safe, x)
    mean = torch.where(expand(r, x) > 0, (slope + slope_r) / 2, slope)
    return x + expand(r - t, x) * mean


def midpoint_step(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Second order: the slope at the middle of t^(1/3) and r^(1/3) (OpenAI's `dpm` sampler). Two calls; r > 0."""
    middle = ((t ** (1 / 3) + r ** (1 / 3)) / 2) ** 3
    slope = (x - denoise(x, t)) / expand(t, x)
    half = x + expand(middle - t, x) * slope
    slope_m = (half - denoise(half, middle)) / expand(middle, x)
    return x + expand(r - t, x) * slope_m


def levels_between(t: Tensor, r: Tensor, steps: int, rho: float) -> list[Tensor]:
    """Return steps + 1 times (B,) from t down to r, even in t^(1/rho) as the Karras grid is, with exact ends."""
    high, low = t ** (1 / rho), r ** (1 / rho)
    inner = [(high + (low - high) * (i / steps)) ** rho for i in range(1, steps)]
    return [t, *inner, r]


def repeated(step: Step, steps: int, rho: float) -> Step:
    """A one-step solver taken `steps` times within each pair."""

    def walk(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times = levels_between(t, r, steps, rho)
        for here, there in pairwise(times):
            x = step(denoise, x, here, there)
        return x

    return walk


def dpmpp_2m_along(denoise: Callable[[Tensor, Level], Tensor], x: Tensor, levels: Sequence[Level]) -> Tensor:
    """DPM-Solver++ 2M from the first to the last of `levels`, floats or (B,) each (Lu et al. 2022b, Algorithm 2).

    Second order with one call a step: the denoiser is extrapolated linearly in ln t to the middle of the step, after a
    first step of first order.
    """
    before: tuple[Level, Tensor] | None = None
    for here, there in pairwise(levels):
        clean = denoise(x, here)
        ahead = clean
        if before is not None:
            weight = _log(here / there) / _log(before[0] / here) / 2
            ahead = clean + _expand(weight, x) * (clean - before[1])
        shrink = _expand(there / here, x)
        x = shrink * x + (1 - shrink) * ahead
        before = (here, clean)
    return x


def _log(ratio: Level) -> Level:
    return ratio.log() if isinstance(ratio, Tensor) else math.log(ratio)


def _expand(value: Level, like: Tensor) -> Level:
    return expand(value, like) if isinstance(value, Tensor) else value


def dpmpp_2m(steps: int, rho: float) -> Step:
    """DPM-Solver++ 2M along `steps` steps within each pair."""

    def walk(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return dpmpp_2m_along(denoise, x, levels_between(t, r, steps, rho))

    return walk


def adams_bashforth(steps: int, rho: float) -> Step:
    """The two-step Adams-Bashforth method on slopes dx/dt within each pair: second order with one call a step."""

    def walk(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        before: tuple[Tensor, Tensor] | None = None
        for here, there in pairwise(levels_between(t, r, steps, rho)):
            slope = (x - denoise(x, here)) / expand(here, x)
            mean = slope
            if before is not None:
                weight = (there - here) / (here - before[0]) / 2
                mean = slope + expand(weight, x) * (slope - before[1])
            x = x + expand(there - here, x) * mean
            before = (here, slope)
        return x

    return walk


SOLVERS: dict[str, Step] = {"euler": euler_step, "heun": heun_step, "midpoint": midpoint_step}
# Methods that remember earlier steps; with a single step per pair they are no better than Euler's.
TRAJECTORIES: dict[str, Callable[[int, float], Step]] = {"dpmpp_2m": dpmpp_2m, "adams_bashforth": adams_bashforth}


def build_solver(name: str, steps: int = 1, rho: float = 7.0) -> Step:
    """Return the solver that leads from t to r in `steps` steps, spaced by `rho`."""
    if name in TRAJECTORIES:
        return TRAJECTORIES[name](steps, rho)
    return SOLVERS[name] if steps == 1 else repeated(SOLVERS[name], steps, rho)
