"""A reader for pickles of plain arrays (CIFAR batches, downsampled ImageNet) that runs no code from the file.

It resolves only the names that rebuild a NumPy array, and resolves them to the harmless stand-ins below. It uses the
pure Python unpickler on purpose: a single memo index can make the C unpickler allocate gigabytes.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import DataError

_KINDS = "buifSU"  # booleans, integers, floats, fixed-width text: never objects
_LONGEST_ITEM = 4096  # bytes; limit on one element of an array


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _Type:
    """Stands in for numpy.dtype: a name, and then the byte order from BUILD."""

    def __init__(self, name: str | bytes, *_flags: object) -> None:
        self.dtype = np.dtype(_text(name))
        if self.dtype.kind not in _KINDS or self.dtype.itemsize > _LONGEST_ITEM:
            raise pickle.UnpicklingError(f"an array of type {self.dtype}")

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
        raise pickle.UnpicklingError("an array without plain bytes")
    if math.prod(shape) * kind.dtype.itemsize != len(data):
        raise pickle.UnpicklingError("an array whose size is not that of its bytes")
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
        raise pickle.UnpicklingError(f"the codec {codec!r}")
    return text.encode("latin1")


class _Marker:
    """Stands in for the name numpy.ndarray, which only ever appears as an argument."""


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Marker,
    ("_codecs", "encode"): _encode,
}
for _room in ("numpy.core", "numpy._core"):
    _NAMES[f"{_room}.multiarray", "_reconstruct"] = _begin_array
    _NAMES[f"{_room}.multiarray", "scalar"] = _number
    _NAMES[f"{_room}.numeric", "_frombuffer"] = _from_buffer


class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Resolve the few harmless names and refuse all others."""
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return _NAMES[module, name]

    def get_extension(self, code: int) -> None:
        """Refuse the registry of extension codes."""
        raise pickle.UnpicklingError(f"the extension code {code}")


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
    try:
        made = _Reader(stream, encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{name} is refused: a data pickle must hold plain arrays, and this one asks for {error}."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way, and none of it touches our state
        raise DataError(f"{name} is damaged or no pickle ({type(error).__name__}).") from None
    if not isinstance(made, dict):
        raise DataError(f"{name} holds a {type(made).__name__} where a dictionary of arrays is expected.")
    return {_text(key): value.array if isinstance(value, _Array) else value for key, value in made.items()}
