"""One picture's edits: the loop of `editing.loop` on the model, or on windows of it, with a class that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmtool.editing.levels import class_times
from cmtool.editing.loop import Edited, denoise, edit_best
from cmtool.editing.tasks import Subject, operator_of
from cmtool.editing.windows import Windowed
from cmtool.errors import UserError
from cmtool.models import Model
from cmtool.samplers.generate import streams_for
from cmtool.samplers.plan import SamplePlan

# A class is chosen by this many edits with each; with more classes than MOST_CLASSES the null class is taken.
TRIALS, MOST_CLASSES = 4, 100
# Variations made at once, and the values (channels x pixels) that they may have together: 64 MiB a tensor.
BATCH, MOST_VALUES = 64, 1 << 24


@dataclass(frozen=True)
class Task:
    """An edit without its picture: what is done, at which noise levels, and how variations are compared.

    `label` is the class (None: the one that fits best), `metric` "l2" or "lpips"; a variation is the most consistent
    of `candidates`.
    """

    name: str
    plan: SamplePlan
    guidance: float = 0.0
    label: int | None = None
    metric: str = "l2"
    candidates: int = 1


class Editor:
    """Edits one prepared picture with one model."""

    def __init__(self, task: Task, model: Model, subject: Subject) -> None:
        self._task, self._model, self._subject = task, model, subject
        self._y = subject.y.to(model.device, streams_for(model, [0]).dtype)
        self._operator = operator_of(task.name, subject, self._y)
        shape = (int(self._y.shape[1]), int(self._y.shape[2]), int(self._y.shape[3]))
        self._view = Windowed(model, shape) if shape != model.image_shape else model
        self._perceptual = _lpips() if task.metric == "lpips" else None

    @property
    def batch_size(self) -> int:
        """How many variations to make at once: fewer of a photo that is edited at its own size."""
        return min(BATCH, max(1, MOST_VALUES // self._y.numel()))

    def choose_label(self) -> int | None:
        """Return the class asked for, else the one whose edits agree best with what is known; None: no class.

        The same noise is used for every class, so that only the class differs.
        """
        classes = self._model.num_classes
        if classes is None or self._task.label is not None:
            return self._task.label
        # Windows see different things, so that no class fits them all: a model that knows the null class gets that.
        several = isinstance(self._view, Windowed) and self._model.header.get("label_dropout")
        if classes > MOST_CLASSES or several:
            return None
        seeds = list(range(TRIALS))
        times = class_times(self._model.header, self._task.name, self._task.plan)
        misfits = [self._edited(seeds, label, 1, times)[1].mean().item() for label in range(classes)]
        return min(range(classes), key=misfits.__getitem__)

    def run(self, seeds: Sequence[int], label: int | None) -> tuple[Tensor, Tensor]:
        """Return legal edits (B, C, H, W), one for each seed, and how inconsistent each is (B,); both on the CPU."""
        image, _, distance = self._edited(seeds, label, self._task.candidates, self._task.plan.times)
        return self._subject.legal(image.float().cpu()), distance.cpu()

    def _edited(
        self, seeds: Sequence[int], label: int | None, candidates: int, times: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self._y.expand(len(seeds), *self._y.shape[1:])
        labels = None if label is None else torch.full((len(seeds),), label, device=y.device)
        if self._task.name == "denoise":
            answer = denoise(self._view, y, times[0], labels)
            misfit = (answer - y).square().flatten(1).mean(1)
            return answer, misfit, misfit
        guidance = self._task.guidance
        made = edit_best(self._view, self._operator, y, seeds, times, labels, candidates=candidates, guidance=guidance)
        if self._task.name == "stroke":
            misfit = (made.answer - y).square().flatten(1).mean(1)
            return made.image, misfit, misfit
        return made.image, made.misfit, self._inconsistency(made, y)

    def _inconsistency(self, made: Edited, y: Tensor) -> Tensor:
        """How far the model's last answer misses what is known: (B,), root mean square or LPIPS."""
        if self._perceptual is not None:
            return self._perceptual(self._operator.start(made.answer), self._operator.start(y))
        return made.residual.sqrt()


def _lpips() -> Callable[[Tensor, Tensor], Tensor]:
    from cmtool.config.parts import DistancePart
    from cmtool.losses.perceptual import build_lpips

    try:
        return build_lpips(DistancePart(kind="lpips")).between
    except UserError as error:
        raise type(error)(error.message, "--metric l2 compares without it") from None
