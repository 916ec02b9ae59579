"""The loop: batches in, reports out.

A step is a function of (configuration, step number, state): noise, times, dropout and data order come from the seed
and the step, so that a run that was killed and resumed ends with the same weights to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset
from cmtool.data.order import batch_indices, flip_mask
from cmtool.errors import DivergenceError
from cmtool.losses.draw import Draw, Nets, Slice
from cmtool.losses.objective import Loss, Objective
from cmtool.models import Model
from cmtool.rng import batch_uniform, moved
from cmtool.samplers.generate import out_of_memory
from cmtool.schedules.curriculum import CurriculumState, curriculum_at, halving_span
from cmtool.schedules.learning_rate import lr_factor
from cmtool.training.ahead import Ahead
from cmtool.training.distributed import World
from cmtool.training.numbers import all_finite, gradient_norm
from cmtool.training.replay import Replay, replayable
from cmtool.training.report import Report, Tally, band_means
from cmtool.training.state import TrainState
from cmtool.training.stopping import Stop

# Steps between two questions to the other processes whether anyone was told to stop.
AGREE_EVERY = 5


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
        self._tally = Tally()
        self.stopped = False
        self.notes: list[str] = []
        self.remarks: list[str] = []  # what turned out on the way, for the log
        self._ahead = Ahead(self._load) if self.device.type == "cuda" else None
        self.replay: Replay | None = None
        if self._ahead is not None and replayable(config, self.device, self.world.size):
            self.replay = Replay(self._looked, state.parameters, self._ahead.settle, self.remarks.append)
        # Images in one pass; with micro_batch = "auto" halved whenever they do not fit the memory.
        self.micro = config.train.micro_batch if isinstance(config.train.micro_batch, int) else config.train.batch_size

    def curriculum(self) -> CurriculumState:
        """Return the scheduled numbers of the coming step."""
        recipe = self.config.recipe
        return curriculum_at(recipe.curriculum, recipe.target, recipe.gap, self.state.step, self.config.train.steps)

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return rows `start` .. of the step's batch: images in [-1, 1], and labels (-1 where dropped) or None."""
        if self._ahead is None:
            return self._load(self.state.step, start, count)
        return self._ahead.take(self.state.step, start, count)

    def _load(self, step: int, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        train = self.config.train
        indices = batch_indices(train.seed, step, train.batch_size, len(self.dataset))[start : start + count]
        images, labels = self.dataset.batch(indices)
        if self.config.data.flip:
            flips = flip_mask(train.seed, step, train.batch_size)[start : start + count]
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        images = moved(images, self.device).to(self.dtype)
        if not self.config.data.labels or labels is None:
            return images, None
        if train.label_dropout > 0:
            u = batch_uniform((train.batch_size,), train.seed, "label-dropout", step, start=start, count=count)
            labels = torch.where(u < train.label_dropout, torch.full_like(labels, -1), labels)
        return images, moved(labels, self.device)

    def step(self) -> None:
        """Do one optimizer step.

        Raises:
            DivergenceError: if loss or gradient is not finite; on a CPU nothing has been updated then, on other devices
                `check_finite` and `report` find out before anything is saved.
        """
        train, state = self.config.train, self.state
        now = self.curriculum()
        if train.restart == "stage" and state.step == self._span(state.step)[0]:
            state.optimizer.state.clear()
        for group in state.optimizer.param_groups:
            group["lr"] = self.rate(state.step)
        while not self._passes(now):
            pass
        self._agree()
        if self._gradients_usable():
            state.optimizer.step()
            state.advance_averages(now.target_ema)
        state.step += 1

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.config.train.lr * lr_factor(self.config.train, step, self._span(step))

    def _span(self, step: int) -> tuple[int, int]:
        train = self.config.train
        if train.restart == "stage":
            return halving_span(self.config.recipe.curriculum, step, train.steps)
        return 0, train.steps

    def _passes(self, now: CurriculumState) -> bool:
        """Compute the gradients of this process's rows.

        Returns False, with half the micro-batch for another try, if memory ran out and `micro_batch` is "auto".
        """
        first, count = self.world.rows(self.config.train.batch_size)
        size = min(self.micro, max(count, 1))
        if self.replay is None or not self.replay.clear_gradients():
            self.state.clear_gradients()
        before = self._tally.mark()
        try:
            for start in range(first, first + count, size):
                self._pass(now, start, min(size, first + count - start))
        except (RuntimeError, MemoryError) as error:
            if self.config.train.micro_batch != "auto" or size == 1 or not out_of_memory(error):
                raise
            self._tally.rewind(before)
            self.micro = -(-size // 2)
            self.remarks.append(f"step {self.state.step}: {size} images at once do not fit memory; {self.micro} now")
            return False
        return True

    def _pass(self, now: CurriculumState, start: int, count: int) -> None:
        """Add the gradients of the rows `start` .. `start + count` of the global batch."""
        x0, label = self.batch(start, count)
        rows = Slice(self.state.noise_seed, self.state.step, start, self.config.train.batch_size)
        if self.replay is not None:
            loss = self.replay(self.objective.drawn(self.nets, x0, label, now, rows), now.step / max(now.steps, 1))
        else:
            loss = self._descended(self.objective(self.nets, x0, label, now, rows))
        self._tally.add(loss.weighted.detach(), loss.distance, loss.t)

    def _looked(self, draw: Draw, share: Tensor) -> Loss:
        return self._descended(self.objective.look(self.nets, draw, share))

    def _descended(self, loss: Loss) -> Loss:
        mean = loss.weighted.sum() / self.config.train.batch_size
        self._check(mean)
        self._backward(mean)
        return loss

    def _backward(self, loss: Tensor) -> None:
        scale = self.state.scale
        (loss * scale.value if scale.active else loss).backward()

    def _check(self, loss: Tensor) -> None:
        # On a GPU reading the loss would stall the queue: there the report looks at all losses since the last one.
        # Among several processes one alone must not leave: the others would wait for it.
        if loss.device.type == "cpu" and self.world.size == 1 and not math.isfinite(loss.item()):
            self._diverged()

    def _agree(self) -> None:
        """Add up the gradients of all processes; on CPUs, stop together if any loss was not finite."""
        if self.world.size == 1:
            return
        if self.device.type == "cpu" and self.world.any(not self._tally.finite(), self.device):
            self._diverged()
        self.state.collect_gradients(self.world)

    def _gradients_usable(self) -> bool:
        """Clip the gradients; whether the step is to be taken: float16 leaves one out whose gradients overflow.

        Raises:
            DivergenceError: if they are not finite (on a CPU; elsewhere reading them would stall the queue).
        """
        scale = self.state.scale
        clip = self.config.train.grad_clip
        norm = gradient_norm(self.state.trained, scale.value, clip, self.state.total_norm)
        if scale.active:
            finite = bool(torch.isfinite(norm))
            scale.update(finite)
            if finite:
                self._tally.norms.append(norm)
            return finite
        self._tally.norms.append(norm)
        if norm.device.type == "cpu" and not math.isfinite(norm.item()):
            self._diverged("gradient")
        return True

    def _diverged(self, what: str = "loss") -> None:
        raise DivergenceError(
            f"the {what} is not finite at step {self.state.step}.",
            "try a smaller --set train.lr, a --set train.grad_clip=1.0, or --precision fp32",
        )

    def report(self) -> Report:
        """Sum up the steps since the last report and start anew.

        Raises:
            DivergenceError: if a loss or gradient among them was not finite.
        """
        self.check_finite()
        tally, train = self._tally, self.config.train
        losses, distance, t = self._gathered()
        seconds = max(time.perf_counter() - tally.started, 1e-9)
        self._tally = Tally()
        done = self.state.step - 1
        recipe = self.config.recipe
        last = curriculum_at(recipe.curriculum, recipe.target, recipe.gap, done, train.steps)
        return Report(
            step=self.state.step,
            steps=train.steps,
            loss=float(losses.mean()),
            distance=float(distance.mean()),
            bands=band_means(distance, t),
            num_scales=last.num_scales,
            target_ema=last.target_ema,
            lr=self.rate(done),
            grad_norm=float(torch.stack(tally.norms).mean()) if tally.norms else math.nan,
            images_per_s=tally.images * self.world.size / seconds,
            images_seen=self.state.step * train.batch_size,
        )

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses, distances and times since the last report, of all processes."""
        tally = self._tally
        mine = [torch.cat(kept).cpu() for kept in (tally.losses, tally.distances, tally.times)]
        mine[1] = mine[1].double()
        if self.world.size > 1:
            parts = self.world.gather(mine)
            mine = [torch.cat(columns) for columns in zip(*parts, strict=True)]
        return mine[0], mine[1], mine[2]

    def check_finite(self, weights: bool = False) -> None:
        """Look at losses and gradients since the last report, and at the weights if asked: before anything is saved.

        Raises:
            DivergenceError: if one of them is not finite.
        """
        if self.world.any(not self._tally.finite(), self.device):
            self._diverged("loss or gradient")
        if weights and self.world.any(not all_finite((self.state.student, self.state.ema)), self.device):
            self._diverged("weight")

    def forget(self) -> None:
        """Drop what was recorded since the last report: those steps have been undone."""
        self._tally = Tally()

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
