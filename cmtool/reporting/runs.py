"""What a run folder says, read without torch: configuration, reports, figures, grids, and where and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmtool.checkpoint import read_header
from cmtool.config.load import differing_keys, from_toml
from cmtool.config.schema import RunConfig
from cmtool.errors import CheckpointError, ConfigError, DataError, nearest
from cmtool.training.run_folder import RunFolder

# Reports in metrics.jsonl, evaluations in evaluations.jsonl.
_NUMBERS = {"step", "steps", "loss", "distance", "num_scales", "target_ema", "lr", "grad_norm", "images_per_s",
            "images_seen", "nfe", "count"}  # fmt: skip
_TABLES_OF_NUMBERS = {"bands", "eval", "metrics"}
_BAND = re.compile(r"(<|>=)\d+(\.\d*)?(e[+-]?\d{1,2})?")
# Python can hold larger integers, but no axis or float can.
_LARGEST = 1e15


def _is_number(value: Any) -> bool:
    """Whether a value is a number that can be drawn; NaN cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _kept(key: str, value: Any) -> Any:
    """Return a value if it is of its kind, with what of it is; else None."""
    if key in _NUMBERS:
        return value if _is_number(value) else None
    if key in _TABLES_OF_NUMBERS:
        table = value if isinstance(value, dict) else {}
        named = {name: number for name, number in table.items() if _is_number(number)}
        return {name: named[name] for name in named if key != "bands" or _BAND.fullmatch(name)}
    if key == "times":
        return [level for level in value if _is_number(level)] if isinstance(value, list) else None
    if key == "protocol":
        return value if isinstance(value, dict) else None
    return value


def sound(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the values whose type does not fit their keys."""
    kept = {key: _kept(key, value) for key, value in row.items()}
    return {key: value for key, value in kept.items() if value is not None}


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the valid rows of a file of JSON lines and skip all others; yield nothing if there is no file."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut off by a kill
        if isinstance(row, dict):
            yield sound(row)


# --- runs -------------------------------------------------------------------------------------------------------------


# Figures shown in a table of runs, and their headings.
SHOWN_FIGURES = {"fid": "FD", "kid": "KD", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class RunRecord:
    """One run: `rows` are the training reports, `judged` the evaluations during training, `evaluations` later ones."""

    path: Path
    config: RunConfig
    rows: tuple[dict[str, Any], ...]
    judged: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    header: dict[str, Any] | None
    log: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether its model exists."""
        return self.header is not None

    @property
    def step(self) -> int:
        """Steps done."""
        if self.header is not None:
            return int(self.header.get("step") or self.config.train.steps)
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def loss(self) -> float | None:
        """The last loss that was reported."""
        return self.rows[-1].get("loss") if self.rows else None

    @property
    def seconds(self) -> float | None:
        """Time spent in steps, from the speed of each report; None before the first."""
        spent, images = 0.0, 0
        for row in self.rows:
            seen, speed = int(row.get("images_seen") or 0), row.get("images_per_s")
            if speed:
                spent += max(seen - images, 0) / speed
            images = seen
        return spent or None

    @property
    def grids(self) -> list[tuple[int, Path]]:
        """(step, picture) of every sample grid, in order."""
        found = []
        for file in sorted((self.path / "samples").glob("step-*.png")):
            match = re.fullmatch(r"step-(\d+)", file.stem)
            if match:
                found.append((int(match[1]), file))
        return found

    @property
    def started(self) -> dict[str, Any]:
        """What the log says about its last start: command, versions, machine; empty when it says nothing."""
        for line in reversed(self.log):
            if " start at step " in line and "{" in line:
                try:
                    found = json.loads(line[line.index("{") :])
                except (ValueError, RecursionError):
                    continue  # cut off by a kill, or written by hand
                return found if isinstance(found, dict) else {}
        return {}

    def figures(self) -> dict[str, float]:
        """Return the newest known figures of one-step samples (of the usual sampler, for a teacher)."""
        usual = 1 if self.config.recipe.model_kind == "consistency" else None
        for row in reversed(self.evaluations):
            if usual is None or row.get("nfe") == usual:
                return {key: value for key, value in row.get("metrics", {}).items() if value is not None}
        return dict(self.judged[-1]["eval"]) if self.judged else {}


def read_run(path: Path) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        DataError: `path` is no run folder.
        ConfigError: its configuration cannot be read.
    """
    if not (path / "config.toml").is_file():
        known = [run.name for run in find_run_folders(path.parent)]
        close = nearest(path.name, known)
        did = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise DataError(f"{path} is no run folder: it holds no config.toml.{did}", "cmtool runs lists the runs")
    folder = RunFolder(path)
    rows = [sound(row) for row in folder.rows()]
    try:
        header = read_header(folder.model) if folder.finished() else None
    except CheckpointError:
        header = None
    log = path / "run.log"
    return RunRecord(
        path,
        from_toml(path / "config.toml"),
        tuple(row for row in rows if "loss" in row and "step" in row),
        tuple(row for row in rows if "eval" in row and "step" in row),
        tuple(json_rows(path / "evaluations.jsonl")),
        header,
        tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()) if log.is_file() else (),
    )


def find_run_folders(root: Path) -> list[Path]:
    """Return the folders directly below `root` that hold a run, most recently touched first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if (path / "config.toml").is_file()]
    return sorted(found, key=lambda path: (_touched(path), path.name), reverse=True)


def _touched(path: Path) -> float:
    files = (path / "metrics.jsonl", path / "model.safetensors", path / "config.toml")
    return max(file.stat().st_mtime for file in files if file.exists())


def read_runs(paths: Sequence[Path], root: Path) -> tuple[list[RunRecord], list[str]]:
    """Read the named runs, or the newest below `root` if none is named.

    Returns:
        The runs, and one sentence for each path that is no run and was skipped (a shell's `runs/*` includes such).

    Raises:
        DataError: none of the named paths is a run, or there is no run at all.
        ConfigError: the only run cannot be read.
    """
    chosen = list(paths) or find_run_folders(root)[:1]
    if not chosen:
        raise DataError(f"there is no run under ./{root}.", "train one: cmtool train-ct --preset digits")
    runs, passed = [], []
    for path in chosen:
        try:
            runs.append(read_run(path))
        except (DataError, ConfigError) as error:
            if len(chosen) == 1:
                raise
            passed.append(f"passed over: {error.message}")
    if not runs:
        raise DataError(f"none of the {len(chosen)} paths is a run folder.", "cmtool runs lists the runs")
    return runs, passed


def differences(a: RunRecord, b: RunRecord) -> list[tuple[str, Any, Any]]:
    """Return (what, in `a`, in `b`): every setting that makes the runs different, then their lengths and figures."""
    settings = sorted(differing_keys(a.config, b.config))
    results: list[tuple[str, Any, Any]] = [
        ("steps done", a.step, b.step),
        ("finished", a.finished, b.finished),
        ("last loss", a.loss, b.loss),
    ]
    left, right = a.figures(), b.figures()
    results += [(head, left.get(key), right.get(key)) for key, head in SHOWN_FIGURES.items()]
    versions = [(run.header or {}).get("versions", {}) for run in (a, b)]
    results += [
        (f"version of {name}", versions[0].get(name), versions[1].get(name))
        for name in sorted({*versions[0], *versions[1]})
    ]
    return settings + [row for row in results if row[1] != row[2]]
