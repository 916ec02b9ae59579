"""The loop: batches in, reports out.

A step is a function of (configuration, step number, state): noise, times, dropout and data order come from the seed
and the step, so that a run that was killed and resumed ends with the same weights to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cmtool.config.schema import RunConfig
from cmtool.data.condition import split
from cmtool.data.dataset import Dataset
from cmtool.errors import DivergenceError
from cmtool.losses.objective import Loss, Objective
from cmtool.losses.score import ScoreObjective
from cmtool.losses.terms import Nets, Slice
from cmtool.machine.stopping import Left, Stop
from cmtool.machine.world import World
from cmtool.models import Model
from cmtool.rng import derive
from cmtool.samplers.generate import out_of_memory
from cmtool.schedules.curriculum import CurriculumState, curriculum_at, rate_at, span_at
from cmtool.training.batches import Batches
from cmtool.training.forecast import Forecast, forecast
from cmtool.training.learner import Learner
from cmtool.training.optimizers import all_finite, diverged
from cmtool.training.replay import Replay, replayable
from cmtool.training.report import Report, Tally, band_means
from cmtool.training.state import TrainState

# Steps between two rounds of asking the other processes whether any was told to stop.
AGREE_EVERY = 5


@dataclass(frozen=True)
class Due:
    """Why `Trainer.run` pauses: it has done `steps` more steps, it was told to stop, or `error` ended a step."""

    steps: int
    stopped: bool = False
    error: DivergenceError | None = None


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
        fake = None if state.fake is None else state.fake.model
        self.nets = Nets(state.student, state.target, state.ema, teacher, fake=fake)
        self._tally = Tally()
        self.stopped = False
        self.running = False
        self._begun = False  # whether a network has moved in the current step
        self._stop = Stop()
        self._mark = self._tally.mark()  # what was recorded before the current step
        self.notes: list[str] = []
        self.remarks: list[str] = []  # what turned out on the way, for the log
        on_gpu = self.device.type == "cuda"
        self.batches = Batches(config, dataset, self.device, self.dtype, ahead=on_gpu)
        self.replay = self.recorder() if replayable(config, self.device, self.world.size) else None
        # Reading a loss would stall a GPU's queue. And with several processes, none may leave by itself: the others
        # would wait for it.
        self._reads_losses = self.device.type == "cpu" and self.world.size == 1
        # A signal may end a step halfway unless other processes count on this one's part in every pass. On a GPU it
        # waits for the pass, which may be one that is being recorded.
        on_cpu = self.device.type == "cpu" and state.sharding is None
        self._leavable = on_cpu
        self._leaves_passes = on_cpu or self.world.size == 1
        # Images in one pass; with micro_batch = "auto" halved whenever they do not fit in memory.
        self.micro = config.train.micro_batch if isinstance(config.train.micro_batch, int) else config.train.batch_size

    @cached_property
    def needs(self) -> Forecast:
        """What the run will take of memory and disk; counted once."""
        return forecast(self.config, self.state)

    def curriculum(self) -> CurriculumState:
        """Return the scheduled numbers of the coming step."""
        recipe = self.config.recipe
        return curriculum_at(recipe.curriculum, recipe.target, recipe.gap, self.scheduled, self.config.train.steps)

    @property
    def scheduled(self) -> int:
        """The step of the schedules that the coming step is."""
        return self.state.course.at(self.state.step)

    def recorder(self) -> Replay:
        """Return what runs passes from now on: it records each kind once and replays it afterwards."""
        state = self.state
        return Replay(
            lambda draw: self.objective.loss(self.nets, draw),
            self.descend,
            state.parameters,
            self.batches.settle,
            self.remarks.append,
        )

    def step(self) -> None:
        """Do one optimizer step, or nothing of it if a signal arrives meanwhile.

        A fake network takes its own steps: all but the last by itself, the last with the student, from the same passes.
        Once it has moved, a signal waits for the end of the step.

        Raises:
            DivergenceError: if loss or gradient is not finite. On a CPU the student has not been updated then; on other
                devices `check_finite` and `report` find out before anything is saved.
        """
        state, now, recipe = self.state, self.curriculum(), self.config.recipe
        end = sum(self.world.rows(self.config.train.batch_size))
        self._mark, self._begun, left = self._tally.mark(), False, False
        for turn in (*range(1, recipe.score.fake_steps), 0):
            try:
                self._stop.leavable = self._leavable and not self._begun
                for start, count in self._passes():
                    try:
                        x0, label, told = self.batches.take(state.step, start, count)
                        rows = Slice(state.noise_seed, state.step, start, self.config.train.batch_size)
                        last = start + count == end
                        if turn:
                            self._follow(turn, x0, label, rows, last)
                            continue
                        x0, pictures = split(x0, state.student.condition, self.config.data.channels)
                        draw = self.objective.draw(x0, label, now, rows, told)
                        draw = draw if pictures is None else replace(draw, condition=pictures)
                        if self.replay is not None:
                            loss = self.replay(draw)
                        else:
                            loss = self.objective.loss(self.nets, draw)
                            self.descend(loss, check=self._reads_losses, last=last)
                        self._tally.add(loss.weighted.detach(), loss.distance, loss.t)
                    except (RuntimeError, MemoryError) as error:
                        self._halve(error)
            except Left:
                left = True
            finally:
                self._stop.leavable = False
            learners = state.learners[1:] if turn else state.learners
            if self._abandoned(left, learners):
                return
            if turn:
                self._update(learners)
                self._begun = True
        self._prepare_optimizer()
        if self._update(state.learners):
            state.advance_averages(now.target_ema)
        state.step += 1

    def _follow(self, turn: int, x0: Tensor, label: Tensor | None, rows: Slice, last: bool) -> None:
        """Add up the fake network's gradients of a pass in which it learns alone."""
        rows = replace(rows, seed=derive(rows.seed, "fake", turn))
        assert isinstance(self.objective, ScoreObjective) and self.state.fake is not None
        loss = self.objective.follow(self.nets, x0, label, rows)
        self._add(self.state.fake, loss, self._reads_losses, last)

    def descend(self, loss: Loss, check: bool = False, last: bool = False) -> None:
        """Add the gradients of a pass to those of the networks that learn from it; with `check` read losses before.

        After the `last` pass of a step, the sums over all processes are complete or under way.
        """
        for learner, numbers in zip(self.state.learners, (loss.weighted, loss.fake), strict=False):
            assert numbers is not None
            self._add(learner, numbers, check, last)

    def _add(self, learner: Learner, loss: Tensor, check: bool, last: bool) -> None:
        sums = last and self.world.size > 1
        if sums:
            self._stop.leavable = False  # the other processes would wait for a sum that was begun and is forgotten
        learner.gradients.descend(loss, self.state.step, check, sums)

    def _update(self, learners: Sequence[Learner]) -> bool:
        """Move these networks by the gradients that are there; return whether the first of them moved.

        None moves before the gradients of all are known to be finite.
        """
        norms = []
        for learner in learners:
            norms.append(learner.gradients.clip(self.state.step))
        for learner, norm in zip(learners, norms, strict=True):
            if norm is None:
                continue
            if learner is self.state.learner:
                self._tally.norms.append(norm)
            learner.set_rate(rate_at(self.config, self.scheduled))
            learner.optimizer.step()
            learner.normalize()  # before the averages, which follow the normalized weights
        return norms[0] is not None

    def _abandoned(self, left: bool, learners: Sequence[Learner]) -> bool:
        """Whether a process has left the step, and so all do: the weights stay those of the last one.

        Otherwise the gradients of these networks are summed over the processes. A process that left takes part, because
        the others may have begun to sum.

        Raises:
            DivergenceError: on CPUs, if a loss of any process is not finite.
        """
        for learner in learners if self.world.size > 1 else ():
            learner.gradients.collect()
        on_cpus = self.world.size > 1 and self.device.type == "cpu"
        if self.world.any(left, self.device) if on_cpus else left:
            self._tally.rewind(self._mark)
            self.state.clear_gradients()
            self.stopped = True
            return True
        if on_cpus and self.world.any(not self._tally.finite(), self.device):
            raise diverged("loss", self.state.step)
        return False

    @property
    def share_of_step(self) -> float:
        """Share of the current step's images that have been through the networks, from 0 to 1."""
        return max(self._tally.images - self._mark[1], 0) / max(self.world.rows(self.config.train.batch_size)[1], 1)

    def _passes(self) -> Iterator[tuple[int, int]]:
        """Yield (start, count) of this process's rows, pass by pass; starts over whenever `_halve` was called."""
        first, count = self.world.rows(self.config.train.batch_size)
        start, kept = first, self._tally.mark()
        while True:
            size = self.pass_size
            if start == first:
                self._tally.rewind(kept)
                if self.replay is None or not self.replay.clear_gradients():
                    self.state.clear_gradients()
            if start >= first + count:
                return
            if self._stop.signal and self._leaves_passes and not self._begun:
                raise Left
            yield start, min(size, first + count - start)
            start = start + size if self.pass_size == size else first

    @property
    def pass_size(self) -> int:
        """Images in one pass."""
        return min(self.micro, max(self.world.rows(self.config.train.batch_size)[1], 1))

    def _halve(self, error: Exception) -> None:
        """Halve the micro-batch after a pass that did not fit in memory; raise any other error again."""
        size = self.pass_size
        if self.config.train.micro_batch != "auto" or size == 1 or not out_of_memory(error):
            raise error
        self.micro = -(-size // 2)
        self.remarks.append(f"step {self.state.step}: {size} images at once do not fit memory; {self.micro} now")

    def _prepare_optimizer(self) -> None:
        """At the start of a stage that starts over, reset the optimizer's moments."""
        step = self.scheduled
        if self.config.train.restart == "stage" and step == span_at(self.config, step)[0]:
            self.state.optimizer.state.clear()

    def run(self, stop: Stop | None = None, intervals: Sequence[int] = ()) -> Iterator[Due]:
        """Train to the end of the run, pausing whenever something else is due.

        The caller saves, samples or reports during a pause. After a pause with an `error` the run continues if the
        caller has rolled back the state.

        Args:
            stop: asked before every step whether to leave; a signal ends the current step, of which nothing is kept.
            intervals: pause at every multiple of these, and at the end; zeros do not count.

        Yields:
            Why it pauses. A pause because of `stop` is the last.

        Raises:
            DivergenceError: if loss or gradient is not finite and the caller did not roll back.
        """
        self._stop = stop or Stop()
        self.running = True
        try:
            # The end may move during a pause.
            while self.state.step < (total := self.state.course.end) and not self.stopped:
                # Whatever happened since the last step (saving, sampling) does not count for the measured speed.
                self._tally.started += time.perf_counter() - self._tally.paused
                began, retries, error = self.state.step, self.state.retries, None
                until = min([total, *(began - began % n + n for n in intervals if n)])
                try:
                    while self.state.step < until and not self._asked_to_stop(stop):
                        self.step()
                except DivergenceError as raised:
                    error = raised.with_traceback(None)  # which would hold on to the tensors of the step
                self._tally.paused = time.perf_counter()
                bad = self.state.step
                yield Due(bad - began, self.stopped, error)
                if error is not None and (self.state.step, self.state.retries) == (bad, retries):
                    raise error  # the state was not rolled back
        finally:
            self.running = False

    def _asked_to_stop(self, stop: Stop | None) -> bool:
        """Whether to leave. Several processes agree on it every few steps, because asking means waiting."""
        if stop is None or self.stopped:
            return self.stopped
        if self.world.size == 1:
            self.stopped = stop.now
        elif self.state.step % AGREE_EVERY == 0:
            self.stopped = self.world.any(stop.now, self.device)
        return self.stopped

    def report(self) -> Report:
        """Sum up the steps since the last report and start over.

        Raises:
            DivergenceError: if a loss or gradient among them was not finite.
        """
        self.check_finite()
        tally, train = self._tally, self.config.train
        losses, distance, t = tally.gathered(self.world)
        seconds = max(time.perf_counter() - tally.started, 1e-9)
        self._tally = Tally()
        done = self.state.course.at(self.state.step - 1)
        recipe = self.config.recipe
        last = curriculum_at(recipe.curriculum, recipe.target, recipe.gap, done, train.steps)
        return Report(
            step=self.state.step,
            steps=self.state.course.end,
            loss=float(losses.mean()),
            distance=float(distance.mean()),
            bands=band_means(distance, t),
            num_scales=last.num_scales,
            target_ema=last.target_ema,
            lr=rate_at(self.config, done),
            grad_norm=float(torch.stack(tally.norms).mean()) if tally.norms else math.nan,
            images_per_s=tally.images * self.world.size / seconds,
            images_seen=self.state.step * train.batch_size,
        )

    def check_finite(self, weights: bool = False) -> None:
        """Look at losses and gradients since the last report, and at the weights if asked: before anything is saved.

        Raises:
            DivergenceError: if one of them is not finite.
        """
        if self.world.any(not self._tally.finite(), self.device):
            raise diverged("loss or gradient", self.state.step)
        trained = [self.state.ema, *(learner.model for learner in self.state.learners)]
        if weights and self.world.any(not all_finite(trained), self.device):
            raise diverged("weight", self.state.step)

    def forget(self) -> None:
        """Drop what was recorded since the last report: those steps have been undone."""
        self._tally = Tally()

    @property
    def has_news(self) -> bool:
        """Whether any step was done since the last report."""
        return bool(self._tally.losses)
