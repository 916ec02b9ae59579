"""Target rules: from the points of a pair to what is compared. `tangent` holds those of continuous time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmtool.diffusion.process import expand
from cmtool.losses.objective import Pair
from cmtool.losses.terms import Nets, Points, told_of
from cmtool.rng import same_dropout


def call(module: Callable[..., Tensor], points: Points, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
    """Call a network, under the step's dropout mask if it drops anything; `r` is for networks of two times."""
    arguments = (x, t, points.label) if r is None else (x, t, points.label, r)
    told = told_of(points.augment)
    if points.dropout_seed is None:
        return module(*arguments, **told)
    with same_dropout(points.dropout_seed, x.device):
        return module(*arguments, **told)


def pair(nets: Nets, points: Points) -> Pair:
    """Prediction f(x_t, t); target the frozen network at (x_r, r), both under one dropout mask.

    Where r = 0 the network is the identity and the target is x_r itself, the clean image (ECT). In half precision the
    target is computed as a difference from the prediction: where the two are close, only something small is rounded.
    """
    with torch.no_grad():
        x_r = points.solver(points.denoise, points.x_t, points.t, points.r)
    prediction, target = paired_passes(
        nets,
        lambda: call(nets.student, points, points.x_t, points.t),
        lambda: call(nets.target, points, x_r, points.r),
    )
    return Pair(prediction, target)


def paired_passes(nets: Nets, predict: Callable[[], Tensor], reach: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return a prediction with gradient and what it must reach, without; as one pair of passes in half precision."""
    if nets.paired:
        return nets.pairing(predict, reach)
    with torch.no_grad():
        target = reach()
    return predict(), target


def data(nets: Nets, points: Points) -> Pair:
    """Prediction D(x_t, t); target where the direction leads: the clean image in denoising (Karras et al. 2022, Eq. 2).

    With the posterior mean as direction, the network learns the same answer from targets that vary less (Xu et al.
    2023).
    """
    with torch.no_grad():
        target = points.denoise(points.x_t, points.t)
    return Pair(call(nets.student, points, points.x_t, points.t), target)


def leap(nets: Nets, points: Points) -> Pair:
    """Prediction D(x_t, t); target the clean image with which one Euler step from t lands on x_r.

    With two steps of the target network between t and r this is progressive distillation (Salimans & Ho 2022).
    """
    with torch.no_grad():
        x_r = points.solver(points.denoise, points.x_t, points.t, points.r)
        slope = (x_r - points.x_t) / expand(points.r - points.t, points.x_t)
        clean = points.x_t - expand(points.t, points.x_t) * slope
    return Pair(call(nets.student, points, points.x_t, points.t), clean)
