"""Sets of images to be evaluated: an npz of samples, anything that `cmtool data` and training read, or arrays.

Everything is uint8 (B, H, W, C) and all images of a set have one size. Points (toy data) are float32 (B, D, 1, 1) and
stay floats. Files are listed and decoded exactly as for training; the notes of a set count those skipped.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmtool.config.judgments import as_named
from cmtool.data import Dataset, to_nhwc
from cmtool.data.array_images import open_array_images
from cmtool.data.decode import SUFFIXES, SkippedImage, channels_of
from cmtool.data.latents import decoder
from cmtool.data.packed import is_packed, read_packed
from cmtool.data.profiles import converted_note
from cmtool.data.sources.base import Outcome, Source, decode, outcomes, refuse_empty
from cmtool.data.sources.sniff import UnknownForm, open_source
from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array
from cmtool.files.archives import NpzReader

BATCH = 64
HELD = 512_000_000  # bytes; decoded images up to this size are kept for the next pass
# A file that changed less than this many seconds ago could change again without its timestamps showing it.
SETTLED_NS = 50_000_000
Batches = Callable[[int], Iterator[Array]]


@dataclass(frozen=True)
class ImageSet:
    """Images and what is known about them.

    `shape` is (H, W, C); `read(size)` yields batches; `labels` are (N,) int64 or None; `meta` is what cmtool wrote into
    a sample file (model, nfe, times, seeds); `groups` are (N,) classes known only by the names of their folders, which
    need not be numbered as a network's classes are; `notes` are sentences for the user. `stamp` names the state of the
    file that every pass reads (path, size, times), "" if that is not known; None if the pixels are in memory and a pass
    costs nothing.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    read: Batches
    labels: Array | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    points: bool = False
    groups: Array | None = None
    notes: tuple[str, ...] = ()
    stamp: str | None = None
    _known: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def batches(self, size: int = BATCH) -> Iterator[Array]:
        """Yield uint8 (b, H, W, C) batches (float32 for points), `count` images in all, in order."""
        left = self.count
        digest = None if self._known else hashlib.blake2b(f"{self.shape} {self.points}".encode(), digest_size=16)
        for whole in self.read(size):
            batch = whole[:left]
            left -= len(batch)
            if digest is not None:
                digest.update(np.ascontiguousarray(batch).data)
                if left == 0:
                    digest.update(str(self.count).encode())
                    self._known.append(digest.hexdigest())
            yield batch
            if left <= 0:
                return
        raise DataError(f"{self.name} holds {self.count - left} images where {self.count} were announced.")

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of the pixels, the same for the same images in any container.

        Every complete pass over the images computes it on the way, so it costs a pass only if there was none before.
        """
        if not self._known:
            for _ in self.batches(256):
                pass
        return self._known[0]

    def first(self, count: int) -> ImageSet:
        """Return the set of the first `count` images; raises `DataError` when there are fewer."""
        if count > self.count:
            raise DataError(f"{self.name} holds {self.count} images; {count} are asked for.")
        labels = None if self.labels is None else self.labels[:count]
        stamp = f"{self.stamp} first {count}" if self.stamp else self.stamp
        return replace(self, count=count, labels=labels, stamp=stamp) if count < self.count else self

    def some(self, count: int) -> ImageSet:
        """Return `count` of the images; a note says how they were chosen.

        Samples of consecutive seeds are independent, so the first ones are taken. From any other set every class
        contributes its share, spread over the order of its files. The choice is the same every time.

        Raises:
            DataError: there are fewer.
        """
        if count >= self.count or "seeds" in self.meta:
            return self.first(count)
        classes = self.groups if self.groups is not None else self.labels
        rows = _spread(np.zeros(self.count) if classes is None else classes, count)
        over = "its files" if classes is None else f"its {len(np.unique(classes)):,} classes"
        note = f"{count:,} of {self.count:,} images, spread evenly over {over}"
        labels, groups = (None if known is None else known[rows] for known in (self.labels, self.groups))
        read = partial(_chosen_batches, self, rows)
        stamp = f"{self.stamp} some {count}" if self.stamp else self.stamp
        notes = (*self.notes, note)
        return replace(self, count=count, read=read, labels=labels, groups=groups, notes=notes, stamp=stamp)

    @property
    def seen(self) -> bool:
        """Whether the fingerprint is known, so that asking for it takes no pass."""
        return bool(self._known)

    def in_memory(self) -> ImageSet:
        """Return the set with its pixels in memory, so that further passes read no file."""
        if self.stamp is None:
            return self
        held = from_array(self.all(), self.name)
        return replace(self, read=held.read, stamp=None)

    def all(self) -> Array:
        """Return every image at once (N, H, W, C)."""
        return np.concatenate(list(self.batches(1024)))


def image_shape(header: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (H, W, C) of the samples of a model, from its header; points are (D, 1, 1)."""
    data = as_named(header["data"])
    side, channels = data["resolution"], data["channels"]
    return (channels, 1, 1) if data.get("float_samples") else (side, side, channels)


