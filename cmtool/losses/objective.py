"""The composition: draw, couple, noise, predict, measure, weigh. Once, top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cmtool.config.parts import CouplingPart, GapPart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import VarianceExploding
from cmtool.losses.coupling import Coupling, chosen
from cmtool.losses.direction import Direction
from cmtool.losses.distance import Distance
from cmtool.losses.draw import Draw, Nets, Slice
from cmtool.losses.target import Points, Solver, TargetRule
from cmtool.losses.weighting import Weighting
from cmtool.rng import batch_normal, batch_uniform, derive, moved
from cmtool.schedules.curriculum import CurriculumState, mix_at
from cmtool.schedules.density import LevelDensity
from cmtool.schedules.times import Uniforms, draw_times


@dataclass(frozen=True)
class Loss:
    """One number an image: `weighted` (B,) to be averaged and descended, `distance` (B,) without weights, `t` (B,)."""

    weighted: Tensor
    distance: Tensor
    t: Tensor


@dataclass(frozen=True)
class Objective:
    """A method as its parts; see the module docstrings of each part for what it may be."""

    process: VarianceExploding
    settings: ProcessConfig
    times: TimesPart
    gap: GapPart
    coupling: Coupling
    direction: Direction
    solver: Solver
    target: TargetRule
    distance: Distance
    weighting: Weighting
    dropout: bool = False
    mix: CouplingPart = field(default_factory=CouplingPart)
    density: LevelDensity | None = None

    def draw(self, x0: Tensor, label: Tensor | None, state: CurriculumState, rows: Slice) -> Draw:
        """Return noise z like x0 and times (t, r) (B,) in x0's dtype, as functions of the rows' global index."""
        count = len(x0)
        shape = (rows.total, *x0.shape[1:])
        z = batch_normal(
            shape, rows.seed, "noise", rows.step, start=rows.start, count=count, device=x0.device, dtype=x0.dtype
        )
        numbers = self.uniforms(count, rows)
        t, r = draw_times(self.times, self.gap, numbers, self.settings, state.num_scales, state.stage, self.density)
        mix = mix_at(self.mix, state.step, state.steps)
        t, r = (moved(times, x0.device, x0.dtype) for times in (t, r))
        return Draw(x0, z, t, r, label, mix, rows)

    def uniforms(self, count: int, rows: Slice) -> Uniforms:
        """Return the uniform numbers of `count` images, and their places in the global batch."""
        shape = (rows.total,)
        first = batch_uniform(shape, rows.seed, "times", rows.step, start=rows.start, count=count)
        second = batch_uniform(shape, rows.seed, "second-times", rows.step, start=rows.start, count=count)
        rank = (torch.arange(rows.start, rows.start + count, dtype=torch.float64) + 0.5) / rows.total
        return Uniforms(first, second, rank)

    def __call__(self, nets: Nets, x0: Tensor, label: Tensor | None, state: CurriculumState, rows: Slice) -> Loss:
        """Return the loss of the images x0 (B, C, H, W) in [-1, 1] with labels (B,), at rows `rows` of the batch."""
        return self.look(nets, self.drawn(nets, x0, label, state, rows), state.step / max(state.steps, 1))

    @property
    def generates(self) -> bool:
        """Whether the coupling asks a network for images."""
        return self.mix.kind == "generator"

    def drawn(self, nets: Nets, x0: Tensor, label: Tensor | None, state: CurriculumState, rows: Slice) -> Draw:
        """Return all that a processor decides of a pass; images and noise are coupled unless a network makes images."""
        draw = self.draw(x0, label, state, rows)
        if not self.generates:
            return self.coupling(nets, draw)
        return replace(draw, made=chosen(draw)) if draw.mix else draw

    def look(self, nets: Nets, draw: Draw, share: float | Tensor) -> Loss:
        """Return the loss of what was drawn, with `share` of the run done: from here on networks look at it.

        On a GPU nothing in here needs the processor but the seed of dropout's masks.
        """
        draw = self.coupling(nets, draw) if self.generates else draw
        t, r, rows = draw.t, draw.r, draw.rows
        x_t = self.process.noised(draw.x0, draw.z, t)
        seed = derive(rows.seed, "dropout", rows.step, rows.start) if self.dropout else None
        denoise = self.direction(nets, draw.x0, draw.label)
        points = Points(draw.x0, draw.z, x_t, t, r, draw.label, denoise, self.solver, seed, share)
        distance = self.target(nets, points).measure(self.distance)
        return Loss(self.weighting(distance, t, r, nets.student), distance.detach(), t)
