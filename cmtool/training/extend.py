"""Train longer than planned: a finished run continues in a new folder, from before its learning rate decayed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cmtool.checkpoint import read_header
from cmtool.config.load import to_toml
from cmtool.config.schema import RunConfig, TrainConfig
from cmtool.errors import CheckpointError, UserError
from cmtool.files.atomic import atomic_text, writing
from cmtool.training.run_folder import RunFolder

if TYPE_CHECKING:
    from cmtool.training.session import Session

PLATEAU = "before-decay.safetensors"


def plateau_end(train: TrainConfig) -> int | None:
    """Return the last step before the learning rate begins to fall.

    None if it falls from the start, or never, or if the run follows a clock and no step is known before.
    """
    if train.decay == "none" or train.restart == "stage" or train.time is not None:
        return None
    return int(train.decay_start * train.steps) or None


def keep_plateau(session: Session) -> tuple[int, Callable[[], None]] | None:
    """Return the chore (interval, what to do) that keeps the training state from before the decay, if there is one."""
    end = plateau_end(session.config.train)
    if end is None:
        return None

    def chore() -> None:
        if session.state.step == end:
            session.state.save(session.folder.path / PLATEAU)

    return end, chore


def state_before_decay(path: Path, config: RunConfig) -> Path:
    """Return the training state that a run can continue from.

    Raises:
        CheckpointError: the run has none, because it decayed from the start or an older version kept none.
    """
    folder = RunFolder(path)
    end = plateau_end(config.train)
    if config.train.decay == "none":
        found = [file for _, file in folder.checkpoints()]
    else:
        found = [path / PLATEAU] if (path / PLATEAU).is_file() else []
        found += [file for step, file in folder.checkpoints() if end is not None and step <= end]
    if not found:
        raise CheckpointError(
            f"{path} keeps no training state from before its learning rate decayed.",
            f"train again with --steps, or start from its weights: --init {path}",
        )
    return found[0]


def extended(old: RunConfig, steps: int, path: Path) -> RunConfig:
    """Return the settings of the longer run.

    Raises:
        UserError: it would not be longer.
    """
    if steps <= old.train.steps:
        raise UserError(
            f"--steps {steps} is no longer than the {old.train.steps} steps of {path}.",
            f"e.g. --steps {2 * old.train.steps}",
        )
    return old.model_copy(update={"train": old.train.model_copy(update={"steps": steps})})


def prepare_extension(old: Path, state: Path, config: RunConfig, new: Path) -> int:
    """Make the folder of the longer run, whole or not at all, and return the step that it continues from.

    An existing folder is left alone: either it holds the same extension, or opening it will be refused.

    Args:
        old: the run to continue.
        state: its training state, from `state_before_decay`.
        config: the settings of the longer run.
        new: the folder to make.
    """
    step = int(read_header(state)["step"])
    if new.exists():
        return step
    building = new.with_name(f".{new.name}.extending")
    with writing(new):
        shutil.rmtree(building, ignore_errors=True)
        folder = RunFolder(building)
        target = folder.checkpoint(step)
        target.parent.mkdir(parents=True)
        shutil.copyfile(state, target)
        rows = [row for row in RunFolder(old).rows() if row.get("step", 0) <= step]
        atomic_text(folder.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        atomic_text(building / "run.log", f"continues {old} from step {step}\n")
        atomic_text(building / "config.toml", to_toml(config))
        new.parent.mkdir(parents=True, exist_ok=True)
        building.rename(new)
    return step
