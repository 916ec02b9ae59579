"""What every reader offers, a `Source` of `Record`s, and how records become pixels: decoded in threads, in order."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cmtool.data.decode import Bytes, SkippedImage, channels_of, read_image
from cmtool.errors import DataError

MOST_CLASSES = 100_000
_CHUNK = 16  # records per task
Payload = Path | bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class Record:
    """One image before decoding: a path, the bytes of an image file, or pixels (H, W, C); and its class index."""

    name: str
    data: Payload
    label: int | None = None


@dataclass
class Source:
    """A readable collection of images.

    `records` starts a new pass in a fixed order and yields `count` records. `signature` is a hash of the files' names,
    sizes and modification times (not their content) and identifies the packed copy. `skipped` counts by reason the
    files that were passed over while listing.
    """

    kind: str
    path: Path
    count: int
    records: Callable[[], Iterator[Record]]
    signature: str
    class_names: tuple[str, ...] | None = None
    classes: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    found: int = 0

    def __post_init__(self) -> None:
        self.found = self.found or self.count + sum(self.skipped.values())
        if not self.count:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
            detail = f" ({reasons})" if reasons else ""
            raise DataError(f"{self.path} ({self.kind}) holds no images{detail}.", "name a folder of images")
        check_classes(self.classes, self.path)


def check_classes(classes: int | None, place: Path) -> None:
    """Refuse class numbers that must be a mistake; each class costs a row in the network and in every table."""
    if classes is not None and classes > MOST_CLASSES:
        raise DataError(
            f"{place} has class numbers up to {classes - 1:,}; at most {MOST_CLASSES:,} classes are taken.",
            "number the classes from 0, or remove the labels",
        )


def sign(kind: str, rows: Iterable[tuple[object, ...]]) -> str:
    """Hash a listing of files."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def sign_file(kind: str, *paths: Path) -> str:
    """Hash the name, size and modification time of a few files."""
    stats = [(path.resolve(), path.stat()) for path in paths]
    return sign(kind, [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])


@dataclass(frozen=True)
class Outcome:
    """A record after decoding: its name, its label, and its image or the reason it cannot be used."""

    name: str
    image: Bytes | SkippedImage
    label: int | None


Prepare = Callable[[Record], Bytes]


def decode(record: Record, channels: int | None, converted: list[str] | None = None) -> Bytes:
    """Return the pixels of a record, (H, W, channels); with None, in gray (1) or color (3) as they are stored.

    `converted` takes the name of its color profile where that is not sRGB.
    """
    if isinstance(record.data, np.ndarray):
        return record.data if channels is None else channels_of(record.data, channels)
    return read_image(record.data, channels, name=record.name, converted=converted)


def _workers() -> int:
    return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _task(records: list[Record], prepare: Prepare) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for record in records:
        try:
            outcomes.append(Outcome(record.name, prepare(record), record.label))
        except SkippedImage as skip:
            outcomes.append(Outcome(record.name, skip, None))
    return outcomes


def outcomes(records: Iterator[Record], prepare: Prepare) -> Iterator[Outcome]:
    """Decode records in threads (Pillow and zlib release the GIL), in order and with a bounded number in flight.

    Args:
        records: the records to decode.
        prepare: returns the pixels of one record, or raises `SkippedImage`, which becomes its outcome.
    """
    waiting: deque[Future[list[Outcome]]] = deque()
    workers = _workers()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(waiting) < 3 * workers and (chunk := list(islice(records, _CHUNK))):
                waiting.append(pool.submit(_task, chunk, prepare))
            if not waiting:
                return
            yield from waiting.popleft().result()


def refuse_empty(source: Source, skipped: Counter[str], first: SkippedImage | None) -> NoReturn:
    """Raise DataError because no image of a source can be used, with the reasons and one example."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    example = f" The first: {first.message}" if first else ""
    hint = "use --small upscale, or a smaller resolution" if skipped["too small"] else "give readable images"
    raise DataError(f"no usable image is left of {source.found:,} files in {source.path} ({reasons}).{example}", hint)
