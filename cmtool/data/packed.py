"""`.cmdata`: one file of images, labels and a JSON header, which is memory-mapped for reading.

Layout (little endian): 8 magic bytes, then two unsigned 64-bit numbers, the offset and length of the header; from byte
4096 the images, uint8 (N, C, H, W), or latents as float16, means before deviations; then any labels, int64 (N,); then
the header. It comes last so that a file can be written in one pass, before the number of usable images is known. `pack`
turns any source into such a file.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmtool.config.headers import wrong_latent
from cmtool.data.dataset import Dataset, Fingerprint, Summary
from cmtool.data.decode import Bytes, SkippedImage, channels_of, fit_image
from cmtool.data.profiles import converted_note
from cmtool.data.sources.base import Record, Source, check_classes, decode, outcomes, refuse_empty
from cmtool.errors import DataError
from cmtool.files.atomic import atomic_write
from cmtool.files.cache import require_space
from cmtool.talk import SILENCE, Talk, Update

MAGIC = b"CMDATA\x00\x01"
START = 4096
_LARGEST_HEADER = 64_000_000
_DTYPES = {name: np.dtype(name) for name in ("uint8", "float16")}


class PackedWriter:
    """Appends images of one shape to an open file, counting duplicates and hashing the content as it goes."""

    def __init__(self, stream: IO[bytes], channels: int, resolution: int, dtype: str = "uint8") -> None:
        self._stream, self.shape, self.dtype = stream, (channels, resolution, resolution), dtype
        self.labels: list[int] = []
        self.count = self.duplicates = 0
        self._seen: set[bytes] = set()
        self._fingerprint = Fingerprint()

    def append(self, image: NDArray[np.uint8], label: int | None) -> None:
        """Append one (H, W, C) image; either all images have a label or none do."""
        self.append_planar(np.ascontiguousarray(image.transpose(2, 0, 1)), label)

    def append_planar(self, planar: NDArray[Any], label: int | None) -> None:
        """Append one (C, H, W) image of the file's type."""
        if planar.shape != self.shape or planar.dtype != self.dtype:
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
        """Write labels and header; `facts` are more entries for the header."""
        if self.labels and len(self.labels) != self.count:
            raise ValueError(f"{len(self.labels)} labels for {self.count} images")
        labels = np.array(self.labels, dtype=np.int64) if self.labels else None
        shape = (self.count, *self.shape)
        header = {"format": 1, "shape": shape, "labels": labels is not None, **facts, "duplicates": self.duplicates}
        header |= {} if self.dtype == "uint8" else {"dtype": self.dtype}
        header["fingerprint"] = self._fingerprint.finish(self.dtype, shape, labels)
        if labels is not None:
            self._stream.write(labels.tobytes())
        text = json.dumps(header).encode()
        offset = self._stream.tell()
        self._stream.write(text)
        self._stream.seek(0)
        self._stream.write(MAGIC + struct.pack("<QQ", offset, len(text)))
        return header


@contextmanager
def latents_writer(path: Path, channels: int, resolution: int) -> Iterator[PackedWriter]:
    """Open a packed file of float16 images for writing, as `packed_writer` does for bytes."""
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        stream.write(b"\0" * START)
        yield PackedWriter(stream, channels, resolution, "float16")


@contextmanager
def packed_writer(path: Path, channels: int, resolution: int) -> Iterator[PackedWriter]:
    """Open a packed file for writing; it appears under its name only if the block completes and called `finish`."""
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        stream.write(b"\0" * START)
        yield PackedWriter(stream, channels, resolution)


