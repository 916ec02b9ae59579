"""The loop: batches in, reports out.

A step is a function of (configuration, step number, state): noise, times, dropout and data order come from the seed
and the step, so that a run that was killed and resumed ends with the same weights to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset
from cmtool.data.order import batch_indices, flip_mask
from cmtool.errors import DivergenceError
from cmtool.losses.objective import Objective, Slice
from cmtool.losses.target import Nets
from cmtool.models import Model
from cmtool.rng import batch_uniform
from cmtool.schedules.curriculum import CurriculumState, curriculum_at
from cmtool.schedules.learning_rate import lr_factor
from cmtool.training.distributed import World
from cmtool.training.state import TrainState
from cmtool.training.stopping import Stop

# Edges of the noise-level bands that reports break the distance down by.
BANDS = (0.02, 0.1, 0.5, 2.0, 10.0)
# Steps between two questions to the other processes whether anyone was told to stop.
AGREE_EVERY = 5


@dataclass(frozen=True)
class Report:
    """What happened over the steps since the last report; `step` counts finished steps."""

    step: int
    steps: int
    loss: float
    distance: float
    bands: dict[str, float]
    num_scales: int
    target_ema: float
    lr: float
    grad_norm: float
    images_per_s: float
    images_seen: int

    def row(self) -> dict[str, object]:
        """Return the row of `metrics.jsonl`."""
        return dict(self.__dict__)


@dataclass
class _Tally:
    """Losses since the last report, left on their device: reading one would wait for it."""

    losses: list[Tensor] = field(default_factory=list)
    distances: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    paused: float = field(default_factory=time.perf_counter)
    images: int = 0


def band_means(distance: Tensor, t: Tensor) -> dict[str, float]:
    """Mean distance (B,) for each band of noise levels t (B,) that has images in it."""
    edges = torch.tensor(BANDS, dtype=t.dtype, device=t.device)
    band = torch.bucketize(t, edges)
    names = [f"<{BANDS[0]:g}", *(f"<{edge:g}" for edge in BANDS[1:]), f">={BANDS[-1]:g}"]
    return {name: float(distance[band == i].mean()) for i, name in enumerate(names) if bool((band == i).any())}


class Trainer:
    """Runs an objective over a data set, from the state's step to the end of the run."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        objective: Objective,
        dataset: Dataset,
        teacher: Model | None = None,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.world = world or World()
        self.state = state
        self.objective = objective
        self.dataset = dataset
        self.device = state.student.device
        self.dtype = state.student.dtype
        self.nets = Nets(state.student, state.target, state.ema, teacher)
        self._tally = _Tally()
        self.stopped = False

    def curriculum(self) -> CurriculumState:
        """Return the scheduled numbers of the coming step."""
        recipe = self.config.recipe
        return curriculum_at(recipe.curriculum, recipe.target, recipe.gap, self.state.step, self.config.train.steps)

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return rows `start` .. of the step's batch: images in [-1, 1], and labels (-1 where dropped) or None."""
        train, step = self.config.train, self.state.step
        indices = batch_indices(train.seed, step, train.batch_size, len(self.dataset))[start : start + count]
        images, labels = self.dataset.batch(indices)
        if self.config.data.flip:
            flips = flip_mask(train.seed, step, train.batch_size)[start : start + count]
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        images = images.to(self.device, self.dtype, non_blocking=True)
        if not self.config.data.labels or labels is None:
            return images, None
        if train.label_dropout > 0:
            u = batch_uniform((train.batch_size,), train.seed, "label-dropout", step, start=start, count=count)
            labels = torch.where(u < train.label_dropout, torch.full_like(labels, -1), labels)
        return images, labels.to(self.device, non_blocking=True)

    def step(self) -> None:
        """Do one optimizer step.

        Raises:
            DivergenceError: if the loss is not finite; nothing has been updated then.
        """
        train, state = self.config.train, self.state
        now = self.curriculum()
        rate = train.lr * lr_factor(train, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        first, count = self.world.rows(train.batch_size)
        micro = train.micro_batch or max(count, 1)
        for start in range(first, first + count, micro):
            x0, label = self.batch(start, min(micro, first + count - start))
            rows = Slice(train.seed, state.step, start, train.batch_size)
            loss = self.objective(self.nets, x0, label, now, rows)
            total = loss.weighted.sum() / train.batch_size
            self._check(total)
            total.backward()
            self._record(loss.weighted.detach(), loss.distance, loss.t)
        self._agree()
        self._clip()
        state.optimizer.step()
        state.advance_averages(now.target_ema)
        state.step += 1

    def _check(self, loss: Tensor) -> None:
        # On a GPU reading the loss would stall the queue: there the report looks at all losses since the last one.
        # Among several processes one alone must not leave: the others would wait for it.
        if loss.device.type == "cpu" and self.world.size == 1 and not math.isfinite(loss.item()):
            self._diverged()

    def _agree(self) -> None:
        """Add up the gradients of all processes; on CPUs, stop together if any loss was not finite."""
        if self.world.size == 1:
            return
        if self.device.type == "cpu" and self.world.any(not self._finite(), self.device):
            self._diverged()
        self.world.sum_gradients(self.state.parameters())

    def _finite(self) -> bool:
        losses = self._tally.losses
        return not losses or bool(torch.isfinite(torch.cat(losses)).all())

    def _diverged(self) -> None:
        raise DivergenceError(
            f"the loss is not finite at step {self.state.step}; the last checkpoint is kept.",
            "try a smaller --set train.lr, a --set train.grad_clip=1.0, or --precision fp32",
        )

    def _record(self, weighted: Tensor, distance: Tensor, t: Tensor) -> None:
        tally = self._tally
        tally.losses.append(weighted)
        tally.distances.append(distance)
        tally.times.append(t)
        tally.images += len(t)

    def _clip(self) -> None:
        limit = self.config.train.grad_clip
        if limit is not None:
            norm = nn.utils.clip_grad_norm_(self.state.student.parameters(), limit)
            self._tally.norms.append(norm)

    def report(self) -> Report:
        """Sum up the steps since the last report and start anew.

        Raises:
            DivergenceError: if a loss among them was not finite.
        """
        tally, train = self._tally, self.config.train
        losses, distance, t = self._gathered()
        loss = float(losses.mean())
        if not math.isfinite(loss):
            self._diverged()
        seconds = max(time.perf_counter() - tally.started, 1e-9)
        self._tally = _Tally()
        done = self.state.step - 1
        recipe = self.config.recipe
        last = curriculum_at(recipe.curriculum, recipe.target, recipe.gap, done, train.steps)
        return Report(
            step=self.state.step,
            steps=train.steps,
            loss=loss,
            distance=float(distance.mean()),
            bands=band_means(distance, t),
            num_scales=last.num_scales,
            target_ema=last.target_ema,
            lr=train.lr * lr_factor(train, done),
            grad_norm=float(torch.stack(tally.norms).mean()) if tally.norms else math.nan,
            images_per_s=tally.images * self.world.size / seconds,
            images_seen=self.state.step * train.batch_size,
        )

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses, distances and times since the last report, of all processes."""
        tally = self._tally
        mine = [torch.cat(tally.losses), torch.cat(tally.distances).float(), torch.cat(tally.times)]
        if self.world.size > 1:
            parts = self.world.gather([tensor.cpu() for tensor in mine])
            mine = [torch.cat(columns) for columns in zip(*parts, strict=True)]
        return mine[0], mine[1], mine[2]

    def check_finite(self) -> None:
        """Look at the losses since the last report.

        Raises:
            DivergenceError: if one of them was not finite.
        """
        if self.world.any(not self._finite(), self.device):
            self._diverged()

    def restart_clock(self) -> None:
        """Leave what happened since the last step (saving, sampling) out of the measured speed."""
        self._tally.started += time.perf_counter() - self._tally.paused

    def run_to(self, step: int, stop: Stop | None = None) -> None:
        """Train until `step` steps are done, or until `stop` asks to leave."""
        while self.state.step < step and not self._asked_to_stop(stop):
            self.step()
        self._tally.paused = time.perf_counter()

    @property
    def has_news(self) -> bool:
        """Whether any step was done since the last report."""
        return bool(self._tally.losses)

    def _asked_to_stop(self, stop: Stop | None) -> bool:
        """Whether to leave; several processes agree on it every few steps, since asking each other costs a wait."""
        if stop is None:
            return False
        if self.world.size == 1:
            self.stopped = stop.now
        elif self.state.step % AGREE_EVERY == 0:
            self.stopped = self.world.any(stop.now, self.device)
        return self.stopped

    def reports(self) -> Iterator[Report]:
        """Train to the end of the run, yielding a report every `log_every` steps and at the last.

        Between two reports the caller may save, sample or stop; the next `next` goes on.
        """
        every, total = self.config.train.log_every, self.config.train.steps
        self.restart_clock()
        while self.state.step < total:
            self.run_to(min(self.state.step - self.state.step % every + every, total))
            yield self.report()
            self.restart_clock()
