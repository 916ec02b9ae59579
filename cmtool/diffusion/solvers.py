"""One step of the probability-flow ODE from t to r < t, with a denoiser (Karras et al. 2022, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmtool.diffusion.process import expand

Denoise = Callable[[Tensor, Tensor], Tensor]


def euler_step(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """First order: x + (r - t) (x - D(x, t)) / t. One call of `denoise`; x (B, ...), t and r (B,), 0 <= r < t."""
    slope = (x - denoise(x, t)) / expand(t, x)
    return x + expand(r - t, x) * slope


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Second order: the mean of the slopes at t and, after an Euler step, at r. Two calls of `denoise`.

    Where r is 0 the slope there does not exist and the step is Euler's.
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


SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]] = {
    "euler": euler_step,
    "heun": heun_step,
    "midpoint": midpoint_step,
}
