"""A plan: from a look at pictures, a machine's speed and the time there is to a preset with its stages.

Everything here is a function of its arguments; `plan_preset` writes it down, `plan_run` looks and measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cmtool.config import laws
from cmtool.config.laws import Size, Stage
from cmtool.config.methods import METHODS
from cmtool.config.overrides import Override, parse_sets
from cmtool.config.schema import Family
from cmtool.errors import ConfigError, UsageError, UserError, unknown
from cmtool.units import human_time

if TYPE_CHECKING:
    from cmtool.data.look import Look


@dataclass(frozen=True)
class Wishes:
    """What the user named; None is for the plan to choose. Times in seconds."""

    family: Family = "ct"
    recipe: str | None = None
    time: float | None = None
    steps: int | None = None
    resolution: int | None = None
    batch_size: int | None = None
    teacher: str | None = None
    named: Mapping[str, Any] = field(default_factory=dict)
    settings: Sequence[str] | Mapping[str, Any] = ()
    anyway: bool = False

    @property
    def seconds(self) -> float:
        """The time that the plan is made for."""
        return self.time or laws.USUAL_TIME


@dataclass(frozen=True)
class Speeds:
    """Training images a second of `edm`, by (network, resolution), and what they were measured on."""

    measured: Mapping[tuple[str, int], float]
    device: str = "cpu"
    threads: int = 1
    memory: float | None = None
    precision: str = "fp32"

    def at(self, size: Size, resolution: int) -> float:
        """Return the speed of a network: as measured, else from that with the nearest work."""
        key = size.name, resolution
        if key in self.measured:
            return self.measured[key]
        wanted = size.work(resolution)
        measured = {known: laws.size_named(known[0]) for known in self.measured}
        alike = [known for known, other in measured.items() if other.kind == size.kind] or list(measured)
        works = {known: measured[known].work(known[1]) for known in alike}
        near = min(works, key=lambda known: max(works[known] / wanted, wanted / works[known]))
        return self.measured[near] * works[near] / wanted


@dataclass(frozen=True)
class Planned:
    """A stage with its steps, and the seconds from the start at which its model is there (None: however long).

    `micro` images fit into memory at once; None: all of a batch, 0: not even the weights do.
    """

    stage: Stage
    steps: int
    until: float | None
    micro: int | None = None


@dataclass(frozen=True)
class Choice:
    """What a plan has chosen; `ratio` is images seen in the first stage over images needed."""

    resolution: int
    channels: int
    labels: bool
    size: Size
    batch: int
    stages: tuple[Planned, ...]
    speed: float
    ratio: float
    dropout: float
    augment: float
    seconds: float

    @property
    def micro(self) -> int | None:
        """Images at once in the stage that needs the most memory."""
        return min((one.micro for one in self.stages if one.micro is not None), default=None)

    @property
    def expect(self) -> tuple[str, str]:
        """What to expect of it, in a word and in a sentence."""
        return laws.expectation(self.ratio)


def stages_of(wishes: Wishes) -> tuple[Stage, ...]:
    """Return the stages of a request: those of the law, or those that a named recipe needs.

    Raises:
        ConfigError: an unknown recipe, one of another command, or one that starts from a model nobody can train here.
    """
    way = laws.WAYS[wishes.family] if wishes.recipe is None else _way_to(wishes.recipe, wishes.family)
    return way[1:] if wishes.teacher and len(way) > 1 else way


def _way_to(recipe: str, asked: Family) -> tuple[Stage, ...]:
    """Return the stages that end with a recipe."""
    if recipe not in METHODS:
        raise ConfigError(unknown("recipe", recipe, METHODS), "cmtool train-ct --list-recipes")
    family = METHODS[recipe]["family"]
    if family != asked and not (asked == "ct" and family == "cd"):
        raise ConfigError(
            f"recipe '{recipe}' belongs to train-{family}, not to train-{asked}.",
            f"cmtool train-{family} --recipe {recipe} --data ...",
        )
    for way in (*laws.WAYS.values(), laws.POLISHED, (laws.SCRATCH,)):
        if way[-1].recipe == recipe:
            return way
    needs = METHODS[recipe].get("needs", "nothing")
    if needs in ("init", "consistency_init"):
        raise ConfigError(
            f"recipe '{recipe}' starts from a trained model, which a plan does not make.",
            "train one first, then name a preset and --init, e.g. --preset RUN/plan.toml --init RUN",
        )
    last = Stage(recipe, family, laws.STUDENT.share, laws.COSTS[family], "student", {})
    return (laws.TEACHER, last) if needs == "teacher" else (last,)


def check_wishes(wishes: Wishes, look: Look) -> None:
    """Refuse what no plan can help.

    Raises:
        UserError: too few pictures, unless `anyway`.
        UsageError: a resolution that no plan has.
    """
    if wishes.resolution is not None and wishes.resolution not in laws.RESOLUTIONS:
        listed = ", ".join(map(str, laws.RESOLUTIONS))
        raise UsageError(
            f"--resolution {wishes.resolution}: a plan knows {listed}.", "other sides: --preset NAME --resolution N"
        )
    if look.usable < laws.FEW_PICTURES and not wishes.anyway:
        pictures = "picture" if look.usable == 1 else "pictures"
        raise UserError(
            f"{look.path} has {look.usable} {pictures} to train on; of fewer than {laws.FEW_PICTURES} a model learns "
            "copies and little else.",
            ("cut it into tiles, or " if look.usable == 1 else "")
            + "add pictures; --anyway trains all the same; to edit single pictures use a model there is: "
            "cmtool edit --help",
        )


def named_settings(wishes: Wishes) -> list[Override]:
    """Return the settings that were named, `recipe.` for the last stage.

    Raises:
        ConfigError: no such setting.
    """
    given = [Override(tuple(key.split(".")), value, key) for key, value in wishes.named.items()]
    return [*given, *parse_sets(wishes.settings, stages_of(wishes)[-1].recipe)]


def with_named(wishes: Wishes) -> Wishes:
    """Let `--set data.resolution`, `train.steps`, `train.batch_size` and `train.time` be the options of these names."""
    keys = {"data.resolution": "resolution", "train.steps": "steps", "train.batch_size": "batch_size"}
    keys["train.time"] = "time"
    found = {keys[".".join(o.keys)]: o.value for o in named_settings(wishes) if ".".join(o.keys) in keys}
    numbers: dict[str, Any] = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return replace(wishes, **numbers)


# --- choosing --------------------------------------------------------------------------------------------------------


def resolutions_for(look: Look) -> list[int]:
    """Return the resolutions that pictures are large enough for, ascending; the smallest is always one."""
    side = look.side() * laws.ENLARGED
    return [r for r in laws.RESOLUTIONS if r <= side] or [laws.RESOLUTIONS[0]]


def sizes_for(wishes: Wishes, resolution: int) -> list[Size]:
    """Return the networks to choose from at a resolution, the weakest first: those that the named settings fit."""
    named = {o.keys[1]: o.value for o in named_settings(wishes) if len(o.keys) > 1 and o.keys[0] == "network"}
    able = [size for size in laws.SIZES if size.takes(named)] or list(laws.SIZES)
    return [size for size in able if resolution in size.sides] or able


def choose(look: Look, wishes: Wishes, speeds: Speeds) -> Choice:
    """Return what the laws make of pictures, wishes and speeds.

    The resolution is the largest at which a network of some size sees enough images in the time, and the network the
    largest that does. Where none does, it is the smallest resolution worth looking at, with the largest network that
    sees a fair share of them, or else the one that sees the most.

    Raises:
        UserError: the time is too short for anything; the message says the least.
    """
    sides = (
        [wishes.resolution] if wishes.resolution else [r for r in resolutions_for(look) if r > 8 or look.side() < 13]
    )
    every = [candidate(look, wishes, speeds, side, size) for side in sides for size in sizes_for(wishes, side)]
    fitting = [c for c in every if c.micro is None or c.micro > 0] or every
    good = [c for c in fitting if c.ratio >= 1 and c.size.name != "tiny"]
    if good:
        best = max(good, key=lambda c: (c.resolution, laws.SIZES.index(c.size)))
    else:
        lowest = [c for c in fitting if c.resolution == min(fitting, key=lambda c: c.resolution).resolution]
        fair = [c for c in lowest if c.ratio >= laws.FAIR]
        best = fair[-1] if fair else max(lowest, key=lambda c: c.ratio)
        if _least_steps(best) < laws.LEAST_STEPS and wishes.resolution is None:
            best = candidate(look, wishes, speeds, laws.RESOLUTIONS[0], laws.SIZES[0])
    _check_time(best, wishes, speeds)
    return best


def candidate(look: Look, wishes: Wishes, speeds: Speeds, resolution: int, size: Size) -> Choice:
    """Return what a run with this network at this resolution would be."""
    batch = wishes.batch_size or (max(size.batch, 128) if speeds.device.startswith("cuda") else size.batch)
    speed = speeds.at(size, resolution)
    free = speeds.memory
    planned = tuple(
        replace(one, micro=passes_in(size, resolution, batch, free, one.stage))
        for one in steps_of(wishes, speed / batch)
    )
    images = planned[0].steps * batch
    seen = sum(stage.steps for stage in planned) * batch / max(look.usable, 1)
    return Choice(
        resolution=resolution,
        channels=1 if look.color == 0 else 3,
        labels=has_classes(look),
        size=size,
        batch=batch,
        stages=planned,
        speed=speed,
        ratio=images / (laws.NEED[resolution] * size.need),
        dropout=laws.by_least(laws.DROPOUT, seen) if size.drops else 0.0,
        augment=laws.augmentation(look.usable),
        seconds=wishes.seconds if wishes.steps is None else _seconds(planned, speed / batch),
    )


def steps_of(wishes: Wishes, pace: float) -> tuple[Planned, ...]:
    """Return the stages with their steps at `pace` steps of `edm` a second.

    Named steps are those of the last stage; the earlier ones keep their share of the time to it.
    """
    stages = stages_of(wishes)
    total = sum(stage.share for stage in stages)
    if wishes.steps is not None:
        unit = wishes.steps * stages[-1].cost / stages[-1].share
        steps = [max(1, round(unit * stage.share / stage.cost)) for stage in stages[:-1]]
        return tuple(Planned(stage, n, None) for stage, n in zip(stages, [*steps, wishes.steps], strict=True))
    found, until = [], 0.0
    closing = min(laws.CLOSING, laws.JUDGING * wishes.seconds)
    for stage in stages:
        until += wishes.seconds * stage.share / total
        for_steps = max(wishes.seconds - laws.STARTING, 0.0) * stage.share / total * laws.STEPPING
        for_steps -= closing if stage is stages[-1] else 0.0
        found.append(Planned(stage, max(1, int(for_steps * pace / stage.cost)), until))
    return tuple(found)


def _seconds(planned: Sequence[Planned], pace: float) -> float:
    return sum(one.steps * one.stage.cost / pace for one in planned) / laws.STEPPING + laws.STARTING


def passes_in(size: Size, resolution: int, batch: int, free: float | None, stage: Stage) -> int | None:
    """Return images at once that fit into `free` bytes; None: all of the batch, 0: not even the weights do."""
    if free is None:
        return None
    fixed, each = size.memory(resolution)
    weights, kept = stage.memory
    room = laws.MEMORY_SHARE * free - weights * fixed
    if room >= batch * kept * each:
        return None
    micro = batch
    while micro > 1 and micro * kept * each > room:
        micro //= 2
    return micro if micro * kept * each <= room else 0


def has_classes(look: Look) -> bool:
    """Whether classes are worth learning: several, and most of them with some pictures."""
    if look.classes is None or len(look.classes) < 2:
        return False
    counts = sorted(look.classes.values())
    return counts[len(counts) // 2] >= laws.FEW_OF_A_CLASS


def _least_steps(choice: Choice) -> int:
    return min(one.steps for one in choice.stages)


def _check_time(choice: Choice, wishes: Wishes, speeds: Speeds) -> None:
    if wishes.steps is not None or wishes.anyway:
        return
    if _least_steps(choice) >= laws.LEAST_STEPS:
        return
    total = sum(one.stage.share for one in choice.stages)
    needed = [laws.LEAST_STEPS * one.stage.cost / one.stage.share for one in choice.stages]
    pace = choice.speed / choice.batch * laws.STEPPING
    least = total * max(needed) / pace + laws.STARTING
    raise UserError(
        f"{human_time(wishes.seconds)} are too short for anything at {choice.resolution} x {choice.resolution} on this "
        f"machine: the least is about {human_time(least)}, and several minutes for something to look at.",
        f"give --time {max(int(least) + 1, 300)}s, a smaller --resolution, or --anyway",
    )
