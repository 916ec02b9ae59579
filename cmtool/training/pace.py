"""How long a run will take, reported once and early: before the first step if steps are slow, else seconds after it.

Nothing here changes a result. Where a step is large, passes of a few images are timed before the first one; their
gradients are thrown away, and their noise is a function of seed and step. Beyond that a thread watches the steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmtool.config.load import resolve
from cmtool.config.schema import RunConfig
from cmtool.errors import UserError
from cmtool.losses.terms import Slice
from cmtool.machine.stopping import Stop
from cmtool.networks import parameter_count
from cmtool.units import human_time

if TYPE_CHECKING:
    from cmtool.training.loop import Trainer
    from cmtool.training.report import Report

# Weights times pixels times images from which a step on a CPU may take seconds (about 1e12 a second on two cores).
LARGE = 3e12
# Seconds of a step from which a timed pass is trusted: a small one says little about fast steps.
SLOW = 8.0
# Seconds after which the estimate is reported: once two steps are done, once one is, or with none.
SOON, LATER, LATEST = 5.0, 8.0, 15.0
# A run on a CPU longer than this many seconds gets advice on something shorter, which should take the second number.
DAY, BEARABLE = 86_400.0, 43_200.0
# Too few steps do not make a model. Small networks reach a smaller share of a processor's speed.
LEAST_STEPS, CLUMSY = 1000, 1.5


class Pace:
    """Finds out how long a trainer's run will take and tells `say`, once."""

    def __init__(self, trainer: Trainer, say: Callable[[str], None]) -> None:
        self.trainer = trainer
        self._say = say
        self._lock = threading.Lock()
        self._said = False

    def begin(self, stop: Stop) -> None:
        """Time a few passes if steps are large, and watch the first steps from now on; a signal ends the timing."""
        trainer = self.trainer
        if trainer.state.step >= trainer.config.train.steps:
            return
        if trainer.device.type == "cpu" and trainer.state.sharding is None and work_of(trainer) >= LARGE:
            let_signals_in(trainer)
            seconds = stop.unless_stopped(lambda: timed_passes(trainer))
            if seconds is not None and seconds >= SLOW:
                self.tell(seconds)
        if not self._said:
            threading.Thread(target=self._watch, args=(time.monotonic(),), name="cmtool-pace", daemon=True).start()

    def hear(self, report: Report) -> None:
        """Speak after the first report if nothing has been said by then."""
        if report.step < report.steps:
            self.tell(self.trainer.config.train.batch_size / max(report.images_per_s, 1e-9))
        self._said = True

    def tell(self, seconds: float, at_least: bool = False) -> None:
        """Say how long the run will take with `seconds` a step, or more than those."""
        with self._lock:
            if not self._said:
                self._said = True
                config, done = self.trainer.config, self.trainer.state.step
                self._say(expectation(config, config.train.steps - done, seconds, self.trainer.device.type, at_least))

    def _watch(self, began: float) -> None:
        """Watch the steps until something has been said, or the run has ended."""
        start, first, last = self.trainer.state.step, None, (began, 0)
        while not self._said:
            time.sleep(0.1)
            now, done = time.monotonic(), self.trainer.state.step - start
            if not self.trainer.running and (done or now - began > LATEST):
                return
            if not done:
                if now - began > LATEST:
                    share = self.trainer.share_of_step
                    self.tell((now - began) / (share or 1.0), at_least=not share)
                continue
            last = (now, done) if done > last[1] else last
            first = first or last  # it chooses algorithms and fills caches: what follows is what counts
            if now - first[0] > SOON and done > first[1]:
                self.tell((last[0] - first[0]) / (done - first[1]))
            elif now - first[0] > LATER:
                self.tell((first[0] - began) / first[1])


def work_of(trainer: Trainer) -> float:
    """Return a rough measure of the work of a step in this process: weights times pixels times images."""
    config = trainer.config
    rows = trainer.world.rows(config.train.batch_size)[1]
    return parameter_count(trainer.state.student.network) * config.data.resolution**2 * float(rows)


def let_signals_in(trainer: Trainer) -> None:
    """Make backward passes enter Python at every weight, the only way for them to notice a signal before they end."""

    def listen(weight: Tensor) -> None:
        """Do nothing: Python looks at signals when a function is called."""

    for parameter in trainer.state.parameters():
        parameter.register_post_accumulate_grad_hook(listen)


