"""One picture's edits: the loop of `editing.loop` on the model, or on windows of it, with a class that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmtool.editing.latent import in_latents
from cmtool.editing.levels import EditPlan
from cmtool.editing.loop import Edited, denoise, edit_best
from cmtool.editing.subject import Subject
from cmtool.editing.tasks import Task
from cmtool.editing.windows import Windowed
from cmtool.errors import UserError
from cmtool.models import Model
from cmtool.samplers.generate import streams_for, to_pictures

# A class is chosen by this many edits with each; with more classes than MOST_CLASSES the null class is taken.
TRIALS, MOST_CLASSES = 4, 100
# Variations made at once, and the values (channels x pixels) that they may have together: 64 MiB a tensor.
BATCH, MOST_VALUES = 64, 1 << 24


class Editor:
    """Edits one prepared picture with one model.

    Args:
        task: the edit.
        plan: its noise levels; a variation is the most consistent of its candidates.
        model: a consistency model.
        subject: the picture.
        label: the class; None: the one that fits best.
        metric: "l2" or "lpips": what variations are compared by.
    """

    def __init__(
        self, task: Task, plan: EditPlan, model: Model, subject: Subject, label: int | None = None, metric: str = "l2"
    ) -> None:
        self._given = subject
        subject = subject if model.latent is None else in_latents(subject, model.latent)
        self.subject, self._task, self._plan, self._model, self._label = subject, task, plan, model, label
        self._y = subject.y.to(model.device, streams_for(model, [0]).dtype)
        self._operator = subject.operator(self._y)
        shape = (int(self._y.shape[1]), int(self._y.shape[2]), int(self._y.shape[3]))
        self._view = Windowed(model, shape) if shape != model.image_shape else model
        self._perceptual = _lpips() if metric == "lpips" else None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the model's classes, where it has some."""
        return self._model.header["data"].get("class_names")

    @property
    def batch_size(self) -> int:
        """How many variations to make at once: fewer of a photo that is edited at its own size."""
        return min(BATCH, max(1, MOST_VALUES // self._y.numel()))

    def choose_label(self) -> tuple[int | None, bool]:
        """Return the class asked for, else the one whose edits agree best with what is known, and if it was searched.

        None is no class. The same noise is used for every class, so that only the class differs.
        """
        classes = self._model.num_classes
        if classes is None or self._label is not None:
            return self._label, False
        # Windows see different things, so that no class fits them all: a model that knows the null class gets that.
        several = isinstance(self._view, Windowed) and self._model.header.get("label_dropout")
        if classes > MOST_CLASSES or several:
            return None, False
        seeds = list(range(TRIALS))
        times = self._plan.class_times
        misfits = [self._edited(seeds, label, 1, times)[1].mean().item() for label in range(classes)]
        return min(range(classes), key=misfits.__getitem__), True

    def run(self, seeds: Sequence[int], label: int | None) -> tuple[Tensor, Tensor]:
        """Return legal edits (B, C, H, W), one for each seed, and how inconsistent each is (B,); both on the CPU."""
        image, _, distance = self._edited(seeds, label, self._plan.candidates, self._plan.times)
        return self.subject.legal(to_pictures(self._model, image).float().cpu()), distance.cpu()

    def _edited(
        self, seeds: Sequence[int], label: int | None, candidates: int, times: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self._y.expand(len(seeds), *self._y.shape[1:])
        labels = None if label is None else torch.full((len(seeds),), label, device=y.device)
        if self._task.levels == "noise":
            answer = denoise(self._view, y, times[0], labels)
            misfit = (answer - y).square().flatten(1).mean(1)
            return answer, misfit, misfit
        made = edit_best(
            self._view,
            self._operator,
            y,
            seeds,
            times,
            labels,
            candidates=candidates,
            clamp=self._model.clamps,
            guidance=self._plan.guidance,
            fresh=self._plan.fresh,
        )
        if not self._operator.knows:
            misfit = (made.answer - y).square().flatten(1).mean(1)
            return made.image, misfit, misfit
        return made.image, made.misfit, self._inconsistency(made)

    def _inconsistency(self, made: Edited) -> Tensor:
        """How far the model's last answer misses what is known: (B,), root mean square, or LPIPS of pixels."""
        if self._perceptual is None:
            return made.residual.sqrt()
        answer = to_pictures(self._model, made.answer)
        y = self._given.y.to(answer).expand_as(answer)
        known = self._given.operator(y)
        return self._perceptual(known.start(answer), known.start(y))


def _lpips() -> Callable[[Tensor, Tensor], Tensor]:
    from cmtool.config.parts import DistancePart
    from cmtool.losses.perceptual import build_lpips

    try:
        return build_lpips(DistancePart(kind="lpips")).between
    except UserError as error:
        raise type(error)(error.message, "--metric l2 compares without it") from None
