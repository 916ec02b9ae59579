"""The subset of msgpack that flax writes, decoded using only numpy: it holds only data, and every length is checked."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from cmtool.errors import CheckpointError

_MAX_DEPTH = 100
_MAX_CHUNKS = 10_000
_DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LENGTHS = {1: ">B", 2: ">H", 4: ">I"}


class Decoder:
    """Reads one msgpack document; arrays come back as views into the given bytes."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.position = 0

    def document(self) -> Any:
        """Return the decoded document.

        Raises:
            CheckpointError: if it ends early, nests too deep, or holds anything that flax does not write.
        """
        return self._value(0)

    def _take(self, count: int) -> memoryview:
        if count > len(self.data) - self.position:
            raise CheckpointError("the msgpack data ends too early; was the download complete?")
        piece = self.data[self.position : self.position + count]
        self.position += count
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _length(self, width: int) -> int:
        return int(self._number(_LENGTHS[width]))

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise CheckpointError("the msgpack data nests too deep.")
        code = self._take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._list(code & 0x0F, depth)
        if code < 0xC0:
            return self._text(code & 0x1F)
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        return self._long(code, depth)

    def _long(self, code: int, depth: int) -> Any:
        simple: dict[int, Any] = {0xC0: None, 0xC2: False, 0xC3: True}
        if code in simple:
            return simple[code]
        readers: dict[int, Callable[[], Any]] = {
            0xC4: lambda: bytes(self._take(self._length(1))),
            0xC5: lambda: bytes(self._take(self._length(2))),
            0xC6: lambda: bytes(self._take(self._length(4))),
            0xC7: lambda: self._extension(self._length(1)),
            0xC8: lambda: self._extension(self._length(2)),
            0xC9: lambda: self._extension(self._length(4)),
            0xD9: lambda: self._text(self._length(1)),
            0xDA: lambda: self._text(self._length(2)),
            0xDB: lambda: self._text(self._length(4)),
            0xDC: lambda: self._list(self._length(2), depth),
            0xDD: lambda: self._list(self._length(4), depth),
            0xDE: lambda: self._map(self._length(2), depth),
            0xDF: lambda: self._map(self._length(4), depth),
            **{0xD4 + power: lambda size=1 << power: self._extension(size) for power in range(5)},  # type: ignore[misc]
        }
        if code not in readers:
            raise CheckpointError(f"the msgpack data holds an unknown code {code:#x}.")
        return readers[code]()

    def _text(self, length: int) -> str:
        return bytes(self._take(length)).decode("utf-8", "replace")

    def _list(self, length: int, depth: int) -> list[Any]:
        if length > len(self.data) - self.position:
            raise CheckpointError("the msgpack data claims a list longer than itself.")
        return [self._value(depth + 1) for _ in range(length)]

    def _map(self, length: int, depth: int) -> dict[str, Any] | np.ndarray:
        if length > len(self.data) - self.position:
            raise CheckpointError("the msgpack data claims a map longer than itself.")
        result: dict[str, Any] = {}
        for _ in range(length):
            key = self._value(depth + 1)
            result[str(key)] = self._value(depth + 1)
        return _joined(result) if "__msgpack_chunked_array__" in result else result

    def _extension(self, length: int) -> Any:
        kind, payload = self._number(">b"), self._take(length)
        if kind == 1:
            return _array(payload)
        if kind == 2:
            real, imaginary = Decoder(payload).document()
            return complex(real, imaginary)
        if kind == 3:
            return _array(payload).reshape(())
        raise CheckpointError(f"the msgpack data holds an unknown extension {kind}.")


def _array(payload: memoryview) -> np.ndarray:
    parts = Decoder(payload).document()
    if not (isinstance(parts, list) and len(parts) == 3 and isinstance(parts[2], bytes)):
        raise CheckpointError("the msgpack data holds an array of an unknown form.")
    shape, name, raw = parts
    if not isinstance(shape, list) or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise CheckpointError("the msgpack data holds an array of impossible shape.")
    if name == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        flat = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    elif name in _DTYPES:
        flat = np.frombuffer(
            raw[: len(raw) // np.dtype(name).itemsize * np.dtype(name).itemsize], np.dtype(name).newbyteorder("<")
        )
    else:
        raise CheckpointError(f"the msgpack data holds an array of the unknown type '{name}'.")
    if flat.size != math.prod(shape):
        raise CheckpointError("the msgpack data holds an array whose bytes do not fill its shape.")
    return flat.reshape(shape)


def _joined(chunked: dict[str, Any]) -> np.ndarray:
    """Reassemble an array that flax split because it was larger than a gibibyte."""
    shape, chunks = chunked.get("shape"), chunked.get("chunks")
    if isinstance(shape, dict):
        shape = [shape[str(index)] for index in range(len(shape))]
    if not isinstance(chunks, dict) or not isinstance(shape, list) or len(chunks) > _MAX_CHUNKS:
        raise CheckpointError("the msgpack data holds a chunked array of an unknown form.")
    flat = np.concatenate([np.ravel(chunks[str(index)]) for index in range(len(chunks))])
    if flat.size != math.prod(shape):
        raise CheckpointError("the msgpack data holds an array whose bytes do not fill its shape.")
    return flat.reshape(shape)
