"""Score distillation: the model's samples against two denoisers, the teacher and the one of the samples' own law.

At a noised sample x_t = x + t z the teacher answers T = E[x0 | x_t] under the law of the data, the fake network
F = E[x0 | x_t] under the law of the model's samples: (T - F) / t^2 is the difference of the two scores. The gradient
that reaches the samples is taken here and handed on to the model that made them, so that neither denoiser's weights
take part in it. From the same samples, made once, the fake network learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmtool.config.parts import ScorePart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import expand
from cmtool.errors import ConfigError
from cmtool.losses.distance import l2
from cmtool.losses.objective import Loss, Objective
from cmtool.losses.terms import Draw, Nets, Slice
from cmtool.losses.weighting import karras
from cmtool.rng import batch_normal, batch_uniform, moved
from cmtool.schedules.curriculum import CurriculumState
from cmtool.schedules.times import draw_lognormal

# No image weighs more than one that the teacher misses by this much on average.
LEAST = 1e-5


class Pull(NamedTuple):
    """What two denoisers make of samples: the loss (B,), its gradient (B, C, H, W), and the mean of (T - F)^2 (B,)."""

    loss: Tensor
    gradient: Tensor
    distance: Tensor


# From samples (B, C, H, W) to T and F at their noised form.
Both = Callable[[Tensor], tuple[Tensor, Tensor]]
Rule = Callable[[Tensor, Both], Pull]


def miss(x: Tensor, real: Tensor) -> Tensor:
    """The teacher's mean absolute error of each sample (B,), by which its loss is divided."""
    return (x - real).detach().abs().flatten(1).mean(1).clamp_min(LEAST)


def build_sid(alpha: float) -> Rule:
    """The loss (1 - alpha) |T - F|^2 + (T - F)^T (F - x) of a sample, divided by its `miss`.

    Its gradient goes through both denoisers to the sample. Source: Zhou et al. 2024 (SiD), Eq. 23 and Algorithm 1.
    """

    def sid(x: Tensor, both: Both) -> Pull:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            teacher, own = both(x)
            apart = teacher - own
            loss = (apart * (teacher - x - alpha * apart)).flatten(1).sum(1) / miss(x, teacher)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return Pull(loss.detach(), gradient, l2(teacher, own).detach())

    return sid


@torch.no_grad()
def dmd(x: Tensor, both: Both) -> Pull:
    """The gradient F - T of a sample, divided by its `miss`; no gradient goes through the denoisers.

    Source: Yin et al. 2024 (DMD), Eq. 7 and 8: the loss is half the square by which a sample is to move.
    """
    teacher, own = both(x)
    move = (own - teacher) / expand(miss(x, teacher), x)
    return Pull((move**2).flatten(1).sum(1) / 2, move, l2(teacher, own))


