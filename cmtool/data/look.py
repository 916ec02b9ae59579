"""A quick look at pictures before a run is planned: how many, how large, gray or color, classes, duplicates.

Files are opened but not decoded, so that thousands of photos take seconds.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

from cmtool.config.sources import SOURCES, named_source
from cmtool.data.builtin import BUILTIN
from cmtool.data.dataset import Dataset
from cmtool.data.decode import MAX_PIXELS, SkippedImage, peek
from cmtool.data.packed import is_packed, read_packed
from cmtool.data.sources.base import Payload, Source
from cmtool.data.survey import resolve, survey_dataset
from cmtool.errors import DataError

# How many files are looked at, evenly spread over the source, and the time limit in seconds.
MOST, SECONDS = 2500, 5.0
# Bytes at either end of a file by which two of one length are told apart.
ENDS = 1 << 15


@dataclass
class Look:
    """What was seen of `looked` among `count` pictures.

    `sizes` counts (width, height); `gray`, `color` and `transparent` count pictures; `classes` maps names to counts,
    None without classes; `duplicates` counts files that are the same as an earlier one; `unusable` counts by reason.
    """

    path: str
    count: int
    looked: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    gray: int = 0
    color: int = 0
    transparent: int = 0
    duplicates: int = 0
    classes: dict[str, int] | None = None
    unusable: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """How many pictures there are to train on, as far as the look can tell."""
        return round(self.count * (1 - self.unusable.total() / self.looked)) if self.looked else self.count

    def side(self, share: float = 0.25) -> int:
        """Return the shorter side in pixels that a share of the pictures falls below."""
        sides = sorted(min(size) for size in self.sizes.elements())
        return (
            round(quantiles(sides, n=100, method="inclusive")[round(100 * share) - 1]) if len(sides) > 1 else sides[0]
        )

    def smaller_than(self, resolution: int) -> int:
        """Return how many of the pictures looked at have a side shorter than `resolution`."""
        return sum(count for size, count in self.sizes.items() if min(size) < resolution)

    @property
    def oblong(self) -> int:
        """How many of the pictures looked at are not square."""
        return sum(count for (width, height), count in self.sizes.items() if width != height)


def look(path: str, kind: str | None = None) -> Look:
    """Look at any pictures that a user may name.

    Args:
        path: a file, a folder, `lsun:PATH`, or the name of a published or built-in set.
        kind: label rule of a folder ("prefix"), part of CIFAR-10 ("test").

    Raises:
        DataError: nothing is there, or none of it can be read as pictures.
    """
    named = named_source(path)
    if named is not None and SOURCES[named].points:
        raise DataError(f"{path} holds points and no pictures.", f"cmtool train-ct --preset {path}")
    place = Path(path.removeprefix("lsun:")).expanduser()
    if named is None and not place.exists():
        raise DataError(f"there is no data at {place}.", "name a folder of images or a data file with --data")
    if named in BUILTIN:
        source = resolve(path)
        return _at_source(path, source)
    if place.is_file() and is_packed(place):
        return _at_dataset(path, read_packed(place))
    return _at_source(path, resolve(path, kind))


def _at_dataset(path: str, data: Dataset) -> Look:
    if data.latent is not None:
        side = data.latent["pixels"][1]
        raise DataError(
            f"{path} holds latents, and plans are made for pictures.",
            f"name a preset for pictures of {side} pixels with --preset; cmtool presets lists them",
        )
    facts = survey_dataset(data, None, 0).facts
    counts = {str(row["name"] or row["label"]): row["images"] for row in facts.get("class_counts", [])}
    side, gray = data.resolution, len(data) if data.channels == 1 else 0
    return Look(
        path, len(data), len(data), Counter({(side, side): len(data)}), gray, len(data) - gray,
        duplicates=data.info.duplicates, classes=counts or None,
    )  # fmt: skip


def _at_source(path: str, source: Source) -> Look:
    found = Look(path, source.count, unusable=Counter(), notes=source.notes)
    labels: Counter[int] = Counter()
    ends, same = time.monotonic() + SECONDS, _Duplicates()
    every = max(1, -(-source.count // MOST))
    for index, record in enumerate(source.records()):
        if record.label is not None:
            labels[record.label] += 1
        if index % every == 0 and time.monotonic() < ends:
            _peek(found, record.name, record.data)
            found.duplicates += same.seen(record.data)
    if source.classes:
        names = source.class_names or tuple(map(str, range(source.classes)))
        found.classes = {names[label]: labels[label] for label in range(source.classes)}
    if not found.sizes:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.unusable.most_common())
        none = f"none of the {source.count:,} pictures" if source.count > 1 else "the only picture"
        can = "can" if source.count > 1 else "cannot"
        raise DataError(f"{none} in {path} {can} be read ({reasons}).", _LARGE if "too large" in reasons else _HINT)
    return found


_HINT = "cmtool data show names what is wrong with them; PNG and JPEG files are read everywhere"
_LARGE = f"at most {MAX_PIXELS // 1_000_000} megapixels are read: cut larger pictures into tiles"


def _peek(found: Look, name: str, data: Payload) -> None:
    """Count one picture."""
    found.looked += 1
    try:
        size, channels, transparent = peek(data, name)
    except SkippedImage as skip:
        found.unusable[skip.reason] += 1
        return
    if size[0] * size[1] > MAX_PIXELS:
        found.unusable["too large"] += 1
        return
    found.sizes[size] += 1
    found.gray += channels == 1
    found.color += channels == 3
    found.transparent += transparent


class _Duplicates:
    """Tells whether the same bytes were seen before; a file is opened only if another has its length."""

    def __init__(self) -> None:
        self._alone: dict[int, Path] = {}
        self._digests: set[tuple[int, bytes]] = set()

    def seen(self, data: Payload) -> bool:
        """Whether these bytes were seen before; remembers them."""
        if isinstance(data, Path):
            try:
                return self._file(data, data.stat().st_size)
            except OSError:
                return False
        text = data if isinstance(data, bytes) else data.tobytes()
        return self._digest(len(text), [text])

    def _file(self, path: Path, size: int) -> bool:
        if size not in self._alone:
            self._alone[size] = path
            return False
        first = self._alone[size]
        if first != Path():
            self._digest(size, _ends(first, size))
            self._alone[size] = Path()
        return self._digest(size, _ends(path, size))

    def _digest(self, size: int, parts: Iterator[bytes] | list[bytes]) -> bool:
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(part)
        key = size, digest.digest()
        known = key in self._digests
        self._digests.add(key)
        return known


def _ends(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        yield stream.read(ENDS)
        stream.seek(max(size - ENDS, 0))
        yield stream.read(ENDS)
