"""`.cmdata`: one file with images, labels and a JSON header, memory-mapped when read.

Layout (little endian): 8 bytes magic, then two unsigned 64-bit numbers, offset and length of the header; from byte
4096 the images, uint8 (N, C, H, W); then the labels, int64 (N,), if any; then the header, which is last so that a
file can be written in one pass without knowing how many images will be left.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmtool.data.dataset import Dataset, Fingerprint, Summary
from cmtool.data.sources.base import check_classes
from cmtool.errors import DataError
from cmtool.files.atomic import atomic_write

MAGIC = b"CMDATA\x00\x01"
START = 4096
_LARGEST_HEADER = 64_000_000


class PackedWriter:
    """Appends images of one shape to an open file; duplicates are counted and the content is hashed on the way."""

    def __init__(self, stream: IO[bytes], channels: int, resolution: int) -> None:
        self._stream, self.shape = stream, (channels, resolution, resolution)
        self.labels: list[int] = []
        self.count = self.duplicates = 0
        self._seen: set[bytes] = set()
        self._fingerprint = Fingerprint()

    def append(self, image: NDArray[np.uint8], label: int | None) -> None:
        """Append one (H, W, C) image; either all images have a label or none has."""
        planar = np.ascontiguousarray(image.transpose(2, 0, 1))
        if planar.shape != self.shape or planar.dtype != np.uint8:
            raise ValueError(f"an image {planar.shape} does not fit {self.shape}")
        self._stream.write(planar.tobytes())
        self._fingerprint.update(planar)
        key = hashlib.blake2b(planar.tobytes(), digest_size=16).digest()
        self.duplicates += key in self._seen
        self._seen.add(key)
        self.count += 1
        if label is not None:
            self.labels.append(label)

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write labels and header; `facts` are further header entries."""
        if self.labels and len(self.labels) != self.count:
            raise ValueError(f"{len(self.labels)} labels for {self.count} images")
        labels = np.array(self.labels, dtype=np.int64) if self.labels else None
        shape = (self.count, *self.shape)
        header = {"format": 1, "shape": shape, "labels": labels is not None, "duplicates": self.duplicates, **facts}
        header["fingerprint"] = self._fingerprint.finish("uint8", shape, labels)
        if labels is not None:
            self._stream.write(labels.tobytes())
        text = json.dumps(header).encode()
        offset = self._stream.tell()
        self._stream.write(text)
        self._stream.seek(0)
        self._stream.write(MAGIC + struct.pack("<QQ", offset, len(text)))
        return header


@contextmanager
def packed_writer(path: Path, channels: int, resolution: int) -> Iterator[PackedWriter]:
    """Open a packed file for images; it appears under its name only when the block ends well after `finish`."""
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        stream.write(b"\0" * START)
        yield PackedWriter(stream, channels, resolution)


def is_packed(path: Path) -> bool:
    """Return whether a file begins as a packed data set does."""
    with open(path, "rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def _sizes(header: Mapping[str, Any]) -> tuple[tuple[int, int, int, int], int]:
    """The image shape that a header claims, checked, and the offset of the header that follows from it."""
    count, channels, height, width = (int(side) for side in header["shape"])
    if min(count, channels, height, width) < 1 or height != width or header["format"] != 1:
        raise ValueError
    pixels = count * channels * height * width
    return (count, channels, height, width), START + pixels + (8 * count if header["labels"] else 0)


def read_packed_header(path: Path) -> dict[str, Any]:
    """Return the header of a packed data set.

    Raises:
        DataError: the file is missing, no packed data set, damaged or truncated.
    """
    broken = DataError(f"{path} is damaged, truncated or no packed data set.", "make it again with cmtool data make")
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(24)
            if len(start) < 24 or start[:8] != MAGIC:
                raise broken
            offset, length = struct.unpack("<QQ", start[8:])
            if length > _LARGEST_HEADER or offset + length != size:
                raise broken
            stream.seek(offset)
            header = json.loads(stream.read(length))
        if not isinstance(header, dict) or _sizes(header)[1] != offset:
            raise broken
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise broken from None
    return header


def read_packed(path: Path) -> Dataset:
    """Map a packed data set into memory: nothing is read before it is used, and nothing can be written back.

    Raises:
        DataError: see `read_packed_header`, or its labels are outside its classes.
    """
    header = read_packed_header(path)
    try:
        return _mapped(path, header)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{path} is damaged: its header does not fit its data ({type(error).__name__}).",
            "make it again with cmtool data make",
        ) from None


def _mapped(path: Path, header: dict[str, Any]) -> Dataset:
    shape, end = _sizes(header)
    images = torch.from_numpy(np.memmap(path, np.uint8, "c", START, shape))
    labels, classes = None, header.get("classes")
    if header["labels"]:
        labels = torch.from_numpy(np.fromfile(path, "<i8", shape[0], offset=end - 8 * shape[0]).astype(np.int64))
        classes = int(classes or int(labels.max()) + 1)
        check_classes(classes, path)
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise DataError(
                f"{path} holds labels outside its {classes} classes.", "make it again with cmtool data make"
            )
    names = header.get("class_names")
    info = Summary(
        header.get("source") or "packed",
        int(header.get("found") or shape[0]),
        shape[0],
        int(header.get("duplicates") or 0),
        header.get("skipped") or {},
        tuple(header.get("notes") or ()),
        str(path),
    )
    return Dataset(images, labels, str(header["fingerprint"]), info, tuple(names) if names else None, classes)
