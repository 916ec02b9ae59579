"""A run of a given time: how many steps it does follows the clock, and its schedules follow its steps.

Schedules span `train.steps`. A run with `train.time` looks at the clock now and then and decides anew at which step it
ends; from there on its schedules are walked faster or slower, so that they are complete at that step. Weights are a
function of the settings and these decisions. Checkpoints keep both the decisions and the time spent, the model's header
the decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from cmtool.config.laws import CLOSING, JUDGING, QUICK, SEARCHING
from cmtool.config.schema import RunConfig

# Shares of a run's time at which its end is decided anew.
MARKS = (0.01, 0.03, 0.06, *(share / 20 for share in range(2, 20)), 0.975)
# The share of the time over which the pace of steps is averaged: the weight of an older step falls to 1/e.
MEMORY = 0.12
# A run that reaches its end early goes on only for at least this share of its steps.
WORTHWHILE = 0.02
# Pictures in the grid after the last step, and evaluations for each.
GRID, EVALUATIONS = 64, {"consistency": 1, "diffusion": 35}


class Course:
    """Maps the steps of a run onto the `steps` that its schedules span; without decisions they are the same.

    A decision is (step, end): made before `step`, it says that the run ends with `end` steps.
    """

    def __init__(self, steps: int, decisions: Sequence[Sequence[int]] = ()) -> None:
        self.steps = steps
        self.decisions = [(int(step), int(end)) for step, end in decisions]

    @property
    def end(self) -> int:
        """The number of steps after which the run ends."""
        return self.decisions[-1][1] if self.decisions else self.steps

    def decide(self, step: int, end: int) -> None:
        """Let the run end after `end` steps, from `step` on."""
        self.decisions.append((step, max(step, end)))

    def at(self, step: int) -> int:
        """Return the scheduled step, 0 to steps - 1, that the 0-based `step` is; it never falls."""
        place, since, end = 0.0, 0, self.steps
        for decided, new_end in self.decisions:
            if decided > step:
                break
            place = self._walked(place, since, end, decided)
            since, end = decided, new_end
        return min(math.floor(self._walked(place, since, end, step)), self.steps - 1)

    def _walked(self, place: float, since: int, end: int, step: int) -> float:
        return float(self.steps) if step >= end else place + (self.steps - place) * (step - since) / (end - since)


class Clock:
    """Seconds spent on a run, over all processes that have worked on it one after another.

    `began` is when this process's command began; what earlier processes had spent by the checkpoint from which it goes
    on is added. Time between two processes, and work that a kill has undone, do not count.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._began = now() if began is None else began
        self._before = 0.0

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self.now() - self._began + self._before

    def go_on(self, spent: float) -> None:
        """Let `spent` seconds be over before this process; each stage counts those of the stages before it too."""
        self._before = max(spent, self._before)


class Timekeeper:
    """Decides from the pace of a run's steps with how many of them it ends, so that it is done in time.

    Args:
        clock: what has been spent.
        until: what it should show when the model is there, in seconds.
        closing: seconds kept free for what follows the last step.
        closing_steps: the same for work that is as fast as the steps are.
    """

    def __init__(self, clock: Clock, until: float, closing: float = 0.0, closing_steps: float = 0.0) -> None:
        self.clock, self.until = clock, until
        self._closing, self._closing_steps = closing, closing_steps
        self._pauses = self._steps = 0.0
        self.begin(0)

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self.clock.spent >= self.until

    def begin(self, step: int) -> None:
        """Measure from here: the run begins at `step`, or has been taken back to it."""
        self._start = self.clock.spent
        self._marks = list(MARKS)
        self._recent_seconds = self._recent_steps = 0.0
        self._warm = False
        self._since, self._at, self._paused = step, self._start, 0.0

    def paused(self, seconds: float) -> None:
        """Count seconds in which no step was done (a checkpoint, a grid of samples)."""
        self._paused += seconds

    def look(self, step: int, end: int) -> int | None:
        """Return the step after which the run should end; None if it is not time to decide, or nothing changes.

        Args:
            step: how many steps are done.
            end: the end as decided before.
        """
        spent, done = self.clock.spent, step - self._since
        share = (spent - self._start) / max(self.until - self._start, 1e-9)
        if share >= 1:
            return step if step < end else None
        if not self._warm and step < end:
            # The first steps choose algorithms or compile: they say nothing about the pace.
            self._warm, self._since, self._at, self._paused = True, step, spent, 0.0
            return None
        if done < 1 or (share < next(iter(self._marks), 2.0) and step < end):
            return None
        self._marks = [mark for mark in self._marks if mark > share]
        new = self._forecast(step, spent)
        at_end_for_little = step >= end and new - step < WORTHWHILE * end
        return None if at_end_for_little or abs(new - end) < 1 else new

    def _forecast(self, step: int, spent: float) -> int:
        """Return the end by the pace of late; pauses are taken to be as frequent as so far."""
        seconds, done = spent - self._at, step - self._since
        kept = math.exp(-seconds / (MEMORY * max(self.until - self._start, 1e-9)))
        self._recent_seconds = kept * self._recent_seconds + max(seconds - self._paused, 1e-9)
        self._recent_steps = kept * self._recent_steps + done
        pace = self._recent_seconds / self._recent_steps
        self._pauses, self._steps = self._pauses + self._paused, self._steps + done
        self._since, self._at, self._paused = step, spent, 0.0
        left = self.until - self._closing - spent
        return step + max(math.floor(left / (pace + self._pauses / self._steps) - self._closing_steps), 0)


def timekeeper_of(
    config: RunConfig, clock: Clock, until: float | None, *, searches: bool, judged: bool = False, quick: bool = False
) -> Timekeeper | None:
    """Return what keeps a run to its time, None if it has none; room for the last grid and a search is left.

    Args:
        config: the run.
        clock: what has been spent.
        until: when its model should be there, in seconds of the clock; None: after `train.time`.
        searches: whether it ends with a search for sampling times.
        judged: whether the finished model is judged, which is worth up to a fifth of the training.
        quick: whether search and judgment see images through the small network.
    """
    if config.train.time is None:
        return None
    ends = config.train.time if until is None else until
    # A forward pass costs a third of a step.
    grid = GRID * EVALUATIONS[config.recipe.model_kind] / (3 * config.train.batch_size)
    share = (SEARCHING * searches + JUDGING * judged) * (QUICK if quick else 1)
    return Timekeeper(clock, ends, 1.5 + min(CLOSING, share * ends), grid)
