"""`cmtool info`: what a model file or a run is, read using only the standard library."""

from __future__ import annotations

import ast
import json
import math
import shlex
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from cmtool.checkpoint import header_of, read_preamble, resolve_file
from cmtool.cli.app import command
from cmtool.cli.options import Json
from cmtool.cli.output import Output
from cmtool.errors import CheckpointError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Longer than any text that cmtool writes; anything claiming more is skipped.
_LONGEST = 2**24
_UNREADABLE = (struct.error, zlib.error, zipfile.BadZipFile)
_DAMAGE = (ValueError, SyntaxError, LookupError, TypeError, EOFError, RuntimeError, MemoryError, *_UNREADABLE)
# Tensors of networks that are not learned, by the last part of their names.
CONSTANTS = ("freqs", "phases", "pos_embed", "resample_filter")
FIRST = ("file", "run", "kind", "preset", "recipe_name", "step", "steps", "parameters", "times", "figures", "data")


@dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """The options of `cmtool info`."""

    path: Annotated[Path, typer.Argument(help="A model file, a run folder, or samples (.png, .npz).")]
    json_mode: Json = False


@command
def info(given: InfoCommand) -> None:
    """Say what a model file or a run is: network, process, recipe, data, sampling times, figures.

    Of samples it says which model made them, from which seeds, by which command.

    Examples: cmtool info demo/digits | cmtool info runs/digits-ict-pm
    """
    out, path = Output(given.json_mode), given.path
    if str(path).startswith("demo/") and not path.exists():
        from cmtool.interop.published import resolve_model

        path = resolve_model(str(path))
    if path.is_file() and path.suffix.lower() in (".png", ".npz", ".cmdata"):
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
    shapes = {name: entry["shape"] for name, entry in preamble.items() if name != "__metadata__"}
    header = header_of(preamble, path)
    learned = [shape for name, shape in shapes.items() if name.rpartition(".")[2] not in CONSTANTS]
    counts = {"parameters": sum(math.prod(shape) for shape in learned), "tensors": len(shapes)}
    return {"file": str(path), "bytes": path.stat().st_size, **counts, **header}


def describe_run(folder: Path) -> dict[str, Any]:
    """Return what is known about an unfinished run: its configuration and its newest report.

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
    """Return the newest whole row of a file of JSON lines; skip a row that a kill cut short."""
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


def describe_images(path: Path) -> dict[str, Any]:
    """Return what a file of samples says about how it was made (model, seeds, times, command) and its size.

    Raises:
        CheckpointError: if it says nothing, or is damaged.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".png":
            said = _png(path)
        else:
            said = _npz(path) if suffix == ".npz" else {}
    except (*_DAMAGE, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged"
        raise CheckpointError(f"{path} cannot be read: {reason}.") from error
    if not said:
        raise CheckpointError(f"{path} holds images, not a model.", f"cmtool data show {shlex.quote(str(path))}")
    return {"file": str(path), "kind": "samples", "bytes": path.stat().st_size, **said}


def _png(path: Path) -> dict[str, Any]:
    """Return the size and the uncompressed text entries of a PNG."""
    found: dict[str, Any] = {}
    with open(path, "rb") as stream:
        if stream.read(8) != _SIGNATURE:
            raise ValueError("no PNG")
        while len(start := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind in (b"IHDR", b"tEXt", b"iTXt") and length <= _LONGEST:
                found |= _entry(kind, stream.read(length))
                stream.seek(4, 1)
            else:
                stream.seek(length + 4, 1)
    return found if len(found) > 1 else {}


def _entry(kind: bytes, data: bytes) -> dict[str, Any]:
    if kind == b"IHDR":
        return {"size": list(struct.unpack(">II", data[:8]))}
    key, _, rest = data.partition(b"\0")
    if kind == b"tEXt":
        return {key.decode("latin-1"): rest.decode("latin-1")}
    if rest[:1] != b"\0":  # compressed
        return {}
    text = rest[2:].split(b"\0", 2)[-1]
    return {key.decode("latin-1"): text.decode("utf-8", "replace")}


def _npz(path: Path) -> dict[str, Any]:
    """Return the entry `meta` of an .npz that `cmtool sample` wrote, and the shape of its images."""
    with zipfile.ZipFile(path) as archive:
        if "meta.npy" not in archive.namelist() or archive.getinfo("meta.npy").file_size > _LONGEST:
            return {}
        with archive.open("meta.npy") as stream:
            kind = _header(stream)["descr"]
            text = stream.read().decode("utf-32-be" if kind[0] == ">" else "utf-32-le")
        said = json.loads(text.rstrip("\0"))
        with archive.open("arr_0.npy") as stream:
            shape = _header(stream)["shape"]
    return {"shape": list(shape), **said} if isinstance(said, dict) else {}


def _header(stream: IO[bytes]) -> dict[str, Any]:
    """Read the header of an array in numpy's format; leave the stream at its values."""
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY":
        raise ValueError("no array")
    wide = magic[6] > 1
    (length,) = struct.unpack("<I" if wide else "<H", stream.read(4 if wide else 2))
    if length > _LONGEST:
        raise ValueError("no array")
    found = ast.literal_eval(stream.read(length).decode("latin-1"))
    if not isinstance(found, dict):
        raise ValueError("no array")
    return found
