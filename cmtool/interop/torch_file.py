"""Read tensors from torch and safetensors files without letting a file run code or exhaust memory."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from cmtool.checkpoint import read_preamble
from cmtool.errors import CheckpointError
from cmtool.files.archives import is_zip
from cmtool.interop.state_dicts import weights_in
from cmtool.interop.weights import choose, says_average

_LARGE = 1 << 28


def check_zip(path: Path) -> None:
    """Refuse a zip that is not `torch.save`'s: escaping paths, compressed members, more bytes than the file has.

    Raises:
        CheckpointError: with what was found.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise CheckpointError(
            f"{path} is damaged: its zip directory cannot be read; was the download complete?"
        ) from None
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts:
            raise CheckpointError(f"{path} is refused: its member '{member.filename}' points outside the archive.")
        if member.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path} is refused: its member '{member.filename}' is compressed, which torch never does."
            )
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path} is refused: its members claim more bytes than the file has.")


def load_torch(path: Path) -> Any:
    """Load a torch file's tensors and plain containers, memory-mapped where the format allows it.

    Raises:
        CheckpointError: if it is damaged, or holds anything besides tensors and plain containers.
    """
    zipped = is_zip(path)
    if not zipped:
        with open(path, "rb") as stream:
            if stream.read(2) == b"PK":
                raise CheckpointError(
                    f"{path} is damaged: it begins like a torch file and ends too early; was the download complete?"
                )
    if zipped:
        check_zip(path)
    try:
        # Training scripts save their arguments with the weights. A namespace only stores values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} is refused: it holds more than tensors, and loading that could run code."
            ) from None
        raise CheckpointError(f"{path} is no torch file, or is damaged.") from None
    except MemoryError:
        if path.stat().st_size > _LARGE:
            raise
        # A small file cannot genuinely need that much memory: its lengths are false.
        raise CheckpointError(f"{path} is no torch file, or is damaged.") from None
    except Exception:
        # Foreign bytes can fail in any way inside torch's readers, and none of them may end in a traceback.
        raise CheckpointError(f"{path} is no torch file, or is damaged; was the download complete?") from None


def find_tensors(content: Any, path: Path, wanted: str | None = None) -> tuple[dict[str, Tensor], str, str | None]:
    """Return the state dict in a file's contents, the file's name for it, and a sentence about the choice (or None).

    `wanted`: "ema", "raw" or a name; None prefers an average.

    Raises:
        CheckpointError: if there is none.
        UserError: if the wanted weights are not there, or several fit.
    """
    if not isinstance(content, Mapping | list | tuple):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    try:
        found = weights_in(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error.message}") from None
    except MemoryError:
        raise
    except Exception as error:
        # Foreign contents can be built in any way, and none of them may end in a traceback.
        raise CheckpointError(f"{path} cannot be understood ({type(error).__name__}).") from None
    if not found and isinstance(content, Mapping):
        held = ", ".join(map(str, list(content)[:10]))
        raise CheckpointError(f"{path} holds no state dict; it holds: {held or 'nothing'}.")
    if not found:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    if len(found) == 1 and not found[0].name and says_average([path.stem]):
        found = [replace(found[0], average=True)]
    taken, said = choose(found, wanted, path)
    flat = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    # A single set of weights under a prefix is not a choice worth mentioning.
    plain = flat and len(found) == 1 and not taken.average
    return dict(taken.contents), taken.name, None if plain else said


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file.

    Raises:
        CheckpointError: if it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    preamble = read_preamble(path)
    metadata = preamble.get("__metadata__") or {}
    try:
        return load_file(str(path), device="cpu"), {str(key): str(value) for key, value in metadata.items()}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