def is_packed(path: Path) -> bool:
    """Return whether a file starts like a packed data set."""
    with open(path, "rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def _sizes(header: Mapping[str, Any]) -> tuple[tuple[int, int, int, int], int]:
    """Return the shape of the images according to a header, and the offset of the header that this implies."""
    count, channels, height, width = (int(side) for side in header["shape"])
    if min(count, channels, height, width) < 1 or height != width or header["format"] != 1:
        raise ValueError
    pixels = count * channels * height * width * _DTYPES[header.get("dtype", "uint8")].itemsize
    return (count, channels, height, width), START + pixels + (8 * count if header["labels"] else 0)


def read_packed_header(path: Path) -> dict[str, Any]:
    """Return the header of a packed data set.

    Raises:
        DataError: the file is missing, not a packed data set, damaged or truncated.
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
    """Map a packed data set into memory: data are read when used, and nothing can be written back.

    Raises:
        DataError: see `read_packed_header`; or a label lies outside the classes.
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
    images = torch.from_numpy(np.memmap(path, _DTYPES[header.get("dtype", "uint8")], "c", START, shape))
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
    latent = header.get("latent")
    if (latent is None) != (images.dtype == torch.uint8) or (latent is not None and wrong_latent(latent, shape[1] / 2)):
        raise ValueError
    names = tuple(names) if names else None
    return Dataset(images, labels, str(header["fingerprint"]), info, names, classes, latent=latent)


# --- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """How images of all shapes are made uniform; the fields are those of the [data] table."""

    resolution: int
    channels: int = 3
    fit: str = "crop"
    filter: str = "adm"
    small: str = "skip"


def _prepare(record: Record, rules: Rules, faded: list[str], converted: list[str]) -> Bytes:
    """Decode and fit one record; note in `faded` if it loses its colors, in `converted` a profile other than sRGB.

    Raises:
        SkippedImage: the image cannot be used.
    """
    image = decode(record, None if rules.channels == 1 else rules.channels, converted)
    if min(image.shape[:2]) < rules.resolution and rules.small == "skip":
        size = f"{image.shape[1]} x {image.shape[0]} pixels is smaller than {rules.resolution}."
        raise SkippedImage(record.name, "too small", size)
    if image.shape[-1] != rules.channels:
        if (image != image[..., :1]).any():
            faded.append(record.name)
        image = channels_of(image, rules.channels)
    return fit_image(image, rules.resolution, rules.fit, rules.filter)


def _facts(source: Source, rules: Rules, skipped: Counter[str], notes: Sequence[str]) -> dict[str, Any]:
    return {
        "source": source.kind,
        "path": str(source.path),
        "found": source.found,
        "skipped": dict(skipped),
        "class_names": list(source.class_names) if source.class_names else None,
        "classes": source.classes,
        "rules": asdict(rules),
        "notes": [*source.notes, *notes],
    }


def _fill(writer: PackedWriter, source: Source, rules: Rules, update: Update) -> dict[str, Any]:
    skipped, first = Counter(source.skipped), None
    faded: list[str] = []
    converted: list[str] = []
    decoded = outcomes(source.records(), partial(_prepare, rules=rules, faded=faded, converted=converted))
    for done, outcome in enumerate(decoded, start=1):
        if isinstance(outcome.image, SkippedImage):
            skipped[outcome.image.reason] += 1
            first = first or outcome.image
        else:
            writer.append(outcome.image, outcome.label)
        update(completed=done)
    if not writer.count:
        refuse_empty(source, skipped, first)
    notes = [f"{len(faded):,} of {writer.count:,} images lose their colors: one channel is gray"] if faded else []
    return writer.finish(_facts(source, rules, skipped, [*notes, *converted_note(converted, writer.count)]))


def pack(source: Source, out: Path, rules: Rules, talk: Talk = SILENCE) -> dict[str, Any]:
    """Write every usable image of `source` into the packed file `out` and return its header.

    Args:
        source: what to read.
        out: the file to write; it appears only when it is complete.
        rules: size, channels, fit, filter and what to do with small images.
        talk: shows the progress.

    Raises:
        DataError: there is not enough disk space, or no image can be used.
    """
    needed = source.count * rules.channels * rules.resolution**2
    require_space(out.parent, needed, f"a packed copy of {source.path}")
    with (
        packed_writer(out, rules.channels, rules.resolution) as writer,
        talk.progress(source.count, "packing") as update,
    ):
        return _fill(writer, source, rules, update)
