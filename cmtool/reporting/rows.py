"""Rows of a run's files, made safe to show: the folder may come from anywhere, and its values may be of any type."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
