"""`cmtool info`: what a model file or a run is, read with the standard library alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from cmtool.checkpoint import header_of, read_preamble, resolve_file
from cmtool.cli.options import Json
from cmtool.cli.output import Output

FIRST = ("file", "run", "kind", "preset", "recipe_name", "step", "steps", "parameters", "times", "figures", "data")


def info(
    path: Annotated[Path, typer.Argument(help="A model file, a run folder, or samples (.png, .npz).")],
    json_mode: Json = False,
) -> None:
    """Say what a model file or a run is: network, process, recipe, data, sampling times, figures.

    Of samples it says which model made them, from which seeds, by which command.

    Examples: cmtool info demo/digits | cmtool info runs/digits-ict-pm
    """
    out = Output(json_mode)
    if str(path).startswith("demo/") and not path.exists():
        from cmtool.interop.names import resolve_model

        path = resolve_model(str(path))
    if path.is_file() and path.suffix.lower() in (".png", ".npz", ".cmdata"):
        from cmtool.cli.info_images import describe_images

        document = describe_images(path)
        out.json(document)
        return out.table("", ["", str(path)], _rows(document))
    unfinished = path.is_dir() and not (path / "model.safetensors").is_file() and (path / "config.toml").is_file()
    document = describe_run(path) if unfinished else describe_model(resolve_file(path))
    out.json(document)
    out.table("", ["", str(path)], _rows(document))


def describe_model(path: Path) -> dict[str, Any]:
    """Return the header of a model file with its number of parameters and its size in bytes.

    Raises:
        CheckpointError: missing, truncated, damaged, or no cmtool model.
    """
    preamble = read_preamble(path)
    shapes = [entry["shape"] for name, entry in preamble.items() if name != "__metadata__"]
    header = header_of(preamble, path)
    counts = {"parameters": sum(math.prod(shape) for shape in shapes), "tensors": len(shapes)}
    return {"file": str(path), "bytes": path.stat().st_size, **counts, **header}


def describe_run(folder: Path) -> dict[str, Any]:
    """Return what is known of a run that has not finished: its configuration and its newest report.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    from cmtool.config.toml import read_toml

    config = read_toml(folder / "config.toml")
    last = _last_row(folder / "metrics.jsonl")
    steps = config.get("train", {}).get("steps")
    checkpoints = sorted(entry.name for entry in (folder / "checkpoints").glob("step-*"))
    return {
        "run": str(folder),
        "kind": "unfinished run",
        "step": last.get("step"),
        "steps": steps,
        "checkpoints": checkpoints,
        **config,
    }


def _last_row(path: Path) -> dict[str, Any]:
    """Return the newest whole row of a file of JSON lines; a row cut off by a kill is passed over."""
    if not path.is_file():
        return {}
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return row
    return {}


def _rows(document: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table: what it is, how it was made, then everything else; empty entries are left out."""
    keys = [*(key for key in FIRST if key in document), *(key for key in document if key not in FIRST)]
    rows = [
        [key.replace("_", " "), _parts(document[key]) if key == "recipe" else _text(key, document[key])] for key in keys
    ]
    return [[key, text] for key, text in rows if text]


def _parts(recipe: dict[str, Any]) -> str:
    """Write a recipe as its method and the kind of each part; --json has every number."""
    named = ("kind", "rule", "scales")
    parts = {key: value for key, value in recipe.items() if isinstance(value, dict)}
    kinds = {key: next((value[name] for name in named if name in value), "") for key, value in parts.items()}
    return ", ".join(
        [str(recipe.get("title") or recipe.get("method", "")), *(f"{k} {v}" for k, v in kinds.items() if v)]
    )


def _text(key: str, value: Any) -> str:
    """Write one entry for a person: tables as `key value` pairs, sampling times as lists, nothing for what is empty."""
    if value is None or value == {} or value == [] or value == "":
        return ""
    if key in ("parameters", "bytes") and isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        pairs = ((inner, _text(inner, item)) for inner, item in value.items())
        return ", ".join(f"{inner} {text}" for inner, text in pairs if text)
    if isinstance(value, list):
        return "[" + " ".join(_text(key, item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "yes" if value is True else "no" if value is False else str(value)
