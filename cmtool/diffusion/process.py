"""Noise processes: how a clean image and unit noise combine at a given time.

Every model is called in variance-exploding coordinates, where the time is the noise level t. The other processes are
the same one with another clock and another scale, and convert exactly: x_own = scale(t) x, time = time(t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Give t (B,) trailing axes so that it multiplies `like` (B, ...)."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def exact(x: Tensor) -> Tensor:
    """Return x in float64, on its own device or on the CPU if that device has no float64 (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@dataclass(frozen=True)
class VarianceExploding:
    """x_t = x0 + t z: the time is the noise level (Karras et al. 2022; Song et al. 2023, section 2)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def noised(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B, C, H, W) of x0 and unit noise z at t (B,)."""
        return x0 + expand(t, x0) * z

    def renoise(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return f's answer, which is at sigma_min, to level t: x0 + sqrt(t^2 - sigma_min^2) z (Algorithm 1)."""
        spread = torch.sqrt((exact(t) ** 2 - self.sigma_min**2).clamp_min(0.0)).to(x0)
        return x0 + expand(spread, x0) * z


@dataclass(frozen=True)
class TrigFlow:
    """x_own = cos(tau) x0 + sin(tau) sigma_data z with tau = arctan(t / sigma_data) in [0, pi/2] (Lu & Song 2025)."""

    sigma_data: float = 0.5

    def time(self, t: Tensor) -> Tensor:
        """The time tau (B,) in radians of the noise level t (B,)."""
        return torch.atan(t / self.sigma_data)

    def level(self, tau: Tensor) -> Tensor:
        """The noise level t (B,) of tau (B,) in [0, pi/2)."""
        return self.sigma_data * torch.tan(tau)

    def scale(self, t: Tensor) -> Tensor:
        """cos(tau) (B,): the factor from variance-exploding coordinates to this process's own."""
        return self.sigma_data / torch.sqrt(t**2 + self.sigma_data**2)

    def speed(self, t: Tensor) -> Tensor:
        """dt/dtau (B,) of the noise level by this clock."""
        return (t**2 + self.sigma_data**2) / self.sigma_data


@dataclass(frozen=True)
class RectifiedFlow:
    """x_own = (1 - tau) x0 + tau z with tau = t / (1 + t) in [0, 1): straight lines (Liu et al. 2023)."""

    def time(self, t: Tensor) -> Tensor:
        """The time tau (B,) of the noise level t (B,)."""
        return t / (1 + t)

    def level(self, tau: Tensor) -> Tensor:
        """The noise level t (B,) of tau (B,) in [0, 1)."""
        return tau / (1 - tau)

    def scale(self, t: Tensor) -> Tensor:
        """1 - tau (B,): the factor from variance-exploding coordinates to this process's own."""
        return 1 / (1 + t)

    def speed(self, t: Tensor) -> Tensor:
        """dt/dtau (B,) of the noise level by this clock."""
        return (1 + t) ** 2