def from_array(images: Array, name: str, labels: Array | None = None, meta: dict[str, Any] | None = None) -> ImageSet:
    """Wrap uint8 images (N, H, W, C), or float32 points (N, D, 1, 1), that are in memory."""

    def read(size: int) -> Iterator[Array]:
        yield from (images[start : start + size] for start in range(0, len(images), size))

    if not len(images):
        raise DataError(f"{name} holds no images.")
    if images.ndim != 4 or (images.dtype == np.uint8 and images.shape[3] not in (1, 3, 4)):
        raise DataError(
            f"{name}: an array {images.dtype} {images.shape} is no batch of images.", "give uint8 (N, H, W, C)"
        )
    shape = (images.shape[1], images.shape[2], images.shape[3])
    points = images.dtype != np.uint8
    return ImageSet(name, len(images), shape, read, labels, meta or {}, points)


def from_dataset(data: Dataset, name: str) -> ImageSet:
    """Wrap a data set; latents are decoded as they are read."""
    labels = None if data.labels is None else data.labels.numpy()
    if data.latent is not None:
        to_pictures, (channels, side, _) = decoder(data.latent), data.latent["pixels"]

        def read(size: int) -> Iterator[Array]:
            for rows in torch.arange(len(data)).split(size):
                yield to_nhwc(to_pictures(data.batch(rows)[0]))

        return ImageSet(name, len(data), (side, side, channels), read, labels)
    if data.float_samples:
        return from_array(data.images.float().numpy(), name, labels)
    return from_array(data.images.permute(0, 2, 3, 1).numpy(), name, labels)


def _spread(classes: Array, count: int) -> Array:
    """Return `count` ascending rows: sort the rows by class, cut them into equal stretches, take one row of each.

    A fixed seed draws the row of a stretch. With a fixed stride, a set that cycles through something would show only
    one phase of the cycle.
    """
    order = np.argsort(classes, kind="stable")
    within = np.random.default_rng(0).random(count)
    places = np.floor((np.arange(count) + within) * (len(order) / count)).astype(np.int64)
    return np.sort(order[np.minimum(places, len(order) - 1)])


def _chosen_batches(images: ImageSet, rows: Array, size: int) -> Iterator[Array]:
    """Yield batches of the images in the ascending `rows`."""

    def parts() -> Iterator[Array]:
        start = 0
        for batch in images.batches(256):
            low, high = np.searchsorted(rows, (start, start + len(batch)))
            yield from batch[rows[low:high] - start]
            start += len(batch)

    return _batched(parts(), size)


def _batched(images: Iterable[Array], size: int) -> Iterator[Array]:
    """Stack images (H, W, C) into batches of `size`."""
    waiting: list[Array] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == size:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)


