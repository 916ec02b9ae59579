"""The learning rate as a function of the share of the run that is done."""

from __future__ import annotations

import math

from cmtool.config.schema import RunConfig, TrainConfig
from cmtool.schedules.curriculum import halving_span


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
