"""The model file format.

A model file is safetensors with one JSON header under the metadata key `cmtool`, and a digest over header and
tensors under `cmtool_digest`. Reading the header needs only the standard library; only the functions that touch
tensors import torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.config.headers import wrong_in_header
from cmtool.errors import DISTRIBUTION, CheckpointError
from cmtool.files.atomic import atomic_write

if TYPE_CHECKING:
    import torch

FORMAT = 1
_LARGEST_HEADER = 100_000_000
# safetensors' names of torch's dtypes.
_KINDS = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def read_preamble(path: str | Path) -> dict[str, Any]:
    """Return the whole JSON preamble of a safetensors file (tensor names, shapes, offsets, metadata).

    Standard library only.

    Raises:
        CheckpointError: if the file is missing, is not a safetensors file, or is shorter than it says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path} is damaged or is no safetensors file.")
            preamble = json.loads(stream.read(length))
        if not isinstance(preamble, dict):
            raise CheckpointError(f"{path} is damaged or is no safetensors file.")
        entries = [entry for name, entry in preamble.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        if isinstance(error, OSError):
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        raise CheckpointError(f"{path} is damaged or is no safetensors file.") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} is damaged: it holds {size} bytes where its header says {8 + length + end}.")
    return preamble


def header_of(preamble: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the `cmtool` header inside a preamble.

    Raises:
        CheckpointError: if there is none, or it has a newer format.
    """
    try:
        text = preamble["__metadata__"]["cmtool"]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path} is no cmtool model: its header has no 'cmtool' entry.",
            f"cmtool import {path} --out model.safetensors",
        ) from None
    try:
        header = json.loads(text)
        number, wrong = int(header["format"]), wrong_in_header(header)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header cannot be read.") from error
    if number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number}; this cmtool reads up to {FORMAT}.",
            f"install a newer one: git pull && pip install . in a checkout, or pip install -U {DISTRIBUTION}",
        )
    if wrong:
        raise CheckpointError(f"{path} is damaged or no cmtool model: {wrong} in its header.")
    return header


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a model file, using only the standard library.

    Raises:
        CheckpointError: if the file is missing, damaged, or no cmtool model.
    """
    return header_of(read_preamble(path), path)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's values, dense and in C order, as bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _digest(header_text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(header_text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _preamble(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Return length and JSON header of a safetensors file, padded so that the data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = _KINDS[str(tensor.dtype)]
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def save_model(path: str | Path, tensors: Mapping[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Write tensors and header to `path` whole or not at all; the same contents give the same bytes.

    Raises:
        UserError: if the place cannot be written or the disk is full.
    """
    # Not written by the safetensors library, because it orders the metadata differently in every process, refuses
    # tensors that share memory, and hides the system's error numbers. It can read these files (see the tests).
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True)
    widest_first = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ordered = {name: tensors[name] for name in widest_first}
    metadata = {"cmtool": text, "cmtool_digest": _digest(text, ordered), "format": "pt"}
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        stream.write(_preamble(ordered, metadata))
        for tensor in ordered.values():
            stream.write(_bytes_of(tensor))


def verify(path: str | Path) -> tuple[dict[str, Any], str]:
    """Check every bit of a model file against its digest, using only the standard library; return header and digest.

    Raises:
        CheckpointError: if the file is missing, damaged, or no cmtool model.
    """
    preamble = read_preamble(path)
    header = header_of(preamble, path)
    metadata = preamble.pop("__metadata__")
    digest = hashlib.blake2b(metadata["cmtool"].encode(), digest_size=16)
    kinds = {short: name for name, short in _KINDS.items()}
    try:
        with open(path, "rb") as stream:
            data = 8 + struct.unpack("<Q", stream.read(8))[0]
            for name in sorted(preamble):
                entry = preamble[name]
                start, end = entry["data_offsets"]
                digest.update(f"{name}:{kinds[entry['dtype']]}:{tuple(entry['shape'])}".encode())
                stream.seek(data + start)
                while start < end and (chunk := stream.read(min(end - start, 1 << 20))):
                    digest.update(chunk)
                    start += len(chunk)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    said = digest.hexdigest()
    if metadata.get("cmtool_digest") != said:
        raise CheckpointError(f"{path} is damaged: its contents do not match the digest in its header.")
    return header, said


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors on the CPU, header) of a model file after checking its digest.

    Raises:
        CheckpointError: if the file is missing, damaged (any bit), or no cmtool model.
    """
    from safetensors.torch import load_file

    header, _ = verify(path)
    try:
        return load_file(str(path), device="cpu"), header
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def model_hash(path: str | Path) -> str:
    """Return the short digest that names a model in samples and evaluations."""
    return str((read_preamble(path).get("__metadata__") or {}).get("cmtool_digest", ""))[:12]


def resolve_file(path: str | Path) -> Path:
    """Return the model file that `path` means: the file itself, or `model.safetensors` of a run folder.

    Raises:
        CheckpointError: if neither exists, or the run is not finished.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / "model.safetensors"
        if inside.is_file():
            return inside
        if (path / "config.toml").is_file():
            raise CheckpointError(
                f"the run in {path} has not finished: it has no model.safetensors yet.",
                "the command that began it goes on with it; cmtool runs lists the runs",
            )
        raise CheckpointError(f"{path} holds no model.safetensors.", "cmtool runs lists the runs")
    if not path.is_file():
        raise CheckpointError(f"there is no model at {path}.", "cmtool models lists the names that can be fetched")
    return path
