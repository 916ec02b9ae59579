"""Target rules: from the points of a pair to what is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cmtool.config.parts import TargetPart
from cmtool.diffusion.process import expand
from cmtool.diffusion.solvers import Denoise, Step
from cmtool.losses.distance import Distance
from cmtool.losses.draw import Nets
from cmtool.networks.convolution import Tape
from cmtool.rng import same_dropout

Solver = Step


@dataclass(frozen=True)
class Points:
    """What a target rule is given: images (B, C, H, W), times (B,) in the images' dtype, labels (B,) or None.

    `share` is the part of the run that is done, in [0, 1]; a tensor () where a recording must not keep the number.
    """

    x0: Tensor
    z: Tensor
    x_t: Tensor
    t: Tensor
    r: Tensor
    label: Tensor | None
    denoise: Denoise
    solver: Solver
    dropout_seed: int | None
    share: float | Tensor = 0.0


class Comparison(Protocol):
    """What a target rule answers: something that a distance can be taken of."""

    def measure(self, distance: Distance) -> Tensor:
        """Return one number an image, (B,), whose gradient is the rule's."""


@dataclass(frozen=True)
class Pair:
    """A prediction with gradient and the value it must reach, both (B, C, H, W)."""

    prediction: Tensor
    target: Tensor

    def measure(self, distance: Distance) -> Tensor:
        """The distance between the two."""
        return distance(self.prediction, self.target)


@dataclass(frozen=True)
class Slope:
    """A value f and its derivative along the flow, which must vanish, both (B, C, H, W)."""

    value: Tensor
    tangent: Tensor
    stop_gradient: bool

    def measure(self, distance: Distance) -> Tensor:
        """The local form of the distance at the tangent (Song et al. 2023, Theorems 3 and 4).

        With a stop-gradient the gradient is that of f^T H(f) df/dt with the right half held fixed (Theorems 5 and 6).
        That product is no measure of anything, so the number reported is the local form all the same.
        """
        if not self.stop_gradient:
            return distance.form(self.value, self.tangent)
        at, along = self.value.detach(), self.tangent.detach()
        surrogate = (self.value * distance.pull(at, along)).flatten(1).sum(1)
        return distance.form(at, along).detach() + (surrogate - surrogate.detach())


TargetRule = Callable[[Nets, Points], Comparison]


def call(module: Callable[..., Tensor], points: Points, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
    """Call a network, under the step's dropout mask where there is dropout; `r` for networks of two times."""
    arguments = (x, t, points.label) if r is None else (x, t, points.label, r)
    if points.dropout_seed is None:
        return module(*arguments)
    with same_dropout(points.dropout_seed, x.device):
        return module(*arguments)


def pair(nets: Nets, points: Points) -> Pair:
    """Prediction f(x_t, t); target the frozen network at (x_r, r), both under one dropout mask.

    Where r = 0 the network is the identity and the target is x_r itself, the clean image (ECT). In a half the target is
    computed as a difference from the prediction, so that what is rounded is small where they are close.
    """
    with torch.no_grad():
        x_r = points.solver(points.denoise, points.x_t, points.t, points.r)
    if nets.paired:
        return _in_a_half(nets, points, x_r)
    with torch.no_grad():
        target = call(nets.target, points, x_r, points.r)
    return Pair(call(nets.student, points, points.x_t, points.t), target)


def _in_a_half(nets: Nets, points: Points, x_r: Tensor) -> Pair:
    tape = Tape()
    with tape.writing():
        prediction = call(nets.student, points, points.x_t, points.t)
    with torch.no_grad(), tape.reading():
        return Pair(prediction, call(nets.target, points, x_r, points.r))


def data(nets: Nets, points: Points) -> Pair:
    """Prediction D(x_t, t); target where the direction leads: the clean image in denoising (Karras et al. 2022, Eq. 2).

    Towards the posterior mean the same answer is learned from targets that vary less (Xu et al. 2023).
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


def build_target(part: TargetPart) -> TargetRule:
    """Return the target rule that `part` names."""
    if part.differentiates:
        from cmtool.losses.tangent import build_tangent

        return build_tangent(part)
    return RULES[part.rule]


RULES: dict[str, TargetRule] = {"pair": pair, "data": data, "leap": leap}
