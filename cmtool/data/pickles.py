"""Pickles of plain arrays (CIFAR batches, downsampled ImageNet), read without running any code from the file.

Only the names that rebuild a NumPy array are resolved, and to the harmless stand-ins below.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import DataError
from cmtool.files.inert import Refused, read_inert

_KINDS = "buifSU"  # booleans, integers, floats, fixed-width text: never objects
_LONGEST_ITEM = 4096  # bytes; limit on one element of an array


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _Type:
    """Stands in for numpy.dtype: a name, and then the byte order from BUILD."""

    def __init__(self, name: str | bytes, *_flags: object) -> None:
        self.dtype = np.dtype(_text(name))
        if self.dtype.kind not in _KINDS or self.dtype.itemsize > _LONGEST_ITEM:
            raise Refused(f"it holds an array of type {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if order == "<" else ">")


class _Array:
    """Stands in for numpy.ndarray while its state arrives."""

    array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, by_columns, raw = state
        self.array = _build(raw, kind, shape, "F" if by_columns else "C")


def _build(raw: object, kind: object, shape: tuple[int, ...], order: str) -> NDArray[Any]:
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray):
        raise Refused("it holds an array without plain bytes")
    if math.prod(shape) * kind.dtype.itemsize != len(data):
        raise Refused("it holds an array whose size is not that of its bytes")
    return np.frombuffer(data, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _begin_array(*_ignored: object) -> _Array:
    return _Array()


def _from_buffer(raw: object, kind: object, shape: tuple[int, ...], order: str) -> _Array:
    made = _Array()
    made.array = _build(raw, kind, shape, order)
    return made


def _number(kind: object, raw: object) -> object:
    return _build(raw, kind, (1,), "C")[0].item()


def _encode(text: str, codec: str | bytes = "latin1") -> bytes:
    if _text(codec) not in ("latin1", "latin-1"):
        raise Refused(f"it asks for the codec {codec!r}")
    return text.encode("latin1")


class _Marker:
    """Stands in for the name numpy.ndarray itself, which only ever appears as an argument."""


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Marker,
    ("_codecs", "encode"): _encode,
}
for _room in ("numpy.core", "numpy._core"):
    _NAMES[f"{_room}.multiarray", "_reconstruct"] = _begin_array
    _NAMES[f"{_room}.multiarray", "scalar"] = _number
    _NAMES[f"{_room}.numeric", "_frombuffer"] = _from_buffer


def read_array_pickle(source: bytes | IO[bytes], name: str) -> dict[str, Any]:
    """Read a pickled dictionary of arrays, numbers, texts and lists of those.

    Python 2 and 3 pickles of protocols 0 to 5 are read; no name from the file is ever looked up in a real module.

    Args:
        source: the bytes or an open binary file.
        name: the file's name in messages.

    Returns:
        The dictionary with text keys; arrays are read-only.

    Raises:
        DataError: the pickle asks for anything else, is damaged, or holds no dictionary.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    start = stream.tell()
    size = stream.seek(0, io.SEEK_END) - start
    stream.seek(start)
    try:
        made = read_inert(stream, size, _NAMES, encoding="bytes")
    except Refused as error:
        raise DataError(f"{name} is refused: {error}, and a data pickle holds only plain arrays.") from None
    except Exception as error:  # a damaged pickle can fail in any way, and none of it touches our state
        raise DataError(f"{name} is damaged or no pickle ({type(error).__name__}).") from None
    if not isinstance(made, dict):
        raise DataError(f"{name} holds a {type(made).__name__} where a dictionary of arrays is expected.")
    return {_text(key): value.array if isinstance(value, _Array) else value for key, value in made.items()}
