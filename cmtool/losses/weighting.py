"""Weights of an image's distance as functions of its times: t, r (B,) -> (B,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmtool.config.parts import WeightingPart
from cmtool.config.schema import ProcessConfig

Weighting = Callable[[Tensor, Tensor], Tensor]


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
    """1 / c_out(t) of EDM's scalings."""
    return karras(t, r, process).sqrt()


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, ProcessConfig], Tensor]] = {
    "uniform": uniform,
    "inverse_gap": inverse_gap,
    "snr": snr,
    "snr_plus_one": snr_plus_one,
    "karras": karras,
    "truncated_snr": truncated_snr,
    "c_out": c_out,
}


def build_weighting(part: WeightingPart, process: ProcessConfig) -> Weighting:
    """Return the weighting that `part` names."""
    weigh = WEIGHTINGS[part.kind]
    return lambda t, r: weigh(t, r, process)
