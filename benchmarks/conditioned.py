"""Answers of models that see a picture (`data.condition`), to be judged beside the edits of `editing_quality.py`.

Both are asked the same: what the face was of which a gray or a small picture is left. An edit keeps that picture by
projection; a conditioned model has only learned to, so `kept` says how well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmtool.config.condition import Condition, parse_condition
from cmtool.data.condition import derived
from cmtool.models import Model
from cmtool.samplers.generate import sample_batch
from cmtool.samplers.plan import plan_sampling

# The tasks of `editing_quality.py` whose known part is a condition.
SAME = {"colorize": "gray", "superres2": "superres:2", "superres4": "superres:4"}


def condition_of_task(task: str, truth: Tensor) -> Condition | None:
    """Return the condition that an edit of pictures (B, C, H, W) is given as its known part; None if it is no such."""
    return parse_condition(SAME[task], truth.shape[1], truth.shape[-1]) if task in SAME else None


def refusal(model: Model, truth: Tensor) -> str | None:
    """Say why a model cannot answer for pictures (B, C, H, W); None if it can."""
    if model.condition is None or not model.condition.is_derived:
        return "sees no picture that is computed from the image (data.condition = superres:N, gray or edges)"
    if model.image_shape != truth.shape[1:]:
        return f"makes images of shape {model.image_shape}, and these have {tuple(truth.shape[1:])}"
    return None


def answers(model: Model, truth: Tensor, steps: int, seeds: Sequence[Sequence[int]]) -> Tensor:
    """Return samples (N, B, C, H, W) in [-1, 1] for the conditions that training makes of pictures (B, C, H, W).

    Args:
        model: a conditioned one that `refusal` lets pass.
        truth: the pictures, in [-1, 1].
        steps: evaluations of each sample, at the levels that the model's header has for them.
        seeds: N times one for each picture.
    """
    assert model.condition is not None
    plan, shown = plan_sampling(model.header, steps=steps), derived(truth, model.condition)
    return torch.stack([sample_batch(model, plan, some, conditions=lambda _: shown).x0 for some in seeds])


def kept(made: Tensor, truth: Tensor, condition: Condition) -> float:
    """Mean absolute error, in levels of bytes, between the condition of answers (N, B, C, H, W) and that of `truth`."""
    wrong = derived(made.flatten(0, 1), condition).unflatten(0, made.shape[:2]) - derived(truth, condition)
    return float(wrong.abs().mean() * 127.5)
