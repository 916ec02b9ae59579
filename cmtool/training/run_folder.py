"""A run's folder: its configuration, checkpoints, metrics and lock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmtool.checkpoint import read_header, verify
from cmtool.config.load import differing_keys, from_toml, to_toml
from cmtool.config.schema import RunConfig
from cmtool.errors import CheckpointError, DivergenceError, UserError
from cmtool.files.atomic import atomic_text, writing
from cmtool.training.lock import NAME as LOCK

# What the folder of a planned run holds beside its last stage: the plan, and the folders of the stages before.
PLAN, STAGES = "plan.toml", ("teacher", "student", "polish")


@dataclass(frozen=True)
class RunFolder:
    """The files of a run and the operations on them."""

    path: Path

    @property
    def model(self) -> Path:
        """The finished model: the sampling average."""
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        """The best model by the evaluations during training."""
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON row per report."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sample grids made during training."""
        return self.path / "samples"

    def finished(self) -> bool:
        """Whether the model of this run exists."""
        return self.model.is_file()

    def damage(self) -> str | None:
        """Return what is wrong with the finished model; None if every bit is right."""
        try:
            verify(self.model)
        except CheckpointError as error:
            return error.message
        return None

    def checkpoint(self, step: int) -> Path:
        """The state file of a step."""
        return self.path / "checkpoints" / f"step-{step:07d}" / "state.safetensors"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, state file) of every checkpoint, newest first."""
        found = []
        for file in (self.path / "checkpoints").glob("step-*/state.safetensors"):
            with contextlib.suppress(ValueError):
                found.append((int(file.parent.name.removeprefix("step-")), file))
        return sorted(found, reverse=True)

    def data_of_checkpoint(self) -> dict[str, Any] | None:
        """Return the data table of the newest checkpoint that has one: classes, names, source."""
        for _, file in self.checkpoints():
            with contextlib.suppress(CheckpointError):
                found = read_header(file).get("data")
                if found is not None:
                    return dict(found)
        return None

    def spent(self) -> float | None:
        """Return the seconds spent by the newest checkpoint of a run that follows a clock; None if none says."""
        for _, file in self.checkpoints():
            with contextlib.suppress(CheckpointError):
                clock = read_header(file).get("clock") or {}
                return clock.get("spent")
        return None

    def kept(self, error: DivergenceError) -> DivergenceError:
        """Return the error with a note on what is left of the run: its last checkpoint, or nothing yet."""
        left = "the last checkpoint is kept" if self.checkpoints() else "no checkpoint had been written yet"
        return DivergenceError(f"{error.message.removesuffix('.')}; {left}.", error.hint)

    def prune(self, keep_every: int) -> None:
        """Remove all but the last two checkpoints and those whose step `keep_every` divides (0: none)."""
        found = self.checkpoints()
        kept = [file.parent for step, file in found if keep_every and step % keep_every == 0]
        kept += [file.parent for _, file in found[:2]]
        for folder in (self.path / "checkpoints").glob("step-*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self, file: Path) -> None:
        """Rename a damaged checkpoint so that it is not tried again; it is removed once newer ones are kept."""
        with contextlib.suppress(OSError):
            file.replace(file.with_name("damaged.safetensors"))

    def sweep(self) -> None:
        """Remove the temporary files that killed writers left behind. Call it only while holding the lock."""
        for folder in (self.path, self.samples, *(self.path / "checkpoints").glob("step-*")):
            for file in folder.glob(".*.tmp-*"):
                with contextlib.suppress(OSError):
                    file.unlink()

    def data(self) -> str | None:
        """Return the fingerprint of the data that the run last trained on; None if `run.log` has none."""
        with contextlib.suppress(OSError):
            for line in reversed((self.path / "run.log").read_text(encoding="utf-8", errors="replace").splitlines()):
                said = line.partition(" start at step ")[2].partition("{")
                with contextlib.suppress(ValueError, AttributeError):
                    return json.loads(said[1] + said[2]).get("data")
        return None

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return the undamaged rows of `metrics.jsonl` (a kill leaves the last line half-written)."""
        return [row for row in map(_row, self._lines()) if row is not None]

    def _lines(self) -> list[str]:
        if not self.metrics.is_file():
            return []
        return self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)

    def damaged_rows(self) -> int:
        """Return how many lines of `metrics.jsonl` are damaged, not counting an unfinished last one."""
        return sum(_row(line) is None for line in self._lines() if line.endswith("\n"))

    def forget_after(self, step: int) -> None:
        """Drop rows beyond `step`: the resumed run will write them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        if self.metrics.is_file():
            atomic_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("eval", {}), dict)
    return row if whole else None


def check_run(path: Path, config: RunConfig, fresh: bool = False) -> RunFolder:
    """Return the folder `path` if `config` may run there; nothing is written.

    Raises:
        UserError: if it holds another configuration (the message names the differing keys), or is not a run folder.
    """
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a run folder.", "choose another folder with --out")
    settings = path / "config.toml"
    if fresh or not path.is_dir():
        return folder
    if not settings.is_file():
        if any(entry.name not in (LOCK, PLAN, *STAGES) and not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run.", "choose another folder with --out")
        return folder
    if not os.access(settings, os.R_OK):  # not damaged: --fresh would be the wrong advice
        raise CheckpointError(f"no permission to read {settings}.", "check who owns the run")
    try:
        old = from_toml(settings)
    except UserError as error:
        raise CheckpointError(f"{settings} is damaged: {error.message}", "start over with --fresh") from error
    _same_run(path, old, config)
    return folder


def _same_run(path: Path, old: RunConfig, config: RunConfig) -> None:
    changed = differing_keys(old, config)
    if changed:
        listed = "; ".join(f"{key}: {was} there, {now} here" for key, was, now in changed[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise UserError(
            f"{path} holds a run of another configuration ({listed}{more}).",
            "choose another folder with --out, or start over with --fresh",
        )


def open_run(path: Path, config: RunConfig, fresh: bool = False) -> RunFolder:
    """Open `path` for `config`: a new folder, or one with the same configuration. The caller must hold the lock.

    Raises:
        UserError: as for `check_run`, or if the place cannot be written.
    """
    folder = check_run(path, config, fresh)
    settings = path / "config.toml"
    if fresh and path.is_dir():
        with writing(path):
            _clear(path)
    if not settings.is_file():
        atomic_text(settings, to_toml(config))
    folder.sweep()
    return folder


def clear_plan(path: Path) -> None:
    """Remove a plan with all that its stages wrote, and nothing else. The caller must hold the lock."""
    for folder in (*(path / name for name in STAGES), path):
        if (folder / "config.toml").is_file():
            _clear(folder)
        if folder != path and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    (path / PLAN).unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Remove what a run writes, and nothing that a user may have put there."""
    names = ["model.safetensors", "best.safetensors", *(file.name for file in path.glob("ema-*.safetensors"))]
    # The settings are removed last: a kill halfway leaves a folder that --fresh (or the same command) still knows.
    for name in (*names, "checkpoints", "samples", "metrics.jsonl", "evaluations.jsonl", "before-decay.safetensors",
                 "tensorboard", "wandb", "run.log", "config.toml"):  # fmt: skip
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