def timed_passes(trainer: Trainer) -> float:
    """Return the seconds that a step will take, from passes of a few images; no state changes.

    A pass costs something by itself and something for each image: two sizes tell them apart.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            few = min(2, trainer.pass_size)
            first = _pass(trainer, few)  # it chooses algorithms as well
            first = min(first, _pass(trainer, few)) if first < SLOW / 2 else first
            if first > SLOW or 2 * few > trainer.pass_size:
                for_each = first / few
            else:
                second = _pass(trainer, 2 * few)
                for_each = max(second - first, second / 4) / few
        finally:
            trainer.state.clear_gradients()
    rows = trainer.world.rows(trainer.config.train.batch_size)[1]
    return math.ceil(rows / trainer.pass_size) * max(first - few * for_each, 0.0) + rows * for_each


def _pass(trainer: Trainer, count: int) -> float:
    """Do a pass of the step's first `count` rows and return its seconds."""
    state, total = trainer.state, trainer.config.train.batch_size
    start, began = trainer.world.rows(total)[0], time.perf_counter()
    x0, label, told = trainer.batches.take(state.step, start, count)
    rows = Slice(state.noise_seed, state.step, start, total)
    draw = trainer.objective.draw(x0, label, trainer.curriculum(), rows, told)
    trainer.descend(trainer.objective.loss(trainer.nets, draw))
    return time.perf_counter() - began


def expectation(config: RunConfig, steps: int, seconds: float, device: str, at_least: bool = False) -> str:
    """Return the sentence on how long `steps` steps of `seconds` each take, and what to do instead if that is too long.

    `at_least`: the seconds are a lower bound, since the first step has not ended.
    """
    whole = steps * seconds
    if at_least:
        said = f"more than {human_time(whole)} to go on this machine: the first step has taken {seconds:.0f} s so far"
    else:
        said = f"about {human_time(whole)} to go on this machine at {config.train.batch_size / seconds:,.3g} images/s"
    return said + advice(config, seconds) if device == "cpu" and whole > DAY else said


def advice(config: RunConfig, seconds: float) -> str:
    """Return what is reasonable on a CPU in place of a run with `seconds` a step."""
    words, whole = smaller(config, seconds)
    said = ". That is too long for a processor; this preset is made for a GPU"
    if words:
        said += f". Here {' '.join(words)} takes about {human_time(whole)}"
    return f"{said}; cmtool presets shows smaller ones"


def smaller(config: RunConfig, seconds: float) -> tuple[list[str], float]:
    """Return options that make a run bearable, and its seconds; no options if none are enough.

    A student of another model keeps that model's shape. Pictures shrink only where they come from the user's files.
    """
    free = config.recipe.needs == "nothing"
    side, channels, batch = config.data.resolution, config.network.channels, config.train.batch_size
    cuts = [
        (
            ["--set", "data.resolution=32"],
            (32 / side) ** 2 * CLUMSY,
            free and side > 32 and config.data.path is not None,
        ),
        (["--set", "network.channels=32"], (32 / channels) ** 2 * CLUMSY, free and channels > 64),
        (["--batch-size", "32"], 32 / batch, batch > 32),
    ]
    words: list[str] = []
    steps = config.train.steps
    for more, share, possible in cuts:
        if steps * seconds > BEARABLE and possible and share < 1 and _holds(config, [*words, *more]):
            words, seconds = words + more, seconds * share
    if steps * seconds > BEARABLE:
        steps = int(BEARABLE / seconds)
        steps -= steps % (1000 if steps >= 10_000 else 100)
        words += ["--steps", str(steps)]
    return (words, steps * seconds) if steps >= LEAST_STEPS else ([], 0.0)


def _holds(config: RunConfig, words: list[str]) -> bool:
    """Whether the preset takes such options."""
    sets = [word for word in words if "=" in word]
    if "--batch-size" in words:
        sets.append(f"train.batch_size={words[words.index('--batch-size') + 1]}")
    try:
        resolve(config.preset, recipe=config.recipe_name, sets=sets, flags={"data.path": config.data.path})
    except UserError:
        return False
    return True
