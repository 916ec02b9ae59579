"""Where the time of a training step goes, and with which batch and precision this machine trains fastest."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cmtool.checkpoint import save_model
from cmtool.config.condition import condition_of
from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset, from_tensors
from cmtool.data.images import from_uint8
from cmtool.errors import ConfigError
from cmtool.machine.recorded import WARM_UP
from cmtool.models import build_model
from cmtool.samplers.generate import out_of_memory
from cmtool.training.loop import Trainer
from cmtool.training.setup import fresh_student, prepare

PARTS = ("data", "noise and loss", "teacher", "target forward", "forward", "backward", "optimizer", "averages", "rest")
# The cost of the networks; everything else is overhead.
NETWORK = ("teacher", "target forward", "forward", "backward")
# Work that a step does once, however many passes it takes.
ONCE = ("optimizer", "averages", "rest")
# Seconds for which a trial runs steps.
SPAN = 0.5
# How much faster half precision must be to be worth its rounding, and the ratios that a single trial cannot settle.
WORTH, UNCLEAR = 1.1, (0.7, 1.4)


@dataclass
class Stopwatch:
    """Seconds spent in named parts; time in a nested part counts for the nested part only."""

    clock: Callable[[], float] = time.perf_counter
    synchronize: Callable[[], None] = lambda: None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inside: list[float] = field(default_factory=list)

    def timed(self, part: str | Callable[[], str], call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` with its time added to `part` (or to what `part()` answers when it is called)."""

        def run(*args: Any, **kwargs: Any) -> Any:
            name = part if isinstance(part, str) else part()
            self.synchronize()
            self._inside.append(0.0)
            began = self.clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.synchronize()
                whole = self.clock() - began
                self.seconds[name] += whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return run


def watch(trainer: Trainer, watch: Stopwatch) -> None:
    """From now on, let a stopwatch time the parts of a trainer's steps."""
    state, nets = trainer.state, trainer.nets

    def forward() -> str:
        return "forward" if torch.is_grad_enabled() else "target forward"

    for model in {nets.student, nets.target}:
        model.forward = watch.timed(forward, model.forward)  # type: ignore[method-assign]
    if nets.teacher is not None:
        nets.teacher.forward = watch.timed("teacher", nets.teacher.forward)  # type: ignore[method-assign]
    places: list[tuple[Any, str, str]] = [
        (trainer.batches, "take", "data"),
        (state.gradients, "descend", "backward"),
        (state.gradients, "clip", "optimizer"),
        (state.optimizer, "step", "optimizer"),
        (state, "advance_averages", "averages"),
        (trainer, "step", "rest"),
    ]
    for owner, name, part in places:
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    objective = trainer.objective
    for name in ("draw", "loss"):  # of a frozen dataclass
        object.__setattr__(objective, name, watch.timed("noise and loss", getattr(objective, name)))


def profile(trainer: Trainer, steps: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return seconds per step by part over `steps` steps, after one that is not counted; the trainer is used up."""
    trainer.replay = None  # a recording has no parts
    trainer.step()
    on_gpu = trainer.device.type == "cuda"
    stopwatch = Stopwatch(clock, torch.cuda.synchronize if on_gpu else lambda: None)
    watch(trainer, stopwatch)
    for _ in range(steps):
        trainer.step()
        trainer.has_news and trainer.state.step % trainer.config.train.log_every == 0 and trainer.report()
    return {part: stopwatch.seconds.get(part, 0.0) / steps for part in PARTS}


def whole_step(parts: dict[str, float], passes: float) -> dict[str, float]:
    """Return the seconds of a step of this many passes from those of a one-pass step."""
    return {name: value if name in ONCE else value * passes for name, value in parts.items()}


def overhead(parts: dict[str, float]) -> float:
    """Share of a step that is not spent in networks, in [0, 1]; the draw of noise and the loss count as network."""
    whole = sum(parts.values())
    return 1 - sum(parts[name] for name in (*NETWORK, "noise and loss")) / whole


def stand_in_data(config: RunConfig, count: int = 256) -> Dataset:
    """Return random bytes of the shape of a preset's images, or latents: they cost as much as real ones."""
    table = config.data
    g = torch.Generator().manual_seed(0)
    channels, side = table.shape
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=g)
    classes = (table.num_classes or 10) if table.labels else None
    labels = None if classes is None else torch.randint(0, classes, (count,), generator=g)
    data = from_tensors(images, labels, "random bytes", classes=classes)
    if table.latent is not None:
        law = torch.cat([from_uint8(images), torch.full(images.shape, 0.1)], dim=1).half()
        made = {"autoencoder": "", "hash": "", "norm": "", "shift": [0.0] * channels, "scale": [1.0] * channels}
        made |= {"pixels": [table.channels, table.resolution, table.resolution]}
        return replace(data, storage=law, latent=made, info=replace(data.info, source="random latents"))
    seen = condition_of(table.model_dump())
    return data if seen is None or seen.is_derived else replace(data, beside=images)


