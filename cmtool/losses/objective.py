"""The composition: draw, couple, noise, predict, measure, weigh. Once, top to bottom."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmtool.config.parts import GapPart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import VarianceExploding
from cmtool.losses.coupling import Coupling
from cmtool.losses.direction import Direction
from cmtool.losses.distance import Distance
from cmtool.losses.target import Nets, Points, Solver, TargetRule
from cmtool.losses.weighting import Weighting
from cmtool.rng import batch_normal, batch_uniform, derive
from cmtool.schedules.curriculum import CurriculumState
from cmtool.schedules.times import draw_times


@dataclass(frozen=True)
class Slice:
    """Rows `start` .. `start + len(x0)` of a global batch of `total` images: what one forward pass sees."""

    seed: int
    step: int
    start: int
    total: int


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

    def draw(self, x0: Tensor, state: CurriculumState, rows: Slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise z like x0 and times (t, r) (B,) in x0's dtype, as functions of the rows' global index."""
        count = len(x0)
        shape = (rows.total, *x0.shape[1:])
        place = {"start": rows.start, "count": count, "device": x0.device}
        z = batch_normal(shape, rows.seed, "noise", rows.step, dtype=x0.dtype, **place)
        u = batch_uniform((rows.total,), rows.seed, "times", rows.step, start=rows.start, count=count)
        t, r = draw_times(self.times, self.gap, u, self.settings, state.num_scales, state.stage)
        return z, t.to(x0.device, x0.dtype), r.to(x0.device, x0.dtype)

    def __call__(self, nets: Nets, x0: Tensor, label: Tensor | None, state: CurriculumState, rows: Slice) -> Loss:
        """Return the loss of the images x0 (B, C, H, W) in [-1, 1] with labels (B,), at rows `rows` of the batch."""
        z, t, r = self.draw(x0, state, rows)
        x0, z = self.coupling(x0, z)
        x_t = self.process.noised(x0, z, t)
        seed = derive(rows.seed, "dropout", rows.step, rows.start) if self.dropout else None
        points = Points(x0, z, x_t, t, r, label, self.direction(x0, label), self.solver, seed)
        prediction, target = self.target(nets, points)
        distance = self.distance(prediction, target)
        return Loss(self.weighting(t, r) * distance, distance.detach(), t)
