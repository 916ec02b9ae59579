"""A run from its folder to its model: resume, sample, report and save at their intervals, roll back, stop cleanly.

Talks to its caller through a `Listener`; prints nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cmtool.errors import DataError, DivergenceError, UserError
from cmtool.files.atomic import writing
from cmtool.machine.stopping import Stop
from cmtool.models import Model
from cmtool.training.clock import Timekeeper
from cmtool.training.loop import Due, Trainer
from cmtool.training.pace import Pace
from cmtool.training.posthoc import write_snapshots
from cmtool.training.provenance import provenance
from cmtool.training.report import Listener, Outcome, Watch, write_preview
from cmtool.training.run_folder import RunFolder
from cmtool.training.setup import collapsed
from cmtool.training.state import restore_newest

# Roll-backs to one checkpoint before a run gives up.
RETRIES = 3

# What training knows about evaluation: a model's figures ("fid", the smaller the better, decides which model is kept as
# the best), and what to add to the finished model's header (its sampling times), cut short when the time is up.
Judge = Callable[[Model], dict[str, float]]
Closing = Callable[[Model, Callable[[], bool]], dict[str, Any]]


class Session:
    """Attends to a trainer inside a run folder: `begin`, then `attend` to every pause of `Trainer.run`, then `end`."""

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        listener: Listener,
        judge: Judge | None = None,
        closing: Closing | None = None,
        timekeeper: Timekeeper | None = None,
    ) -> None:
        self.config = trainer.config
        self.judge = judge
        self.closing = closing
        self.timekeeper = timekeeper
        self.judges_at_end = False  # although no evaluations were asked for
        self.protocol: Callable[[], dict[str, Any]] | None = None  # what is kept with every evaluation's figures
        self.trainer = trainer
        self.state = trainer.state
        self.folder = folder
        self.listener = listener
        self.world = trainer.world
        self._saved = -1
        self._stop = Stop()
        self._rollbacks = 0
        self._watch = Watch()
        self.pace = Pace(trainer, self._expect)
        self._real = trainer.dataset.batch(torch.arange(min(len(trainer.dataset), 512)))[0]
        # Other work done at intervals: (number of steps, what to do).
        self.chores: list[tuple[int, Callable[[], None]]] = []
        if self.config.train.snapshot_every:
            self.chores.append((self.config.train.snapshot_every, lambda: write_snapshots(self.state, folder.path)))

    @property
    def _takes_part(self) -> bool:
        """Whether this process takes part in saving: the first one does, and all that hold rows of the weights."""
        return self.world.main or self.state.sharding is not None

    def log(self, text: str) -> None:
        """Append a line with the time (UTC) to `run.log`."""
        if not self.world.main:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        path = self.folder.path / "run.log"
        with writing(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(f"{stamp} {text}\n")

    def warn(self, message: str) -> None:
        """Tell the listener and keep it in `run.log`."""
        self.log(f"warning: {message}")
        self.listener.warn(message)

    def _expect(self, sentence: str) -> None:
        self.log(sentence)
        self.listener.expects(sentence)

    def resume(self) -> int:
        """Restore the newest whole checkpoint and return its step; name damaged ones and set them aside."""
        step, damaged = restore_newest(self.folder, self.state)
        for message in damaged.values():
            self.warn(f"{message} An older checkpoint is used.")
        self.world.wait()
        if self.world.main:
            for file in damaged:
                self.folder.set_aside(file)
            lost = self.folder.damaged_rows()
            if lost:
                self.warn(f"{self.folder.metrics} is damaged: {lost} of its lines were dropped.")
            self.folder.forget_after(self.state.step)
        self._saved = step if step is not None else -1
        return step or 0

    def checkpoint(self) -> None:
        """Write the training state, and drop checkpoints that are no longer kept."""
        if self._saved == self.state.step:
            return
        path = self.folder.checkpoint(self.state.step)
        if self.timekeeper is not None:
            self.state.spent = self.timekeeper.clock.spent
        if self._takes_part:
            self.state.save(path)
        self._saved, self._rollbacks = self.state.step, 0
        if not self.world.main:
            return
        self.listener.saved(path)
        self.folder.prune(self.config.train.keep_every)

    def sample(self) -> None:
        """Write a grid of the sampling average's samples (always the same seeds), and warn of collapse."""
        model = self.state.average()
        if not self.world.main or model is None:
            return
        self._stop.unless_stopped(lambda: self._draw(model))

    def _draw(self, model: Model) -> None:
        path, points = self._grid(), self.trainer.dataset.float_samples
        samples = write_preview(model, path, self.config, self.state.step, points)
        self.listener.saved(path)
        comparable = self.trainer.dataset.latent is None  # samples are pictures
        late = self.state.step >= max(200, self.state.course.end // 4)
        if comparable and late and collapsed(samples, self._real):
            self.warn(
                f"step {self.state.step}: samples hardly differ (collapse), which the loss does not show. "
                "A smaller recipe.curriculum.s1 or more --steps helps the 2023 schedule; recipe ict is sturdier."
            )

    def intervals(self) -> list[int]:
        """Return the intervals, in steps, at which there is something to do; zeros mean never."""
        train = self.config.train
        looks = self._look_every if self.timekeeper is not None else 0
        return [
            train.log_every,
            train.checkpoint_every,
            train.sample_every,
            train.eval_every,
            looks,
            *dict(self.chores),
        ]

    @property
    def _look_every(self) -> int:
        """Steps between looks at the clock: at least two hundred in a run."""
        return max(1, min(self.config.train.steps // 200, self.config.train.log_every))

    def begin(self, stop: Stop, arguments: Sequence[str] = ()) -> None:
        """Resume the run, and catch up on what was still due when it was killed.

        Args:
            stop: asks the run to stop.
            arguments: the command line, for the log.
        """
        self._stop = stop
        step = self.resume()
        if self.timekeeper is not None:
            if self.state.spent is not None:
                self.timekeeper.clock.go_on(self.state.spent)
            self.timekeeper.begin(step)
        self._log_start(step, arguments)
        if self.config.train.bad_step == "rollback" and self._saved < 0:
            self.checkpoint()  # a bad step before the first regular checkpoint needs one to go back to
        self.listener.started(step, self.state.course.end, self.trainer.needs)
        self._catch_up()
        if self.world.main and self.timekeeper is None:
            self.pace.begin(stop)

    def attend(self, due: Due) -> None:
        """Do what is due at this step, or go back to the newest checkpoint if a number is not finite.

        Raises:
            UserError: if a number is not finite and the run cannot be rolled back, or the disk is full.
        """
        began = time.monotonic() if self.timekeeper is None else self.timekeeper.clock.now()
        try:
            if due.error is not None:
                raise due.error
            if due.steps:
                self._at_interval()
            if due.stopped:
                self.trainer.check_finite(weights=True)
        except DivergenceError as error:
            self._roll_back(error)
        if self.timekeeper is not None:
            self.timekeeper.paused(self.timekeeper.clock.now() - began)

    def _look_at_clock(self, timekeeper: Timekeeper) -> None:
        """Decide where the run ends, if it is time to; the first process decides for all."""
        step, course = self.state.step, self.state.course
        end = self.world.gather(timekeeper.look(step, course.end) if self.world.main else None)[0]
        if end is not None:
            self.log(f"step {step}: ends at step {end}, no longer at {course.end}, to be done in time")
            course.decide(step, end)

    def end(self) -> Outcome:
        """Save everything after the last step, and say how it ended; a whole checkpoint is always left behind."""
        stopped = self.trainer.stopped and self.state.step < self.state.course.end
        return self._leave() if stopped else self._finish()

    def _log_start(self, step: int, arguments: Sequence[str]) -> None:
        fingerprint = self.trainer.dataset.fingerprint
        said = provenance(self.config, self.trainer.device, fingerprint, arguments, self.state.precision)
        self.log(f"start at step {step} of {self.state.course.end} {json.dumps(said, ensure_ascii=False)}")

    def _roll_back(self, error: DivergenceError) -> None:
        """Go back to the newest checkpoint if `train.bad_step` says so; from there the run continues with other noise.

        The noise depends on how often the run rolled back. Checkpoints keep that number, so a killed run repeats it.
        """
        bad, retries = self.state.step, self.state.retries
        if self.config.train.bad_step != "rollback" or self._rollbacks == RETRIES:
            raise self.folder.kept(error)
        step, _ = restore_newest(self.folder, self.state)
        if step is None:
            raise self.folder.kept(error)
        if self.timekeeper is not None:
            self.timekeeper.begin(step)
        self._rollbacks += 1
        self.state.retries = max(retries, self.state.retries) + 1
        self.trainer.forget()
        self.world.wait()
        if self.world.main:
            self.folder.forget_after(step)
        self.warn(f"step {bad}: {error.message} Rolled back to step {step} ({self._rollbacks} of {RETRIES} attempts).")

    def _at_interval(self) -> None:
        train, step = self.config.train, self.state.step
        if self.timekeeper is not None and (step % self._look_every == 0 or step == self.state.course.end):
            self._look_at_clock(self.timekeeper)
        last = self.state.course.end
        if step == last or any(step % n == 0 for n in (train.checkpoint_every, train.sample_every)):
            self.trainer.check_finite(weights=True)
        if (step % train.log_every == 0 or step == last) and self.trainer.has_news:
            self._report()
        # Before the checkpoint: a run that is killed in between resumes at an earlier step and does them again.
        for every, chore in self.chores:
            if self._takes_part and (step % every == 0 or step == last):
                chore()
        if step % train.checkpoint_every == 0:
            self.checkpoint()
        if step % train.sample_every == 0 and step < last:
            self.sample()
        if train.eval_every and step % train.eval_every == 0:
            self.evaluate()

    def _catch_up(self) -> None:
        """Do what was still due at the checkpoint's step in a run that was killed just after it."""
        train, step = self.config.train, self.state.step
        if step in (0, self.state.course.end):
            return
        if step % train.sample_every == 0 and self._owes(not self._grid().is_file()):
            self.sample()
        if train.eval_every and step % train.eval_every == 0:
            rows = [row for row in self.folder.rows() if row.get("step") == step]
            if self._owes(not any("eval" in row for row in rows)):
                self.evaluate()

    def _owes(self, flag: bool) -> bool:
        """Tell all processes what the first one sees in the folder: others may look a moment later."""
        return self.world.any(flag and self.world.main, self.trainer.device)

    def _grid(self) -> Path:
        return self.folder.samples / f"step-{self.state.step:07d}.png"

    def evaluate(self) -> None:
        """Judge the sampling average, keep the figures, and keep the model if it is the best so far."""
        if not self._owes(self.judge is not None):
            return
        model = self.state.average()
        if not self.world.main or self.judge is None or model is None:
            return
        judge = self.judge
        try:
            self._stop.unless_stopped(lambda: self._keep(judge(model), model))
        except DataError as error:
            self.warn(f"step {self.state.step}: the model could not be judged: {error.message}")

    def _keep(self, figures: dict[str, float], model: Model) -> None:
        """Keep the model if it is the best, and then its figures: a run killed in between judges it again."""
        before = [row["eval"]["fid"] for row in self.folder.rows() if "fid" in row.get("eval", {})]
        several = self.config.train.eval_every > 0
        if several and "fid" in figures and figures["fid"] < min(before, default=float("inf")):
            self.state.export(self.folder.best, {"figures": figures}, network=model.network)
        protocol = {} if self.protocol is None else {"protocol": self.protocol()}
        self.folder.append({"step": self.state.step, "eval": figures, **protocol})
        self.listener.evaluated(self.state.step, figures)
        for message in self._watch.figures(self.state.step, figures):
            self.warn(message)

    def _report(self) -> None:
        report = self.trainer.report()
        while self.trainer.remarks:
            self.log(self.trainer.remarks.pop(0))
        norm = self.state.average_norm() if self._takes_part else 0.0
        if self.world.main:
            self.folder.append(report.row())
            self.listener.report(report)
            if self.timekeeper is None:
                self.pace.hear(report)
            for message in self._watch.report(report, norm):
                self.warn(message)

    def _leave(self) -> Outcome:
        stop = self._stop
        self.checkpoint()
        why = "the time limit" if stop.out_of_time and not stop.signal else f"signal {stop.signal}"
        self.log(f"stopped by {why} at step {self.state.step}")
        return Outcome(None, self.state.step, stop.signal, stop.out_of_time)

    def _closed(self, model: Model | None) -> dict[str, Any]:
        """Return what the final search adds to the model's header; without it the model is complete too."""
        stop, closing = self._stop, self.closing
        if closing is None or model is None:
            return {}
        try:
            found = stop.unless_stopped(lambda: closing(model, self._late))
        except UserError as error:
            self.warn(f"no sampling times were found: {error.message}")
            return {}
        if stop.out_of_time:
            self.warn("the time limit cut the search for sampling times short; cmtool search-times goes through all.")
        return found or {}

    def _late(self) -> bool:
        return self._stop.out_of_time or (self.timekeeper is not None and self.timekeeper.late)

    def _finish(self) -> Outcome:
        self.checkpoint()
        self.sample()
        if self._owes(self.judges_at_end and not any("eval" in row for row in self.folder.rows())):
            self.evaluate()
        if not self._takes_part:
            return Outcome(self.folder.model, self.state.step)
        extra = self._closed(self.state.average())
        # Grid and times are still due. With several processes none may leave by itself: the run ends without them.
        if self._stop.signal and self.world.size == 1:
            return self._leave()
        for index, average in enumerate(self.state.extra_emas):
            self.state.export(self.folder.path / f"ema-{index}.safetensors", network=average.network)
        self.state.export(self.folder.model, extra)
        if self.world.main:
            self.listener.saved(self.folder.model)
        self.log(f"finished at step {self.state.step}")
        return Outcome(self.folder.model, self.state.step)
