"""The first of two legs from t to r: how long it is, and at which noise level it ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmtool.config.parts import LegsPart
from cmtool.diffusion.process import RectifiedFlow


def leg_share(part: LegsPart, done: float) -> float:
    """Return a in (0, 1], the share of the gap that the first leg takes, when `done` in [0, 1] of the run is over.

    `exponential` is SoFlow's law, start (end / start)^done; `sigmoid` alpha-Flow's, 1 - sigmoid(gamma (x - 1/2)) with x
    from 0 to 1 between `begins` and `ends`, set to 1 above 1 - end and to `end` below it.
    """
    if part.law == "exponential":
        return part.start * (part.end / part.start) ** done
    if part.law == "sigmoid":
        x = (done - part.begins) / (part.ends - part.begins)
        a = (1 - math.tanh(part.gamma * (x - 0.5) / 2)) / 2
        return 1.0 if a > 1 - part.end else max(a, part.end)
    return part.start


def at_end(part: LegsPart, done: float) -> bool:
    """Whether a law that shrinks is at its end when `done` in [0, 1] of the run is over."""
    return part.law in ("exponential", "sigmoid") and leg_share(part, done) <= part.end


def middle_level(part: LegsPart, t: Tensor, r: Tensor, a: float | Tensor) -> Tensor:
    """Return the noise level (B,) after a share `a` (or (B,) of them) of the way from t to r in rectified flow's time.

    Float64 in and out. A leg is at least `part.shortest` long, or the whole way where that is shorter; then it is r.
    """
    flow = RectifiedFlow()
    tau = flow.time(t)
    whole = tau - flow.time(r)
    leg = (a * whole).clamp_min(part.shortest)
    # Half of the last digit, so that a gap that is `shortest` by intent counts as such.
    return torch.where(leg >= whole * (1 - 1e-9), r, flow.level(tau - leg))
