"""Noise processes: how a clean image and unit noise meet at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Give t (B,) trailing axes so that it multiplies `like` (B, ...)."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True)
class VarianceExploding:
    """x_t = x0 + t z: the time is the noise level (Karras et al. 2022; Song et al. 2023, section 2)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def noised(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B, C, H, W) of x0 and unit noise z at t (B,)."""
        return x0 + expand(t, x0) * z

    def velocity(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """dx/dt = (x_t - x0) / t: the slope of the line through x0, or of the ODE if x0 is a denoiser's answer."""
        return (x_t - x0) / expand(t, x_t)

    def renoise(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Bring f's answer, which sits at sigma_min, back to t: x0 + sqrt(t^2 - sigma_min^2) z (Algorithm 1)."""
        spread = torch.sqrt((t.double() ** 2 - self.sigma_min**2).clamp_min(0.0)).to(x0.dtype)
        return x0 + expand(spread, x0) * z