def open_images(path: str | Path) -> ImageSet:
    """Open an .npz of samples, or any data set that `cmtool data` reads: a folder or a zip of images, ...

    Image files that cannot be read are skipped; the notes of the set count them.

    Raises:
        DataError: the set is missing, empty or damaged, mixes sizes, or has an .npz of unknown range or of objects.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"there are no samples at {path}.", "name an .npz, a folder or a zip of images, or a run folder"
        )
    if path.is_file() and path.suffix == ".npz":
        return open_npz_images(path)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        raise DataError(f"{path} is a single image, not a set of samples.", "write samples with --out samples.npz")
    try:
        if path.is_file() and is_packed(path):
            return from_dataset(read_packed(path), str(path))
        return _from_source(open_source(path), str(path))
    except PermissionError:
        raise DataError(f"no permission to read {path}.") from None
    except UnknownForm:
        raise DataError(f"{path} is no .npz, no folder and no zip of images, or it is damaged.") from None


def open_npz_images(path: Path, reader: NpzReader | None = None) -> ImageSet:
    """Open the images in an .npz, through `reader` if it is already open; see `open_images`."""
    stamp = _stamp(path)
    found = open_array_images(path, reader)
    return ImageSet(
        str(path),
        found.count,
        found.shape,
        found.blocks,
        found.labels,
        found.meta,
        found.points,
        notes=found.notes,
        stamp=stamp,
    )


def _stamp(path: Path) -> str:
    state = path.stat()
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < SETTLED_NS:
        return ""
    return f"{path.resolve()} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


# --- image files -----------------------------------------------------------------------------------------------------


@dataclass
class _Scan:
    """The result of one pass over all files of a source: which can be used, their sizes and channels."""

    rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    converted: list[str] = field(default_factory=list)
    channels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    images: list[Array] | None = field(default_factory=list)
    bytes: int = 0
    first_skip: SkippedImage | None = None
    shape: tuple[int, ...] = ()

    def add(self, row: int, outcome: Outcome) -> None:
        """Add one file."""
        image = outcome.image
        if isinstance(image, SkippedImage):
            self.skipped[image.reason] += 1
            self.first_skip = self.first_skip or image
            return
        self.rows.append(row)
        if outcome.label is not None:
            self.labels.append(outcome.label)
        size = f"{image.shape[1]} x {image.shape[0]}"
        self.sizes[size] += 1
        self.examples.setdefault(size, outcome.name)
        self.channels[image.shape[2]] += 1
        self.shape = image.shape
        self.bytes += image.nbytes
        if self.images is not None and self.bytes <= HELD:
            self.images.append(image)
        else:
            self.images = None


def _from_source(source: Source, name: str) -> ImageSet:
    """Look at every file of a source once, because size and channels are those of all files, not of the first."""
    scan = _Scan(skipped=Counter(source.skipped))
    reading = partial(decode, channels=None, converted=scan.converted)
    for row, outcome in enumerate(outcomes(source.records(), reading)):
        scan.add(row, outcome)
    if not scan.rows:
        refuse_empty(source, scan.skipped, scan.first_skip)
    _one_size(scan, name)
    channels = next(iter(scan.channels)) if len(scan.channels) == 1 else 3
    labels = np.array(scan.labels, np.int64) if len(scan.labels) == len(scan.rows) else None
    named = source.class_names is not None
    shape = (scan.shape[0], scan.shape[1], channels)
    read = partial(_batches_of, source, scan, channels)
    return ImageSet(
        name,
        len(scan.rows),
        shape,
        read,
        None if named else labels,
        groups=labels if named else None,
        notes=(*_scan_notes(scan, source), *source.notes),
        stamp=None if scan.images is not None else "",
    )


def _batches_of(source: Source, scan: _Scan, channels: int, size: int) -> Iterator[Array]:
    images: Iterable[Any] = scan.images if scan.images is not None else _decoded_again(source, scan.rows)
    return _batched((channels_of(image, channels) for image in images), size)


def _decoded_again(source: Source, rows: list[int]) -> Iterator[Array]:
    usable = set(rows)
    records = (record for row, record in enumerate(source.records()) if row in usable)
    for outcome in outcomes(records, partial(decode, channels=None)):
        if isinstance(outcome.image, SkippedImage):
            raise DataError(f"{source.path} has changed while it was read: {outcome.image.message}")
        yield outcome.image


def _one_size(scan: _Scan, name: str) -> None:
    if len(scan.sizes) > 1:
        (usual, most), (other, _), *_ = scan.sizes.most_common()
        raise DataError(
            f"{name}: {scan.examples[usual]} is {usual} and {scan.examples[other]} is {other}; all must be of one size "
            f"({most:,} of {len(scan.rows):,} are {usual}).",
            "bring them to one size first; figures of mixed sizes mean nothing",
        )


def _scan_notes(scan: _Scan, source: Source) -> list[str]:
    notes = []
    if scan.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(scan.skipped.items()))
        notes.append(f"skipped {sum(scan.skipped.values()):,} of {source.found:,} files: {reasons}")
    if len(scan.channels) > 1:
        gray = scan.channels[1]
        notes.append(f"{gray:,} of {len(scan.rows):,} images are gray and the others are not: all are taken in color")
    return notes + converted_note(scan.converted, len(scan.rows))
