"""`--diagnose`: the discrepancy R and the transport cost of a run's coupling and model, measured while it trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cmtool.files.atomic import writing
from cmtool.losses.diagnose import Discrepancy, diagnose
from cmtool.losses.terms import Nets
from cmtool.schedules.curriculum import mix_at

if TYPE_CHECKING:
    from cmtool.training.loop import Trainer

# Called with the step and what was measured at each noise level.
Diagnosed = Callable[[int, Sequence[Discrepancy]], None]
# Number of images to measure with: several times an image's number of values, or the linear guess would fit noise.
LEAST, MOST, PER_VALUE = 512, 8192, 8
# Limit on the numbers held at once, so large images are fewer.
NUMBERS = 2**24
FILE = "discrepancy.jsonl"


class Diagnosis:
    """Measures a trainer's objective at its step and appends one row to `discrepancy.jsonl` of the run folder.

    `told` is called with the step and what was measured.
    """

    def __init__(self, trainer: Trainer, folder: Path, told: Diagnosed | None = None) -> None:
        self.trainer, self.told = trainer, told
        self.path = folder / FILE
        dataset = trainer.dataset
        first, labels = dataset.batch(torch.arange(1))
        values = first[0].numel()
        wanted = min(max(PER_VALUE * values, LEAST), MOST, max(NUMBERS // values, 64))
        # A small data set is used several times, with different noise.
        chosen = torch.arange(wanted) % len(dataset)
        images, labels = dataset.batch(chosen)
        self.images = images.to(trainer.device, trainer.dtype)
        keep = trainer.config.data.labels and labels is not None
        self.label = labels.to(trainer.device) if keep and labels is not None else None

    def measure(self) -> list[Discrepancy]:
        """Return one entry per noise level, for the coupling at its present mix and the sampling average."""
        trainer, state = self.trainer, self.trainer.state
        nets = Nets(state.student, state.target, state.ema, trainer.nets.teacher, trainer.nets.frozen)
        mix = mix_at(trainer.objective.mix, state.course.at(state.step), trainer.config.train.steps)
        seed, batch = trainer.config.train.seed, min(trainer.micro, trainer.config.train.batch_size)
        return diagnose(nets, trainer.objective.coupling, self.images, self.label, mix=mix, seed=seed, batch=batch)

    def __call__(self) -> None:
        """Measure, append the entries and tell them."""
        step, found = self.trainer.state.step, self.measure()
        row = {"step": step, "levels": [entry.row() for entry in found]}
        with writing(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if self.told is not None:
            self.told(step, found)
