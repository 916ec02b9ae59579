"""Tar files of images, and WebDataset's shards: read in place by an index of offsets; nothing is extracted.

WebDataset stores what belongs to an image under one name with different endings: `0001.jpg` and `0001.cls`, the number
of its class as text, or `0001.json` with an entry `label`.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cmtool.data.decode import FOREIGN, SUFFIXES
from cmtool.data.listing import CONVERT, class_labels, is_hidden
from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.errors import DataError
from cmtool.files.archives import LARGEST_IMAGE_FILE

_BLOCK = 512
_LARGEST_TEXT = 100_000  # bytes; no label is larger
LABELS = (".cls", ".json")


class Place(NamedTuple):
    """Where a member's bytes lie."""

    name: str
    shard: Path
    offset: int
    size: int

    def read(self, limit: int = LARGEST_IMAGE_FILE) -> bytes:
        """Return the bytes; raises `DataError` if they are more than `limit`, or no longer there."""
        if self.size > limit:
            raise DataError(f"{self.shard}: {self.name} is larger than {limit:,} bytes.")
        with open(self.shard, "rb") as stream:
            stream.seek(self.offset)
            found = stream.read(self.size)
        if len(found) != self.size:
            raise DataError(f"{self.shard} is damaged: {self.name} is cut off.")
        return found


@dataclass
class Index:
    """The images of some shards in order, the files with their classes by key, and what was skipped."""

    images: list[Place] = field(default_factory=list)
    labels: dict[str, Place] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, place: Place) -> None:
        """Sort a member into the index by its ending."""
        last = place.name.rpartition("/")[2].lower()
        if last.endswith(SUFFIXES):
            self.images.append(place)
        elif last.endswith(LABELS):
            self.labels.setdefault(key_of(place), place)
        else:
            self.skipped[CONVERT if last.endswith(FOREIGN) else "not an image"] += 1


def key_of(place: Place) -> str:
    """Return what a sample's files have in common: the shard, the folder, and the name up to its first dot."""
    folder, slash, last = place.name.rpartition("/")
    return f"{place.shard}\0{folder}{slash}{last.partition('.')[0]}"


def is_tar(path: Path) -> bool:
    """Whether a file begins like an uncompressed tar archive."""
    with open(path, "rb") as stream:
        return stream.read(_BLOCK)[257:262] == b"ustar"


def shards_in(folder: Path) -> list[Path]:
    """Return the tar files of a folder, sorted by name."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file() and is_tar(path) and not is_hidden(path.name))


def _fill(index: Index, shard: Path) -> None:
    """Add the members of one shard to the index.

    Raises:
        DataError: it is damaged or cut off, or a member points outside.
    """
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                parts = [part for part in member.name.replace("\\", "/").split("/") if part not in ("", ".")]
                if ".." in parts or member.name.startswith(("/", "\\")) or (parts and ":" in parts[0]):
                    raise DataError(f"{shard} is refused: its member '{member.name}' points outside the archive.")
                if member.offset_data + member.size > size or member.size < 0:
                    raise DataError(f"{shard} is damaged: {member.name} is cut off; was the download complete?")
                if member.isfile() and not member.issparse() and parts and not any(map(is_hidden, parts)):
                    index.add(Place("/".join(parts), shard, member.offset_data, member.size))
                elif not member.isdir() and not member.isfile():
                    index.skipped["no plain file" if member.isdev() else "a link inside an archive"] += 1
            end = archive.offset
        with open(shard, "rb") as stream:
            stream.seek(end)
            if stream.read(_BLOCK) != bytes(_BLOCK):
                raise DataError(f"{shard} is cut off: it does not end as a tar archive does.")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{shard} is damaged or is no tar archive ({error}).") from None


def _class_in(place: Place) -> int | None:
    """Return the class that a .cls or .json file says; None if it says none.

    Raises:
        DataError: it says something else.
    """
    text = place.read(_LARGEST_TEXT)
    try:
        value = json.loads(text)
        found = value.get("label", value.get("cls")) if isinstance(value, dict) else value
    except (ValueError, RecursionError):
        found = text
    if found is None and place.name.lower().endswith(".json"):
        return None
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise DataError(f"{place.shard}: {place.name} holds no class index from 0 on.")
    return found


def open_tar(path: Path, rule: str | None = None) -> Source:
    """Open a tar file, or a folder of them, shard by shard in the order of their members.

    Classes are those of `.cls` or `.json` files if every image has one, else those of folders (see `class_labels`).

    Raises:
        DataError: a shard is damaged, cut off or refused, or its classes are no indices.
    """
    shards = shards_in(path) if path.is_dir() else [path]
    index = Index()
    for shard in shards:
        _fill(index, shard)
    found = [index.labels.get(key_of(place)) for place in index.images]
    said = [None if place is None else _class_in(place) for place in found]
    numbers = [number for number in said if number is not None]
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    labels: list[int] | None = numbers
    if len(numbers) < len(said) or not said:
        classes = class_labels([place.name for place in index.images], rule)
        names, labels, notes = classes.names, classes.labels, classes.notes
        if numbers:
            missing = len(said) - len(numbers)
            names, labels, notes = None, None, (f"{missing:,} images have no class, so there are none",)

    def records() -> Iterator[Record]:
        for number, place in enumerate(index.images):
            yield Record(place.name, place.read(), labels[number] if labels else None)

    kind = "tar of images" if len(shards) == 1 else f"{len(shards)} tar shards"
    signature = sign_file(f"tar {rule}", *shards)
    count = 1 + max(labels) if labels else None
    return Source(kind, path, len(index.images), records, signature, names, count, +index.skipped, notes)
