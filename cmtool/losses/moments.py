"""Inductive moment matching: a rule that compares laws, estimated on groups of samples, instead of single images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmtool.diffusion.process import expand
from cmtool.losses.distance import Distance
from cmtool.losses.target import call
from cmtool.losses.terms import Nets, Points


@dataclass(frozen=True)
class Moments:
    """Two sets of samples in every group: `prediction` with gradient and `target`, (B, C, H, W) each.

    `group` neighboring rows form a set; `width` (B,), alike within a set, is that of the kernel.
    """

    prediction: Tensor
    target: Tensor
    group: int
    width: Tensor

    def measure(self, distance: Distance) -> Tensor:
        """The squared maximum mean discrepancy of a row's two sets, (B,): the V-statistic, which keeps equal pairs.

        The kernel is k(a, b) = exp(-d(a, b) / width), Laplace's for the Euclidean norm. The ones of k cancel, so that
        1 - k is summed: small distances keep their digits. With sets of one image it is 2 (1 - k(prediction, target)).
        """

        def apart(a: Tensor, b: Tensor) -> Tensor:
            return -torch.expm1(-distance.between(a, b) / self.width)

        ours, theirs = self.prediction, self.target
        total = 2 * apart(ours, theirs)
        for shift in range(1, self.group):
            total = total + 2 * apart(ours, self._shifted(theirs, shift)) - apart(ours, self._shifted(ours, shift))
            total = total - apart(theirs, self._shifted(theirs, shift))
        mean = total.reshape(-1, self.group).mean(1) / self.group
        return mean.repeat_interleave(self.group)

    def _shifted(self, x: Tensor, by: int) -> Tensor:
        """Return the images (B, C, H, W), each replaced by the one `by` places on in its group."""
        return x.unflatten(0, (-1, self.group)).roll(by, 1).flatten(0, 1)


def jump(net: nn.Module, points: Points, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return x at level s, on the straight line from x (B, C, H, W) at t (B,) to where `net` aims: DDIM's step."""
    aim = call(net, points, x, t, s)
    return aim + expand(s / t, x) * (x - aim)


def moments(nets: Nets, points: Points) -> Moments:
    """Jumps from x_t to s must have the law of the jumps from x_r to s, r between them (Zhou et al. 2025, Eq. 12).

    x_t and x_r share image and noise. The kernel's width is D |c_out(s, t)|, with D the number of values and
    c_out(s, t) the factor of the raw network in the jump. Like the distances of samples it scales with the coordinates,
    so that noise-level coordinates serve as well as the flow's.
    """
    t, r, s = points.times
    student: Any = nets.student
    with torch.no_grad():
        x_r = points.solver(points.denoise, points.x_t, t, r)
        target = jump(nets.target, points, x_r, r, s)
    # Where rounding makes s = t, the samples are the same whatever the network says.
    span = (1 - s / t).clamp_min(1e-6) * student.parameterization.coefficients(t).c_out.abs()
    return Moments(jump(student, points, points.x_t, t, s), target, points.group, span * points.x_t[0].numel())