@dataclass(frozen=True)
class ScoreDraw(Draw):
    """A draw, and what its samples are made from.

    `starts` is unit noise (B, C, H, W) for each noise level that samples are made at, `at` (B,) the index of the level
    of each image's sample, `probe` and `lesson` are the unit noise and noise level (B,) at which a sample is compared
    and at which the fake network learns from it.
    """

    starts: tuple[Tensor, ...] = ()
    at: Tensor | None = None
    probe: tuple[Tensor, ...] = ()
    lesson: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScoreObjective(Objective):
    """Samples of the model, pulled by `rule`, plus the recipe's other parts with the weight `part.keep`.

    Samples are made at `levels`; `teacher_process` holds the teacher's range of noise levels.
    """

    part: ScorePart
    rule: Rule
    levels: tuple[float, ...]
    teacher_process: ProcessConfig

    def draw(
        self, x0: Tensor, label: Tensor | None, now: CurriculumState, rows: Slice, augment: Tensor | None = None
    ) -> ScoreDraw:
        """Return what a pass starts from; arguments as in `Objective.draw`, of whose images only the shape counts."""
        z, t = self._probe(x0, rows)
        kept = self.keeps(rows)
        other = super().draw(x0, label, now, rows, augment) if kept else Draw(x0, z, (t,), label, 0.0, rows)
        given = {entry.name: getattr(other, entry.name) for entry in fields(Draw)}
        return ScoreDraw(**given, **self._starts(x0, rows), probe=(z, t), lesson=self._lesson(x0, rows))

    def loss(self, nets: Nets, draw: Draw) -> Loss:
        """Return the losses of model and fake network."""
        assert isinstance(draw, ScoreDraw)
        x, level = self.samples(nets.student, draw)
        fake = self._learn(nets, x.detach(), level, draw)
        z, t = draw.probe
        teacher = self.direction(nets, x, draw.label)

        def both(sample: Tensor) -> tuple[Tensor, Tensor]:
            x_t = self.process.noised(sample, z, t)
            return teacher(x_t, t), _fake(nets)(x_t, t, draw.label, *self._told(level))

        pull = self.rule(x.detach(), both)
        carrier = (x * pull.gradient).flatten(1).sum(1)
        weighted = pull.loss + (carrier - carrier.detach())
        if self.keeps(draw.rows):
            weighted = weighted + self.part.keep * self.part.keep_every * super().loss(nets, draw).weighted
        return Loss(weighted, pull.distance, t, fake)

    def keeps(self, rows: Slice) -> bool:
        """Whether the step of these rows includes the recipe's other parts."""
        return self.part.keep > 0 and rows.step % self.part.keep_every == 0

    def follow(self, nets: Nets, x0: Tensor, label: Tensor | None, rows: Slice) -> Tensor:
        """Return the loss (B,) of the fake network alone, on samples that the model does not learn from.

        `rows` need a seed of their own; `x0` gives the samples' shape.
        """
        lesson = self._lesson(x0, rows)
        draw = ScoreDraw(x0, lesson[0], lesson[1:], label, 0.0, rows, **self._starts(x0, rows), lesson=lesson)
        with torch.no_grad():
            x, level = self.samples(nets.student, draw)
        return self._learn(nets, x, level, draw)

    def samples(self, student: nn.Module, draw: ScoreDraw) -> tuple[Tensor, Tensor]:
        """Return the model's samples (B, C, H, W) and the noise level (B,) that it made each from.

        Those of a later level start from its own answers at the levels before (backward simulation, DMD2), to which no
        gradient goes.
        """
        first, *later = self.levels
        x, level = first * draw.starts[0], torch.full_like(draw.starts[0][:, 0, 0, 0], first)
        for number, (target, noise) in enumerate(zip(later, draw.starts[1:], strict=True), start=1):
            assert draw.at is not None
            with torch.no_grad():
                there = torch.full_like(level, target)
                below = self.process.renoise(student(x, level, draw.label), noise, there)
            on = draw.at >= number
            x, level = torch.where(expand(on, x), below, x), torch.where(on, there, level)
        return student(x, level, draw.label), level

    def _learn(self, nets: Nets, x: Tensor, level: Tensor, draw: ScoreDraw) -> Tensor:
        """EDM's denoising loss (B,) of the fake network on samples."""
        z, t = draw.lesson
        answer = _fake(nets)(self.process.noised(x, z, t), t, draw.label, *self._told(level))
        return karras(t, t, self.teacher_process) * l2(answer, x)

    def _told(self, level: Tensor) -> tuple[Tensor, ...]:
        """Return the fake network's extra arguments: the level of each sample, if there are several."""
        return (level,) if len(self.levels) > 1 else ()

    def _starts(self, x0: Tensor, rows: Slice) -> dict[str, Any]:
        starts = tuple(_normal(x0, rows, f"start-{number}") for number in range(len(self.levels)))
        at = torch.arange(rows.start, rows.start + len(x0)) % len(self.levels)
        return {"starts": starts, "at": moved(at, x0.device)}

    def _probe(self, x0: Tensor, rows: Slice) -> tuple[Tensor, ...]:
        """Noise, and levels that are uniform in t^(1/rho) within the part's reach."""
        process = self.teacher_process
        low, high = process.sigma_min ** (1 / process.rho), process.sigma_max ** (1 / process.rho)
        first, last = (low + share * (high - low) for share in self.part.reach)
        t = (first + (last - first) * _uniform(x0, rows, "probe")) ** process.rho
        return _normal(x0, rows, "probe"), moved(t, x0.device, x0.dtype)

    def _lesson(self, x0: Tensor, rows: Slice) -> tuple[Tensor, ...]:
        law = TimesPart(kind="lognormal", mean=self.part.fake_mean, std=self.part.fake_std)
        t = draw_lognormal(law, _uniform(x0, rows, "lesson"), self.teacher_process)
        return _normal(x0, rows, "lesson"), moved(t, x0.device, x0.dtype)


def _fake(nets: Nets) -> nn.Module:
    if nets.fake is None:
        raise ConfigError("score distillation needs a fake network, and there is none.")
    return nets.fake


def _normal(x0: Tensor, rows: Slice, what: str) -> Tensor:
    shape, keys = (rows.total, *x0.shape[1:]), (f"score-{what}", rows.step)
    return batch_normal(shape, rows.seed, *keys, start=rows.start, count=len(x0), device=x0.device, dtype=x0.dtype)


def _uniform(x0: Tensor, rows: Slice, what: str) -> Tensor:
    return batch_uniform((rows.total,), rows.seed, f"score-{what}-level", rows.step, start=rows.start, count=len(x0))


def build_rule(part: ScorePart) -> Rule:
    """Return the pull that `part` names."""
    return build_sid(part.alpha) if part.kind == "sid" else dmd
