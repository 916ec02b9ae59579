"""What a training is asked for, and the settings and folder of its run; refuses mistakes without torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmtool.api.find import find_model
from cmtool.checkpoint import read_header
from cmtool.config.explain import is_given
from cmtool.config.judgments import as_named, describe_judging, is_teacher_of
from cmtool.config.load import Preset, Resolved, from_toml, resolve
from cmtool.config.schema import DataConfig, Family, RunConfig
from cmtool.config.sources import DATA_SOURCES, SOURCES, named_source
from cmtool.errors import CheckpointError, DataError, UsageError, UserError, install_extra, nearest, unknown
from cmtool.samplers.plan import misfit
from cmtool.talk import SILENCE, Talk

if TYPE_CHECKING:
    from cmtool.data.dataset import Dataset
    from cmtool.data.sources.base import Source
    from cmtool.training.diagnosis import Diagnosed
    from cmtool.training.report import Listener

TRACKERS = ("tensorboard", "wandb")
Settings = Mapping[str, Any] | Sequence[str]
Images = int | Literal["auto"] | None
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]


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


@dataclass(frozen=True)
class Training:
    """What `cmtool.train` is asked for.

    Args:
        data: folder or file of images, planned for, or in place of the preset's.
        preset: a preset's name, or the path of a TOML file, a plan's too; None: a plan, without `data` "digits".
        family: "ct", "cd" or "edm" (what `train-ct`, ... take); None: that of the recipe, usually "ct".
        recipe: a recipe of the preset, or any method by name; None: the preset's default.
        out: the run folder; None: `runs/<preset>-<recipe>`.
        name: the folder is `runs/<name>`, in place of `out`.
        extend: a finished run to continue from before its decay, up to `steps`.
        time: within this time the model is there, "30m" or seconds: the number of steps follows the clock. A plan
            without `time` and `steps` is one for 30 minutes; `steps` win over it.
        steps: optimizer steps; every schedule scales with it. In a plan those of the last stage.
        resolution: side of the images in pixels.
        batch_size: images per optimizer step; "auto": the preset's number, in parts that fit in memory.
        micro_batch: images at once; "auto": halved until they fit.
        seed: seed of weights, noise and data order.
        small: what to do with images smaller than the resolution; usually "skip".
        fit: how images of other shapes become square; usually "crop".
        init: a model whose weights the student starts from.
        teacher: the diffusion model to distil; None: the newest finished run that fits.
        settings: any setting, as {"train.lr": 1e-4} or as `--set` takes them, ["train.lr=1e-4"].
        precision: number format; "auto" suits the device.
        deterministic: use only algorithms whose results repeat bit for bit (GPU).
        device: "auto" (the fastest present), "cpu", "cuda" or "mps".
        fresh: start over: remove what the run folder holds.
        anyway: train although a plan advises against it (too few pictures, too little time).
        dry_run: resolve and check the settings, write nothing; the result's `config` holds them, or its `plan`.
        max_time: save and stop after this long: "3h55m", or seconds.
        diagnose: measure discrepancy and transport cost per noise level, into `discrepancy.jsonl`; a function
            is called with (step, levels) each time.
        track: also write for "tensorboard" or "wandb".
        talk: told what happens; silent if not given.
        listener: gets every report of losses and figures as numbers, see `cmtool.training.report.Listener`.
    """

    data: str | Path | None = None
    _: KW_ONLY
    preset: str | None = None
    family: Family | None = None
    recipe: str | None = None
    out: str | Path | None = None
    name: str | None = None
    extend: str | Path | None = None
    time: str | float | None = None
    steps: int | None = None
    resolution: int | None = None
    batch_size: Images = None
    micro_batch: Images = None
    seed: int | None = None
    small: Literal["skip", "upscale"] | None = None
    fit: Literal["crop", "pad", "stretch"] | None = None
    init: str | Path | None = None
    teacher: str | Path | None = None
    settings: Settings = ()
    precision: Precision = "auto"
    deterministic: bool = False
    device: str = "auto"
    fresh: bool = False
    anyway: bool = False
    dry_run: bool = False
    max_time: str | float | None = None
    diagnose: bool | Diagnosed = False
    track: Sequence[str] = ()
    talk: Talk = SILENCE
    listener: Listener | None = None

    def flags(self, limit: float | None) -> dict[str, Any]:
        """Return the settings that have an argument of their own, by key, with the time in seconds; None: not named.

        The training batch is a fixed setting; "auto" lets the machine decide only how much of it is computed at once.
        """
        auto = "auto" in (self.batch_size, self.micro_batch) and self.micro_batch in (None, "auto")
        return {
            "train.steps": self.steps,
            "train.time": limit,
            "train.batch_size": None if self.batch_size == "auto" else self.batch_size,
            "train.micro_batch": "auto" if auto else self.micro_batch,
            "train.seed": self.seed,
            "train.precision": None if self.precision == "auto" else self.precision,
            "train.deterministic": self.deterministic or None,
            "data.path": _text(self.data),
            "data.resolution": self.resolution,
            "data.small": self.small,
            "data.fit": self.fit,
            "init": _text(self.init),
            "teacher": _text(self.teacher),
        }

    def place(self) -> Place:
        """Return where the run goes."""
        return Place(None if self.out is None else Path(self.out), self.name)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


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
            path = find_model(value, kinds=kinds, option=f"--{name}", preset=config.preset).path
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
    option = "--set recipe.direction.weak"
    found = find_model(part.weak, kinds=("diffusion",), option=option, preset=config.preset)
    # Whether the images are latents is known only once they are opened; then `training.setup` asks again.
    theirs = {**as_named(found.header["data"]), "latent": None}
    ours = {**config.data.model_dump(), "num_classes": config.data.labels, "latent": None}
    if reason := misfit({**found.header, "data": theirs}, ours):
        raise CheckpointError(f"{found.path} cannot be the weak model: {reason}.", "name a smaller or earlier teacher")
    recipe = config.recipe.model_copy(update={"direction": part.model_copy(update={"weak": str(found.path)})})
    return config.model_copy(update={"recipe": recipe})


def plan_extension(old: Path, asked: Training) -> RunPlan:
    """Make the folder of the run that extends the finished run `old` (unless `dry_run`), and return its settings.

    Raises:
        UserError: the run is of another family, not finished, already as long, or keeps no state from before its
            decay; or settings are given that the run has already decided.
    """
    from cmtool.training.extend import extended, prepare_extension, state_before_decay
    from cmtool.training.inherit import check_needs
    from cmtool.training.run_folder import RunFolder

    config, steps = _config_of(old, asked.family), asked.steps
    if steps is None:
        raise UsageError("--extend needs --steps, the length to go on to.", f"e.g. --steps {2 * config.train.steps}")
    changed = ", ".join(f"--{key}" for key, value in _decided(asked).items() if value not in (None, (), [], {}))
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
    folder = asked.place().folder(f"{old.resolve().name}-{steps}")
    state = state_before_decay(old, config)
    if not asked.dry_run:
        if asked.fresh:
            raise UsageError("--fresh starts over and --extend goes on; give one of them.")
        step = prepare_extension(old, state, longer, folder)
        asked.talk.say(f"{old} goes on from step {step} to {steps} in {folder}; its schedules span the new length.")
    said = describe_judging(longer, decided=True)
    if said is not None:
        asked.talk.say(said)
    return RunPlan(longer, folder)


def _decided(asked: Training) -> dict[str, Any]:
    """Return, by the name of its option, what a finished run has already decided."""
    return {
        "recipe": asked.recipe,
        "data": asked.data,
        "small": asked.small,
        "fit": asked.fit,
        "batch-size": asked.batch_size,
        "micro-batch": asked.micro_batch,
        "seed": asked.seed,
        "init": asked.init,
        "teacher": asked.teacher,
        "set": asked.settings,
        "time": asked.time,
        "resolution": asked.resolution,
    }


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