def with_stand_ins(config: RunConfig, data: Dataset, folder: Path) -> RunConfig:
    """Give a recipe that needs a teacher or starting weights a model with fresh ones, written into `folder`."""
    recipe, found = config.recipe, {}
    roles = {"teacher": (recipe.takes_teacher, "diffusion"), "init": (recipe.needs_init, "diffusion")}
    if recipe.goes_on:
        roles["init"] = (True, "consistency")
    process = config.process.model_copy(update={"truncated_at": None}).model_dump(mode="json")
    for role, (needed, kind) in roles.items():
        if needed and getattr(config, role) is None:
            model = build_model({**fresh_student(config, data).header, "kind": kind, "process": process})
            found[role] = str(folder / f"stand-in-{role}.safetensors")
            save_model(Path(found[role]), model.network.state_dict(), model.header)
    return config.model_copy(update=found)


@dataclass(frozen=True)
class Trial:
    """One precision and micro-batch: seconds per pass over that many images, and memory in bytes."""

    precision: str
    batch: int
    seconds: float
    memory: int

    @property
    def images_per_s(self) -> float:
        """Training speed."""
        return self.batch / self.seconds


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _step(trainer: Trainer) -> float:
    """Do a step and return its seconds."""
    began = time.perf_counter()
    trainer.step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - began


def _warm(config: RunConfig, data: Dataset, device: torch.device, precision: str, batch: int) -> Trainer:
    """Return a trainer of `batch` images a step whose first steps are done."""
    train = config.train.model_copy(update={"batch_size": batch, "micro_batch": None, "precision": precision})
    trainer = prepare(config.model_copy(update={"train": train}), data, device)
    for _ in range(1 if trainer.replay is None else WARM_UP + 1):
        _step(trainer)
    return trainer


def trial(config: RunConfig, data: Dataset, device: torch.device, precision: str, batch: int) -> Trial:
    """Time a step of `batch` images: the fastest of two, or of those of `SPAN` seconds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = _warm(config, data, device, precision, batch)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < SPAN:
        seconds.append(_step(trainer))
    return Trial(precision, batch, min(seconds), peak_memory(device))


def in_turns(config: RunConfig, data: Dataset, device: torch.device, one: Trial, other: Trial) -> float:
    """Return by what factor `other` trains more images a second than `one`: the median over pairs of steps.

    A shared machine can be a fifth faster in one second than in the next; pairs cancel that. Steps that take seconds
    are not repeated.
    """
    by_trials = other.images_per_s / one.images_per_s
    if one.seconds + other.seconds > 8 * SPAN:
        return by_trials
    try:
        first, second = (_warm(config, data, device, found.precision, found.batch) for found in (one, other))
        ratios: list[float] = []
        began = time.perf_counter()
        while len(ratios) < 3 or time.perf_counter() - began < 4 * SPAN:
            ratios.append(_step(first) / one.batch * other.batch / _step(second))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return by_trials  # the two do not fit in memory together
    return median(ratios)


def best_of(trials: Sequence[Trial], gain: Callable[[Trial, Trial], float]) -> Trial:
    """Return the fastest trial; the exact one in float32, unless half precision is faster by a factor of `WORTH`.

    `gain(one, other)` measures again by what factor the other is faster, if the trials leave that undecided.
    """
    fastest = max(trials, key=lambda found: found.images_per_s)
    exact, halves = ([t for t in trials if (t.precision == "fp32") == wanted] for wanted in (True, False))
    if not exact or not halves:
        return fastest
    # With the same batch, if both were tried with it: which batch does better has nothing to do with precision.
    one, other = (max(found, key=lambda t: (t.batch == fastest.batch, t.images_per_s)) for found in (exact, halves))
    ratio = other.images_per_s / one.images_per_s
    if not UNCLEAR[0] < ratio < UNCLEAR[1]:
        return other if ratio > 1 else one
    return other if gain(one, other) > WORTH else one


def search(config: RunConfig, data: Dataset, device: torch.device, seconds: float) -> Iterator[Trial]:
    """Yield trials in the precisions that the recipe can take, doubling the batch until time, memory or the batch ends.

    Args:
        config: what would be trained; its batch size is the largest tried.
        data: images of its shape.
        device: where.
        seconds: time limit for each precision; the first trial is always made.
    """
    wanted = config.train.precision
    for precision in ("fp32", "bf16") if wanted == "auto" else (wanted,):
        batch, ends = min(8, config.train.batch_size), time.perf_counter() + seconds
        while True:
            try:
                found = trial(config, data, device, precision, batch)
            except ConfigError:
                if wanted == "auto":
                    break  # the recipe does not train in this precision
                raise
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or batch == 1:
                    raise
                break
            yield found
            largest = batch == config.train.batch_size
            batch = min(2 * batch, config.train.batch_size)
            if largest or time.perf_counter() + 3 * found.seconds * batch / found.batch > ends:
                break
