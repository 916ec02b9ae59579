"""The composition: draw, couple, noise, predict, compare, weigh. Once, top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cmtool.config.parts import CouplingPart, GapPart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import VarianceExploding
from cmtool.diffusion.solvers import Step
from cmtool.errors import ConfigError
from cmtool.losses.coupling import Coupling
from cmtool.losses.direction import Direction
from cmtool.losses.distance import Distance
from cmtool.losses.terms import Draw, Nets, Points, Slice
from cmtool.losses.weighting import Weighting
from cmtool.models import beside
from cmtool.rng import batch_normal, batch_uniform, derive, moved
from cmtool.schedules.curriculum import CurriculumState, mix_at
from cmtool.schedules.times import LevelDensity, Uniforms, draw_times


class Comparison(Protocol):
    """What a target rule returns: something that a distance can be taken of."""

    def measure(self, distance: Distance) -> Tensor:
        """Return one number per image, (B,), whose gradient is the rule's."""


TargetRule = Callable[[Nets, Points], Comparison]


@dataclass(frozen=True)
class Pair:
    """A prediction with gradient and the value it must reach, both (B, C, H, W)."""

    prediction: Tensor
    target: Tensor

    def measure(self, distance: Distance) -> Tensor:
        """The distance between the two."""
        return distance.between(self.prediction, self.target)


@dataclass(frozen=True)
class Slope:
    """A value f and its derivative along the flow, which must vanish, both (B, C, H, W)."""

    value: Tensor
    tangent: Tensor
    stop_gradient: bool

    def measure(self, distance: Distance) -> Tensor:
        """The local form of the distance at the tangent (Song et al. 2023, Theorems 3 and 4).

        With a stop-gradient the gradient is that of f^T H(f) df/dt with the right half held fixed (Theorems 5 and 6).
        That product measures nothing by itself, so the number reported is still the local form.
        """
        if not self.stop_gradient:
            return distance.form(self.value, self.tangent)
        at, along = self.value.detach(), self.tangent.detach()
        surrogate = (self.value * distance.pull(at, along)).flatten(1).sum(1)
        return distance.form(at, along).detach() + (surrogate - surrogate.detach())


@dataclass(frozen=True)
class Loss:
    """One number an image: `weighted` (B,) to be averaged and descended, `distance` (B,) without weights, `t` (B,).

    `fake` (B,) is the loss of the fake network, where there is one; the weights of the two have no gradient in common.
    """

    weighted: Tensor
    distance: Tensor
    t: Tensor
    fake: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A method as its parts; the module of each part says what it may be.

    A pass has two halves. `draw` settles everything that the processor decides; `loss` calls the networks. On a GPU
    nothing in `loss` waits for the processor, apart from the seed of the dropout masks.
    """

    process: VarianceExploding
    settings: ProcessConfig
    times: TimesPart
    gap: GapPart
    coupling: Coupling
    direction: Direction
    solver: Step
    target: TargetRule
    distance: Distance
    weighting: Weighting
    dropout: bool = False
    mix: CouplingPart = field(default_factory=CouplingPart)
    density: LevelDensity | None = None
    middle: Callable[[tuple[Tensor, ...], float, Slice], tuple[Tensor, ...]] | None = None
    guidances: Callable[[tuple[Tensor, ...], Slice], Tensor] | None = None

    def draw(
        self, x0: Tensor, label: Tensor | None, now: CurriculumState, rows: Slice, augment: Tensor | None = None
    ) -> Draw:
        """Return what a pass over `rows` of the global batch starts from; noise and times depend only on the rows.

        Args:
            x0: images (B, C, H, W) in [-1, 1].
            label: (B,), or None.
            now: the scheduled numbers of the step.
            rows: the place of x0 in the global batch.
            augment: (B, L), how the images were augmented, or None.
        """
        count, shape = len(x0), (rows.total, *x0.shape[1:])
        z = batch_normal(
            shape, rows.seed, "noise", rows.step, start=rows.start, count=count, device=x0.device, dtype=x0.dtype
        )
        group = self.times.group
        numbers = uniforms(count, rows, group)
        share = now.step / max(now.steps, 1)
        drawn = draw_times(self.times, self.gap, numbers, self.settings, now.num_scales, now.stage, self.density)
        times = drawn if self.middle is None else self.middle(drawn, share, rows)
        levels = tuple(moved(time, x0.device, x0.dtype) for time in times)
        mix = mix_at(self.mix, now.step, now.steps)
        guidance = None if self.guidances is None else self.guidances(levels, rows)
        told = {"augment": augment, "guidance": guidance}
        return self.coupling.meet(Draw(x0, z, levels, label, mix, rows, group, share=share, **told))

    def loss(self, nets: Nets, draw: Draw) -> Loss:
        """Return the loss of a draw: here the networks run."""
        with beside(draw.condition):
            draw, nets = self.coupling.generate(nets, draw), nets.told(draw.guidance)
            rows = draw.rows
            x_t = self.process.noised(draw.x0, draw.z, draw.t)
            seed = derive(rows.seed, "dropout", rows.step, rows.start) if self.dropout else None
            denoise = self.direction(nets, draw.x0, draw.label, draw.augment)
            settled = (draw.share, draw.group, draw.augment)
            points = Points(draw.x0, draw.z, x_t, draw.times, draw.label, denoise, self.solver, seed, *settled)
            distance = self.target(nets, points).measure(self.distance)
            return Loss(self.weighting(distance, draw.t, draw.r, nets.student), distance.detach(), draw.t)


def uniforms(count: int, rows: Slice, group: int = 1) -> Uniforms:
    """Return the uniform numbers of `count` images, alike for `group` neighbors, and their places in the global batch.

    Raises:
        ConfigError: for rows that hold a part of a group.
    """
    if rows.start % group or count % group:
        raise ConfigError(f"a forward pass of {count} images from row {rows.start} splits groups of {group}.")
    shape = (rows.total,)
    first = batch_uniform(shape, rows.seed, "times", rows.step, start=rows.start, count=count)
    second = batch_uniform(shape, rows.seed, "second-times", rows.step, start=rows.start, count=count)
    rank = (torch.arange(rows.start, rows.start + count, dtype=torch.float64) + 0.5) / rows.total
    if group > 1:
        first, second = (numbers[::group].repeat_interleave(group) for numbers in (first, second))
    return Uniforms(first, second, rank)
