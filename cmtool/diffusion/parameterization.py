"""How a raw network F becomes f(x, t): c_skip x + c_out F(c_in x, c_noise).

The boundary f(x, sigma_min) = x lives here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import RectifiedFlow, TrigFlow, exact


class Coefficients(NamedTuple):
    """The four scalings of an image at its time, each (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class Edm:
    """EDM's scalings, for denoisers and teachers (Karras et al. 2022, table 1)."""

    process: ProcessConfig

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the scalings at t (B,) >= 0. At t = 0 they are those of the identity, and c_noise stays finite."""
        data = self.process.sigma_data
        total = t**2 + data**2
        c_noise = self.process.noise_scale * torch.log(t.clamp_min(1e-20))
        return Coefficients(data**2 / total, t * data / total.sqrt(), total.rsqrt(), c_noise)


@dataclass(frozen=True)
class Consistency(Edm):
    """The consistency model's scalings (Song et al. 2023, Appendix C).

    Only the numerator of c_out and the denominator of c_skip contain t - sigma_min; c_in and the root keep t. At t =
    sigma_min and below, c_skip is exactly 1 and c_out exactly 0, also in float32, where a grid may end slightly below
    sigma_min.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the scalings at t (B,)."""
        data = self.process.sigma_data
        root = (t**2 + data**2).sqrt()
        # The identity must also hold at the float32 neighbor of sigma_min, so the gap is clamped at zero.
        gap = (t - self.process.sigma_min).clamp_min(0.0)
        gap = torch.where(t <= self.process.sigma_min * (1 + 1e-6), torch.zeros_like(gap), gap)
        c_noise = self.process.noise_scale * torch.log(t.clamp_min(1e-20))
        return Coefficients(data**2 / (gap**2 + data**2), gap * data / root, 1 / root, c_noise)


@dataclass(frozen=True)
class HardSwitch(Edm):
    """f = x at sigma_min and F elsewhere (Song et al. 2023, Eq. 4); the paper defines it without using it."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the scalings at t (B,): 1 and 0 at the boundary, 0 and 1 above it."""
        at_boundary = t <= self.process.sigma_min * (1 + 1e-6)
        c_skip = at_boundary.to(t.dtype)
        data = self.process.sigma_data
        c_noise = self.process.noise_scale * torch.log(t.clamp_min(1e-20))
        return Coefficients(c_skip, 1 - c_skip, (t**2 + data**2).rsqrt(), c_noise)


@dataclass(frozen=True)
class Trig(Edm):
    """TrigFlow's scalings in variance-exploding coordinates (Lu & Song 2025, section 3).

    f = cos(tau) x_own - sin(tau) sigma_data F(x_own / sigma_data, tau) with x_own = cos(tau) x: the scalings of EDM but
    for the sign of F, and tau itself as conditioning.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the scalings at t (B,), the noise level."""
        same = super().coefficients(t)
        return Coefficients(same.c_skip, -same.c_out, same.c_in, TrigFlow(self.process.sigma_data).time(t))


@dataclass(frozen=True)
class Flow(Edm):
    """Scalings of a network that gives the velocity of rectified flow: f = x_own - tau F(x_own, tau).

    With a second time r, F is the average velocity from t to r (MeanFlow), and f the clean image that one Euler step to
    r aims at.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the scalings at t (B,), the noise level."""
        flow = RectifiedFlow()
        scale, tau = flow.scale(t), flow.time(t)
        return Coefficients(scale, -tau, scale, tau)


@dataclass(frozen=True)
class Ddpm(Edm):
    """Scalings of a network that predicts the noise at the 1,000 steps of DDPM's linear schedule, as DiT does.

    f = x - t F(x / sqrt(1 + t^2), k): exact at the levels of the steps, in between and beyond with a k that goes with
    ln t in straight lines (Ho et al. 2020; Karras et al. 2022, table 1, column iDDPM).
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the scalings at t (B,), the noise level."""
        return Coefficients(torch.ones_like(t), -t, (t**2 + 1).rsqrt(), ddpm_step(t))


@lru_cache(maxsize=4)
def ddpm_levels(device: torch.device | str | None = None) -> Tensor:
    """Return the noise level sqrt((1 - a) / a) of each of the 1,000 steps, float64: .01 to 157.4.

    a is the product of 1 - beta, and beta grows from 1e-4 to .02 in equal steps.
    """
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device), 0)
    return ((1 - kept) / kept).sqrt()


def ddpm_step(t: Tensor) -> Tensor:
    """Return the step k (B,) in [0, 999] of noise levels t (B,), a whole number at those of the schedule."""
    wide = exact(t)
    places = ddpm_levels(wide.device).log()
    at = wide.clamp_min(1e-20).log()
    below = torch.searchsorted(places, at.detach().contiguous()).clamp(1, 999) - 1
    step = (below + (at - places[below]) / (places[below + 1] - places[below])).clamp(0, 999)
    # A level of the schedule that was rounded to float32 means the step itself.
    off = (step.round() - step).detach()
    return (step + torch.where(off.abs() < 1e-3, off, torch.zeros_like(off))).to(t)


PARAMETERIZATIONS: dict[str, Callable[[ProcessConfig], Edm]] = {
    "edm": Edm,
    "consistency": Consistency,
    "hard": HardSwitch,
    "trig": Trig,
    "flow": Flow,
    "ddpm": Ddpm,
}


def build_parameterization(process: ProcessConfig) -> Edm:
    """Return the parameterization that `process.parameterization` names."""
    return PARAMETERIZATIONS[process.parameterization](process)
