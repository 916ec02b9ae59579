"""A run's folder: its configuration, checkpoints, metrics and lock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmtool.checkpoint import atomic_text, writing
from cmtool.config.compare import differing_keys
from cmtool.config.load import from_toml, to_toml
from cmtool.config.schema import RunConfig
from cmtool.errors import CheckpointError, UserError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; see DESIGN section 7."""

    path: Path

    @property
    def model(self) -> Path:
        """The finished model: the sampling average."""
        return self.path / "model.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON row for each report."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sample grids made on the way."""
        return self.path / "samples"

    @property
    def lock(self) -> Path:
        """Names the process that is training here."""
        return self.path / "run.lock"

    def finished(self) -> bool:
        """Whether the model of this run exists."""
        return self.model.is_file()

    def checkpoint(self, step: int) -> Path:
        """The state file of a step."""
        return self.path / "checkpoints" / f"step-{step:07d}" / "state.safetensors"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, state file) of every checkpoint that is there, newest first."""
        found = []
        for file in (self.path / "checkpoints").glob("step-*/state.safetensors"):
            with contextlib.suppress(ValueError):
                found.append((int(file.parent.name.removeprefix("step-")), file))
        return sorted(found, reverse=True)

    def prune(self, keep_every: int) -> None:
        """Remove all but the last two checkpoints and those whose step `keep_every` divides (0: none)."""
        for step, file in self.checkpoints()[2:]:
            if not (keep_every and step % keep_every == 0):
                shutil.rmtree(file.parent, ignore_errors=True)

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`; a half-written last line is dropped."""
        found: list[dict[str, Any]] = []
        if self.metrics.is_file():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def forget_after(self, step: int) -> None:
        """Drop rows beyond `step`: the resumed run will write them again."""
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        if self.metrics.is_file():
            atomic_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


def open_run(path: Path, config: RunConfig, fresh: bool = False) -> RunFolder:
    """Open `path` for `config`: a new folder, or one that holds the same configuration.

    Raises:
        UserError: if it holds another configuration (the differing keys are named), or is no run folder.
    """
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a run folder.", "choose another folder with --out")
    settings = path / "config.toml"
    if settings.is_file() and not fresh:
        try:
            old = from_toml(settings)
        except UserError as error:
            raise CheckpointError(f"{settings} is damaged: {error.message}", "start over with --fresh") from error
        changed = differing_keys(old, config)
        if changed:
            listed = "; ".join(f"{key}: {was} there, {now} here" for key, was, now in changed[:6])
            more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise UserError(
                f"{path} holds a run of another configuration ({listed}{more}).",
                "choose another folder with --out, or start over with --fresh",
            )
        return folder
    if path.is_dir() and any(path.iterdir()) and not settings.is_file() and not fresh:
        raise UserError(f"{path} is not empty and holds no run.", "choose another folder with --out")
    if fresh and path.is_dir():
        _clear(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    atomic_text(settings, to_toml(config))
    return folder


def _clear(path: Path) -> None:
    """Remove what a run writes, and nothing else a user may have put there."""
    names = ("checkpoints", "samples", "metrics.jsonl", "config.toml", "model.safetensors", "best.safetensors")
    for name in (*names, "evaluations.jsonl", "run.log"):
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Hold the run's lock: a second process is refused with the first one's pid and host; a stale lock is replaced.

    Raises:
        UserError: if another live process trains in this folder.
    """
    mine = {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        try:
            with writing(folder.lock):
                handle = os.open(folder.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except UserError:
            if not folder.lock.exists():
                raise
        else:
            with os.fdopen(handle, "w") as stream:
                json.dump(mine, stream)
            break
        try:
            other = json.loads(folder.lock.read_text())
            pid, host = int(other["pid"]), str(other["host"])
        except (OSError, ValueError, KeyError, TypeError):
            pid, host = -1, mine["host"]
        if host != mine["host"] or (pid > 0 and pid != mine["pid"] and _alive(pid)):
            raise UserError(
                f"another process (pid {pid} on {host}) is training in {folder.path}.",
                f"wait for it, or remove {folder.lock} if it is gone",
            )
        folder.lock.unlink(missing_ok=True)
    try:
        yield
    finally:
        folder.lock.unlink(missing_ok=True)
