"""A law of noise levels given by its density over ln t, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelDensity:
    """Levels t (K,) ascending and the cumulative probability (K,) at each, from 0 to 1; float64."""

    levels: Tensor
    cumulative: Tensor

    def quantile(self, u: Tensor) -> Tensor:
        """Return t (B,) of u (B,) in [0, 1): linear in ln t between the levels."""
        cumulative, logs = self.cumulative.to(u.device), self.levels.to(u.device).log()
        index = torch.searchsorted(cumulative, u, right=True).clamp(1, len(logs) - 1)
        below, above = cumulative[index - 1], cumulative[index]
        share = ((u - below) / (above - below).clamp_min(1e-300)).clamp(0, 1)
        return torch.lerp(logs[index - 1], logs[index], share).exp()


def density_from(levels: Tensor, height: Tensor, floor: float = 0.0) -> LevelDensity:
    """Return the law whose density over ln t is proportional to `height` (K,) at `levels` (K,), linear between them.

    A share `floor` of it is spread evenly over ln t, so that every level is drawn sometimes.
    """
    logs = levels.double().log()
    steps = logs[1:] - logs[:-1]
    height = height.double().clamp_min(0)
    mass = steps * (height[1:] + height[:-1]) / 2
    total = float(mass.sum())
    mass = mass / total if total > 0 and math.isfinite(total) else steps / steps.sum()
    mass = (1 - floor) * mass + floor * steps / steps.sum()
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    return LevelDensity(levels.double(), cumulative / cumulative[-1])
