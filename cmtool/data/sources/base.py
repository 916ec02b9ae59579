"""What every reader offers: a `Source` of `Record`s."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import DataError

MOST_CLASSES = 100_000
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

    `records` starts a new pass in the fixed order; `count` is how many it yields; `signature` changes when the
    files do (names, sizes and times of change, not their content) and keys the packed copy; `skipped` counts files
    that were left out while listing.
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
    """Refuse class numbers that can only be a mistake: every class costs a row of the network and of each table."""
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
    """Hash name, size and time of change of a few files."""
    stats = [(path.resolve(), path.stat()) for path in paths]
    return sign(kind, [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])
