"""Around a training run: its name, a finished run that goes on, trackers. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.errors import DataError, UsageError, UserError, install_extra, nearest, unknown

if TYPE_CHECKING:
    from cmtool.cli.output import Output
    from cmtool.config.schema import DataConfig, RunConfig

TRACKERS = ("tensorboard", "wandb")
# What the run that goes on has decided already.
DECIDED = ("recipe", "data", "small", "fit", "batch_size", "micro_batch", "seed", "init", "teacher", "sets")


def run_folder(given: dict[str, Any], usual: str) -> Path:
    """Return where a run goes: `--out`, `runs/NAME`, or `runs/` and the usual name.

    Raises:
        UsageError: both are given, or the name is no single folder's.
    """
    name = given["name"]
    if name is None:
        return given["out"] or Path("runs") / usual
    if given["out"] is not None:
        raise UsageError("--name and --out both say where the run goes; give one of them.")
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise UsageError(f"--name {name!r} is no name of a folder.", "letters, digits, - . _ +; another place: --out")
    return Path("runs") / name


def check_data(data: DataConfig) -> None:
    """Refuse data that are not named or not there, without loading anything.

    Raises:
        DataError: with what to name.
    """
    from cmtool.config.sources import DATA_SOURCES, SOURCES

    if data.path is None:
        if SOURCES[data.source].needs_path:
            raise DataError(f"the data source '{data.source}' needs a path.", "name a folder or file with --data")
        return
    place = Path(data.path.removeprefix("lsun:")).expanduser()
    if data.path not in DATA_SOURCES and not place.exists():
        close = nearest(data.path, DATA_SOURCES)
        hint = f"did you mean {close[0]}?" if close else "name a folder of images or a data file with --data"
        raise DataError(f"there is no data at {place}.", hint)


def check_trackers(names: Sequence[str] | None) -> None:
    """Refuse a tracker that is unknown, or whose package is not installed.

    Raises:
        UsageError: an unknown tracker.
        UserError: its package is missing.
    """
    for name in names or ():
        if name not in TRACKERS:
            raise UsageError(unknown("tracker", name, TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name} needs the package {name}.", install_extra("track"))


def extension(family: str, given: dict[str, Any], output: Output) -> tuple[RunConfig, Path]:
    """Make the folder of a finished run that goes on, and return its settings and the folder.

    Raises:
        UserError: the run is of another family, not finished, too long already, or keeps no state from before its
            decay; or settings are given that the run has decided.
    """
    from cmtool.training.extend import extended, prepare_extension, state_before_decay
    from cmtool.training.run_folder import RunFolder

    old = Path(given["extend"])
    config = _config_of(old, family, given)
    if not RunFolder(old).finished():
        raise UserError(f"the run in {old} is not finished.", "its own command goes on with it; --extend is for later")
    longer = extended(config, given["steps"], old)
    folder = run_folder(given, f"{old.resolve().name}-{given['steps']}")
    state = state_before_decay(old, config)
    if not given["dry_run"]:
        if given["fresh"]:
            raise UsageError("--fresh starts over and --extend goes on; give one of them.")
        step = prepare_extension(old, state, longer, folder)
        output.say(
            f"{old} goes on from step {step} to {given['steps']} in {folder}; its schedules span the new length."
        )
    return longer, folder


def _config_of(old: Path, family: str, given: dict[str, Any]) -> RunConfig:
    from cmtool.config.load import from_toml

    if not (old / "config.toml").is_file():
        raise UserError(f"{old} is no run folder: it holds no config.toml.", "cmtool runs lists the runs")
    config = from_toml(old / "config.toml")
    if config.family != family:
        raise UserError(
            f"the run in {old} belongs to train-{config.family}, not to train-{family}.",
            f"cmtool train-{config.family} --extend {old} --steps N",
        )
    if given["steps"] is None:
        raise UsageError("--extend needs --steps, the length to go on to.", f"e.g. --steps {2 * config.train.steps}")
    changed = [key for key in DECIDED if given[key]]
    if changed:
        flags = ", ".join("--set" if key == "sets" else f"--{key.replace('_', '-')}" for key in changed)
        raise UsageError(f"{flags}: --extend goes on with the settings of {old}; leave it out.")
    return config
