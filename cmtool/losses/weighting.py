"""Weights: they turn the distances, the times t and r and the student into the numbers to descend, (B,) each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmtool.config.parts import TimesPart, WeightingPart
from cmtool.config.schema import ProcessConfig

Factor = Callable[[Tensor, Tensor, ProcessConfig], Tensor]
# (distance, t, r, student) -> weighted distance
Weighting = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def uniform(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """1 (Song et al. 2023)."""
    return torch.ones_like(t)


def inverse_gap(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """1 / (t - r) (iCT, Eq. 6)."""
    return 1 / (t - r)


def snr(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """1 / t^2."""
    return t**-2


def snr_plus_one(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """1 / t^2 + 1."""
    return t**-2 + 1


def karras(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """1 / t^2 + 1 / sigma_data^2 (Karras et al. 2022, table 1): one over EDM's c_out squared."""
    return t**-2 + process.sigma_data**-2


def truncated_snr(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """max(1 / t^2, 1) (Salimans & Ho 2022)."""
    return (t**-2).clamp_min(1)


def c_out(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """The inverse of c_out in EDM's scalings."""
    return karras(t, r, process).sqrt()


def flow(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """((1 + t) / t)^2: turns the error of the clean image into that of rectified flow's velocity."""
    return ((1 + t) / t) ** 2


def grid_speed(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
    """dt/du of the Karras grid t(u): the weight of Theorem 3 when lambda = du/dt (Song et al. 2023, Appendix B.3)."""
    low, high = process.sigma_min ** (1 / process.rho), process.sigma_max ** (1 / process.rho)
    return process.rho * (high - low) * t ** (1 - 1 / process.rho)


FACTORS: dict[str, Factor] = {
    "uniform": uniform,
    "inverse_gap": inverse_gap,
    "snr": snr,
    "snr_plus_one": snr_plus_one,
    "karras": karras,
    "truncated_snr": truncated_snr,
    "c_out": c_out,
    "flow": flow,
    "grid_speed": grid_speed,
}


def learned(distance: Tensor, t: Tensor, r: Tensor, student: Any) -> Tensor:
    """exp(w(t)) d - w(t) with the student's log-variance head: at its best exp(-w) is the mean of d (sCM, Eq. 8)."""
    w = student.log_variance(t)
    return w.exp() * distance - w


def build_adaptive(part: WeightingPart) -> Weighting:
    """Divide by sg(d + c)^p: for p = 1 every image pulls alike whatever its error (Geng et al. 2025, section 4.3)."""

    def adaptive(distance: Tensor, t: Tensor, r: Tensor, student: Any) -> Tensor:
        return distance / (distance.detach() + part.c) ** part.p

    return adaptive


def build_sigmoid(part: WeightingPart) -> Factor:
    """1/2 sigmoid(b - lambda) (-dlambda/dtau) alpha^a / (alpha^2 + sigma^2) with lambda = ln(alpha^2 / sigma^2).

    alpha = 1 - tau and sigma = tau are the shares of image and noise in the rectified flow of `draw_flow_pair`; written
    out in eta = sigma / alpha = t / sigma_data (Zhou et al. 2025, Eq. 13).
    """

    def sigmoid(t: Tensor, r: Tensor, process: ProcessConfig) -> Tensor:
        eta = t / process.sigma_data
        return eta / (eta**2 + math.exp(-part.b)) * (1 + eta) ** (4 - part.a) / (1 + eta**2)

    return sigmoid


def build_factor(factor: Factor, process: ProcessConfig) -> Weighting:
    """A weight that depends only on the times."""
    return lambda distance, t, r, student: factor(t, r, process) * distance


def build_weighting(part: WeightingPart, process: ProcessConfig, times: TimesPart | None = None) -> Weighting:
    """Return the weighting that `part` names; `times` says where the atom is that `part.atom` weighs."""
    if part.kind == "adaptive":
        weigh = build_adaptive(part)
    elif part.kind == "learned":
        weigh = learned
    else:
        weigh = build_factor(build_sigmoid(part) if part.kind == "sigmoid" else FACTORS[part.kind], process)
    # Only `student_t` has an atom; under another law a time below `low` is like any other.
    if part.atom is None or times is None or times.kind != "student_t":
        return weigh
    return at_atom(weigh, part.atom, times)


def at_atom(weigh: Weighting, weight: float, times: TimesPart) -> Weighting:
    """The mean over images above the atom plus `weight` times the mean over those at it (TCM, section 4.2)."""
    inside, outside = weight / max(times.atom, 1e-12), 1 / (1 - times.atom)

    def weighed(distance: Tensor, t: Tensor, r: Tensor, student: Any) -> Tensor:
        share = torch.where(t <= times.low, torch.full_like(t, inside), torch.full_like(t, outside))
        return share * weigh(distance, t, r, student)

    return weighed
