"""Target rules: from the points of a pair to (prediction, target)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmtool.config.parts import TargetPart
from cmtool.diffusion.solvers import Denoise
from cmtool.rng import same_dropout

Solver = Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Nets:
    """The networks that a step may look at.

    `target` is the student itself where its decay is zero; `sample_ema` is the average used for sampling.
    """

    student: nn.Module
    target: nn.Module
    sample_ema: nn.Module | None = None
    teacher: nn.Module | None = None


@dataclass(frozen=True)
class Points:
    """What a target rule is given: images (B, C, H, W), times (B,) in the images' dtype, labels (B,) or None."""

    x0: Tensor
    z: Tensor
    x_t: Tensor
    t: Tensor
    r: Tensor
    label: Tensor | None
    denoise: Denoise
    solver: Solver
    dropout_seed: int | None


TargetRule = Callable[[Nets, Points], tuple[Tensor, Tensor]]


def _pass(module: nn.Module, x: Tensor, t: Tensor, points: Points) -> Tensor:
    if points.dropout_seed is None:
        return module(x, t, points.label)
    with same_dropout(points.dropout_seed, x.device):
        return module(x, t, points.label)


def pair(nets: Nets, points: Points) -> tuple[Tensor, Tensor]:
    """Prediction f(x_t, t); target the frozen network at (x_r, r), both under one dropout mask.

    Where r = 0 the network is the identity and the target is x_r itself, the clean image (ECT).
    """
    with torch.no_grad():
        x_r = points.solver(points.denoise, points.x_t, points.t, points.r)
        target = _pass(nets.target, x_r, points.r, points)
    return _pass(nets.student, points.x_t, points.t, points), target


def data(nets: Nets, points: Points) -> tuple[Tensor, Tensor]:
    """Prediction D(x_t, t); target the clean image: denoising (Karras et al. 2022, Eq. 2)."""
    return _pass(nets.student, points.x_t, points.t, points), points.x0


RULES: dict[str, TargetRule] = {"pair": pair, "data": data}


def build_target(part: TargetPart) -> TargetRule:
    """Return the target rule that `part` names."""
    return RULES[part.rule]
