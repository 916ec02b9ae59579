"""Curricula: the number of grid points N(k), the target's decay mu(k), the stage of a ratio map, the learning rate.

All are functions of the step k of K; none keeps state, so a resumed run cannot drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cmtool.config.parts import CouplingPart, CurriculumPart, GapPart, TargetPart
from cmtool.config.schema import RunConfig, TrainConfig


def num_scales_sqrt(step: int, steps: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1 points (Song et al. 2023, Appendix C), at least 2."""
    share = min(step, steps) / steps
    intervals = math.ceil(math.sqrt(share * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)
    return max(intervals, 1) + 1


def num_scales_doubling(step: int, steps: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1 points, K' = floor(K / (log2 floor(s1/s0) + 1)) (iCT, Eq. 10)."""
    stage_length = max(math.floor(steps / (math.log2(math.floor(s1 / s0)) + 1)), 1)
    return min(s0 * 2 ** (min(step, steps) // stage_length), s1) + 1


def num_scales_halving(step: int, steps: int, s0: int, s1: int) -> int:
    """Progressive distillation: intervals s0, s0/2, ... down to s1, plus 1; the last two stages last twice as long.

    This is the schedule of the paper's baseline (Song et al. 2023, Appendix C): 4096, ..., 4, then 2 and 1.
    """
    starts = halving_starts(steps, s0, s1)
    stage = sum(min(step, steps) >= start for start in starts[1:])
    return max(s0 // 2**stage, s1) + 1


def halving_starts(steps: int, s0: int, s1: int) -> list[int]:
    """Return the first step of every stage of progressive distillation."""
    stages = max(math.floor(math.log2(s0 / s1)), 0) + 1
    lengths = [2 if stage >= stages - 2 else 1 for stage in range(stages)]
    return [-(-sum(lengths[:stage]) * steps // sum(lengths)) for stage in range(stages)]


def halving_span(part: CurriculumPart, step: int, steps: int) -> tuple[int, int]:
    """Return the first step of the stage that `step` is in, and the first step after it."""
    starts = [*halving_starts(steps, part.s0, part.s1), steps]
    first = max(start for start in starts[:-1] if start <= step)
    return first, min(start for start in starts if start > step)


def num_scales(part: CurriculumPart, step: int, steps: int) -> int:
    """Return N at `step` of `steps`: grid points, at least 2."""
    if part.scales == "fixed":
        return part.s1
    if part.scales == "sqrt":
        return num_scales_sqrt(step, steps, part.s0, part.s1)
    progressive = {"doubling": num_scales_doubling, "halving": num_scales_halving}[part.scales]
    return progressive(step, steps, part.s0, part.s1)


def target_decay(part: TargetPart, curriculum: CurriculumPart, points: int) -> float:
    """Return mu: fixed, or exp(s0 ln mu0 / M) with M = N - 1 as in the released code, or M = N as in the paper."""
    if not part.adaptive:
        return part.ema
    if part.ema == 0:
        return 0.0
    divisor = points if curriculum.form == "paper" else points - 1
    return math.exp(curriculum.s0 * math.log(part.ema) / divisor)


def ratio_stage(part: GapPart, step: int, steps: int) -> int:
    """Return the stage a = first .. first + stages - 1 of a ratio map (ECT): equal shares of the run."""
    return part.first + min(step * part.stages // max(steps, 1), part.stages - 1)


def mix_at(part: CouplingPart, step: int, steps: int) -> float:
    """Return mu, the share of images that the model itself makes: constant, or linear from `mix` to `mix_end`."""
    end = part.mix if part.mix_end is None else part.mix_end
    return part.mix + (end - part.mix) * min(step, steps) / max(steps, 1)


@dataclass(frozen=True)
class CurriculumState:
    """What a training step is told: where it is in the run, and every scheduled number."""

    step: int
    steps: int
    num_scales: int
    target_ema: float
    stage: int


def curriculum_at(
    curriculum: CurriculumPart, target: TargetPart, gap: GapPart, step: int, steps: int
) -> CurriculumState:
    """Return the scheduled numbers at `step` (0-based) of a run of `steps`."""
    points = num_scales(curriculum, step, steps)
    decay = target_decay(target, curriculum, points)
    if target.update == "stage":
        # Held within a stage; renewed by the update that follows the last step before N changes.
        decay = 1.0 if num_scales(curriculum, step + 1, steps) == points else 0.0
    return CurriculumState(step, steps, points, decay, ratio_stage(gap, step, steps))


def lr_factor(train: TrainConfig, step: int, span: tuple[int, int] | None = None) -> float:
    """Return the factor on `train.lr` for the 0-based `step`: linear warm-up, then the chosen decay to `decay_end`.

    The last step of a decayed run has the factor `decay_end` (plus one step's share), whatever the run's length; an
    inverse square root has no such end. `span` is (first, end) of the steps that count as the whole run.
    """
    first, end = span or (0, train.steps)
    step, steps = step - first, end - first
    warm = train.warmup * steps
    factor = min(1.0, (step + 1) / warm) if warm >= 1 else 1.0
    start = train.decay_start * steps
    if train.decay == "none" or step < start:
        return factor
    if train.decay == "inverse_sqrt":
        return factor * math.sqrt(max(start, 1) / max(step, start, 1))
    done = min((step - start) / max(steps - start, 1), 1.0)
    curve = 1 - done if train.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return factor * (train.decay_end + (1 - train.decay_end) * curve)


def span_at(config: RunConfig, step: int) -> tuple[int, int]:
    """Return (first, end) of the steps that a step's schedule spans: the run, or its stage if each starts over."""
    train = config.train
    if train.restart == "stage":
        return halving_span(config.recipe.curriculum, step, train.steps)
    return 0, train.steps


def rate_at(config: RunConfig, step: int) -> float:
    """Return the learning rate of a step."""
    return config.train.lr * lr_factor(config.train, step, span_at(config, step))
