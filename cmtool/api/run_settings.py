"""From a request to the settings of a run and its folder; refuses mistakes without torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.api.find import find_model
from cmtool.checkpoint import read_header
from cmtool.config.explain import is_given
from cmtool.config.judgments import describe_judging, is_teacher_of
from cmtool.config.load import Preset, Resolved, from_toml, resolve
from cmtool.config.schema import DataConfig, Family, RunConfig
from cmtool.config.sources import DATA_SOURCES, SOURCES, named_source
from cmtool.errors import DataError, UsageError, UserError, install_extra, nearest, unknown
from cmtool.talk import Talk

if TYPE_CHECKING:
    from cmtool.data.dataset import Dataset
    from cmtool.data.sources.base import Source

TRACKERS = ("tensorboard", "wandb")
Settings = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True)
class RunPlan:
    """What is trained and where; `origins` says for each setting that is not a default where it was written.

    `found` are the data where planning had to list them.
    """

    config: RunConfig
    folder: Path
    origins: dict[str, str] = field(default_factory=dict)
    found: Source | Dataset | None = None


@dataclass(frozen=True)
class Place:
    """Where a run goes: a folder, or a name below `runs/`; None takes the usual name."""

    out: Path | None = None
    name: str | None = None

    def folder(self, usual: str) -> Path:
        """Return the run folder.

        Raises:
            UsageError: both are given, or the name is not the name of a single folder.
        """
        if self.name is None:
            return self.out or Path("runs") / usual
        if self.out is not None:
            raise UsageError("--name and --out both say where the run goes; give one of them.")
        if not re.fullmatch(r"[\w][\w.+-]*", self.name):
            raise UsageError(
                f"--name {self.name!r} is no name of a folder.", "letters, digits, - . _ +; another place: --out"
            )
        return Path("runs") / self.name


def batch_flags(batch_size: int | str | None, micro_batch: int | str | None) -> dict[str, int | str | None]:
    """Return the settings that the two batch sizes mean.

    The training batch is a fixed setting; "auto" lets the machine decide only how much of it is computed at once.
    """
    found = {"train.batch_size": batch_size, "train.micro_batch": micro_batch}
    if "auto" in (micro_batch, batch_size) and micro_batch in (None, "auto"):
        found["train.micro_batch"] = "auto"
    return found | {"train.batch_size": None if batch_size == "auto" else batch_size}


def plan_run(
    preset: str | Preset,
    family: Family | None,
    recipe: str | None,
    settings: Settings,
    flags: Mapping[str, Any],
    place: Place,
    talk: Talk,
) -> RunPlan:
    """Resolve the settings of a run, and find its teacher or the model that it starts from.

    Raises:
        UserError: whatever is wrong with the settings or the models they name.
    """
    resolved = resolve(preset, family=family, recipe=recipe, sets=settings, flags=dict(flags))
    said = describe_judging(resolved.config, resolved.other_data)
    if said is not None:
        talk.say(said)
    config, found = _with_own_classes(resolved, talk)
    config = _with_models(_without_time(config, resolved.origins), talk)
    return RunPlan(config, place.folder(f"{config.preset}-{config.recipe_name}"), resolved.origins, found)


def _without_time(config: RunConfig, origins: Mapping[str, str]) -> RunConfig:
    """Leave out a preset's time where the steps are named."""
    if config.train.time is None or is_given(origins.get("train.time", "")):
        return config
    if not is_given(origins.get("train.steps", "")):
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"time": None})})


def _with_own_classes(resolved: Resolved, talk: Talk) -> tuple[RunConfig, Source | Dataset | None]:
    """Do without classes where only the preset asked for them and other pictures than its own have none."""
    config = resolved.config
    asked = is_given(resolved.origins.get("data.labels", ""))
    settled = asked or config.teacher or config.init or named_source(config.data.path)
    if settled or not resolved.other_data or not config.data.labels:
        return config, None
    check_data(config.data)
    from cmtool.data.load import find_data

    found = find_data(config.data)
    if found.classes is not None:
        return config, found
    talk.say(f"{config.data.path} has no classes, so the model learns none (one folder for each class makes them).")
    return config.model_copy(update={"data": config.data.model_copy(update={"labels": False})}), found


