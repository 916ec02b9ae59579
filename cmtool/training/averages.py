"""Moving averages of the weights: the target's, and those used for sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmtool.config.schema import EmaConfig
from cmtool.training.sharding import local


def power_gamma(std: float) -> float:
    """Return the exponent gamma of a power-function average of relative width `std` (EDM2, Eq. 123 solved for gamma).

    std = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), falling in gamma; 0.10 gives 6.94.
    """

    def width(gamma: float) -> float:
        return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > std else (low, middle)
    return (low + high) / 2


def decay_at(ema: EmaConfig, step: int) -> float:
    """Return the weight of the old average after the 0-based `step`.

    Fixed, or (1 - 1/(step+1))^(gamma+1) for a power function (EDM2, Eq. 127).
    """
    if ema.kind == "none":
        return 0.0
    if ema.kind == "power":
        return (1 - 1 / (step + 1)) ** (power_gamma(ema.std) + 1)
    return ema.decay


@torch.no_grad()
def move_towards(average: nn.Module, source: nn.Module, decay: float) -> None:
    """Average <- decay * average + (1 - decay) * source, parameter by parameter; decay 0 copies."""
    old: list[Tensor] = [local(parameter) for parameter in average.parameters()]
    new: list[Tensor] = [local(parameter) for parameter in source.parameters()]
    if decay == 0.0:
        torch._foreach_copy_(old, new)
    else:
        torch._foreach_lerp_(old, new, 1 - decay)
