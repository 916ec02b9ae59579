"""What a file of samples says of itself: the text of a PNG, the `meta` entry of an .npz; standard library alone."""

from __future__ import annotations

import ast
import json
import shlex
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from cmtool.errors import CheckpointError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# More than any text that is written here; what claims more is passed over.
_LONGEST = 2**24
_UNREADABLE = (struct.error, zlib.error, zipfile.BadZipFile)
_DAMAGE = (ValueError, SyntaxError, LookupError, TypeError, EOFError, RuntimeError, MemoryError, *_UNREADABLE)


def describe_images(path: Path) -> dict[str, Any]:
    """Return what a file of samples says of its making (model, seeds, times, command) and its size.

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
    """Read the header of an array in numpy's format; the stream stands at its values then."""
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