def _with_models(config: RunConfig, talk: Talk) -> RunConfig:
    """Name the teacher or the model to start from, and take over its network and scalings."""
    from cmtool.training.inherit import adopt, check_needs, check_teacher

    if config.recipe.takes_teacher and config.teacher is None:
        try:
            found = find_model(
                None,
                kinds=("diffusion",),
                fits=lambda header: is_teacher_of(config, header),
                wanted="teacher",
                option="--teacher",
            )
        except UserError:
            check_needs(config)
            raise
        talk.say(found.describe())
        config = config.model_copy(update={"teacher": str(found.path)})
    check_needs(config)
    headers = {}
    for name, kinds in (("teacher", ("diffusion",)), ("init", ("consistency", "diffusion"))):
        value = getattr(config, name)
        if value is not None:
            path = find_model(value, kinds=kinds, option=f"--{name}").path
            headers[name] = read_header(path)
            config = config.model_copy(update={name: str(path)})
    config = _with_weak(config)
    start = headers.get("init") or headers.get("teacher")
    adopted = config if start is None else adopt(config, start)
    if len(headers) == 2:
        check_teacher(config, headers["teacher"], headers["init"])
    return adopted


def _with_weak(config: RunConfig) -> RunConfig:
    """Find the model that a teacher is guided away from by its name, as other models are found."""
    part = config.recipe.direction
    if part.weak is None:
        return config
    found = find_model(part.weak, kinds=("diffusion",), option="--set recipe.direction.weak").path
    recipe = config.recipe.model_copy(update={"direction": part.model_copy(update={"weak": str(found)})})
    return config.model_copy(update={"recipe": recipe})


def plan_extension(
    old: Path,
    steps: int | None,
    family: Family | None,
    decided: Mapping[str, Any],
    place: Place,
    talk: Talk,
    dry_run: bool = False,
    fresh: bool = False,
) -> RunPlan:
    """Make the folder of the run that extends a finished one (unless `dry_run`), and return its settings.

    Args:
        old: the finished run.
        steps: the new length.
        family: the calling command's family; None takes any.
        decided: by option name, what the run has already decided; any value given here is refused.
        place: where the longer run goes.
        talk: told from which step the run continues.
        dry_run: write nothing.
        fresh: refused, because it would start over.

    Raises:
        UserError: the run is of another family, not finished, already as long, or keeps no state from before its
            decay; or settings are given that the run has already decided.
    """
    from cmtool.training.extend import extended, prepare_extension, state_before_decay
    from cmtool.training.inherit import check_needs
    from cmtool.training.run_folder import RunFolder

    config = _config_of(old, family)
    if steps is None:
        raise UsageError("--extend needs --steps, the length to go on to.", f"e.g. --steps {2 * config.train.steps}")
    changed = ", ".join(f"--{key}" for key, value in decided.items() if value not in (None, (), [], {}))
    if changed:
        raise UsageError(f"{changed}: --extend goes on with the settings of {old}; leave it out.")
    if not RunFolder(old).finished():
        raise UserError(f"the run in {old} is not finished.", "its own command goes on with it; --extend is for later")
    check_needs(config)
    if config.train.time is not None:
        raise UserError(
            f"the run in {old} followed a clock, and its schedules ended with it.", "train anew with --time"
        )
    longer = extended(config, steps, old)
    folder = place.folder(f"{old.resolve().name}-{steps}")
    state = state_before_decay(old, config)
    if not dry_run:
        if fresh:
            raise UsageError("--fresh starts over and --extend goes on; give one of them.")
        step = prepare_extension(old, state, longer, folder)
        talk.say(f"{old} goes on from step {step} to {steps} in {folder}; its schedules span the new length.")
    said = describe_judging(longer, decided=True)
    if said is not None:
        talk.say(said)
    return RunPlan(longer, folder)


def _config_of(old: Path, family: str | None) -> RunConfig:
    if not (old / "config.toml").is_file():
        raise UserError(f"{old} is no run folder: it holds no config.toml.", "cmtool runs lists the runs")
    config = from_toml(old / "config.toml")
    if family not in (None, config.family):
        raise UserError(
            f"the run in {old} belongs to train-{config.family}, not to train-{family}.",
            f"cmtool train-{config.family} --extend {old} --steps N",
        )
    return config


def check_data(data: DataConfig) -> None:
    """Refuse data that are not named or do not exist, without loading anything.

    Raises:
        DataError: says what to name.
    """
    if data.path is None:
        if SOURCES[data.source].needs_path:
            raise DataError(f"the data source '{data.source}' needs a path.", "name a folder or file with --data")
        return
    place = Path(data.path.removeprefix("lsun:")).expanduser()
    if data.path not in DATA_SOURCES and not place.exists():
        close = nearest(data.path, DATA_SOURCES)
        hint = f"did you mean {close[0]}?" if close else "name a folder of images or a data file with --data"
        raise DataError(f"there is no data at {place}.", hint)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown, or whose package is not installed.

    Raises:
        UsageError: an unknown tracker.
        UserError: its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(unknown("tracker", name, TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name} needs the package {name}.", install_extra("track"))
