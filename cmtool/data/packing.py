"""From any source to one packed file: decoding in threads, one square size, skips counted by reason."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cmtool.data.cache import require_space
from cmtool.data.decode import Bytes, SkippedImage, fit_image, on_white, read_image
from cmtool.data.packed import PackedWriter, packed_writer
from cmtool.data.sources.base import Record, Source
from cmtool.errors import DataError

_CHUNK = 16  # records per task
Progress = Callable[[int, int], None]
Prepare = Callable[[Record], Bytes]


@dataclass(frozen=True)
class Outcome:
    """One record after decoding: its name, its image or why it cannot be used, and its label."""

    name: str
    image: Bytes | SkippedImage
    label: int | None


@dataclass(frozen=True)
class Rules:
    """How images of any kind become alike; the fields are those of the [data] table."""

    resolution: int
    channels: int = 3
    fit: str = "crop"
    filter: str = "adm"
    small: str = "skip"


def channels_of(image: Bytes, channels: int) -> Bytes:
    """Bring an array (H, W, C) that needs no decoding to the wanted channels; as `read_image` does for files."""
    if image.shape[-1] == channels:
        return image
    if channels == 4:
        return np.concatenate([channels_of(image, 3), np.full_like(image[..., :1], 255)], axis=2)
    if image.shape[-1] == 4:
        return channels_of(on_white(image), channels)
    if image.shape[-1] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[-1] == 3 and channels == 1:
        gray = image.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000
        return (gray >> 16).astype(np.uint8)[..., None]
    raise DataError(f"images with {image.shape[-1]} channels cannot become {channels}.", "set data.channels")


def decode(record: Record, channels: int | None) -> Bytes:
    """Return the pixels of one record, (H, W, channels); with None, in gray (1) or color (3) as they are stored."""
    if isinstance(record.data, np.ndarray):
        return record.data if channels is None else channels_of(record.data, channels)
    return read_image(record.data, channels, name=record.name)


def _prepare(record: Record, rules: Rules, faded: list[str]) -> Bytes:
    """Decode and fit one record, and note in `faded` if it loses its colors.

    Raises:
        SkippedImage: it cannot be used.
    """
    image = decode(record, None if rules.channels == 1 else rules.channels)
    if min(image.shape[:2]) < rules.resolution and rules.small == "skip":
        size = f"{image.shape[1]} x {image.shape[0]} pixels is smaller than {rules.resolution}."
        raise SkippedImage(record.name, "too small", size)
    if image.shape[-1] != rules.channels:
        if (image != image[..., :1]).any():
            faded.append(record.name)
        image = channels_of(image, rules.channels)
    return fit_image(image, rules.resolution, rules.fit, rules.filter)


def _task(records: list[Record], prepare: Prepare) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for record in records:
        try:
            outcomes.append(Outcome(record.name, prepare(record), record.label))
        except SkippedImage as skip:
            outcomes.append(Outcome(record.name, skip, None))
    return outcomes


def outcomes(records: Iterator[Record], prepare: Prepare) -> Iterator[Outcome]:
    """Decode in threads (Pillow and zlib release the interpreter), in order, with a bounded number in flight.

    Args:
        records: what to decode.
        prepare: makes the pixels of one; a `SkippedImage` that it raises becomes an outcome.
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
    """Raise the DataError of a source of which no image can be used; it gives the reasons and one example."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    example = f" The first: {first.message}" if first else ""
    hint = "use --small upscale, or a smaller resolution" if skipped["too small"] else "give readable images"
    raise DataError(f"no usable image is left of {source.found:,} files in {source.path} ({reasons}).{example}", hint)


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


def _fill(writer: PackedWriter, source: Source, rules: Rules, progress: Progress | None) -> dict[str, Any]:
    skipped, first = Counter(source.skipped), None
    faded: list[str] = []
    decoded = outcomes(source.records(), partial(_prepare, rules=rules, faded=faded))
    for done, outcome in enumerate(decoded, start=1):
        if isinstance(outcome.image, SkippedImage):
            skipped[outcome.image.reason] += 1
            first = first or outcome.image
        else:
            writer.append(outcome.image, outcome.label)
        if progress is not None:
            progress(done, source.count)
    if not writer.count:
        refuse_empty(source, skipped, first)
    notes = (f"{len(faded):,} of {writer.count:,} images lose their colors: one channel is gray",) if faded else ()
    return writer.finish(_facts(source, rules, skipped, notes))


def _workers() -> int:
    return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pack(source: Source, out: Path, rules: Rules, progress: Progress | None = None) -> dict[str, Any]:
    """Write every usable image of `source` into the packed file `out` and return its header.

    Args:
        source: what to read.
        out: the file; it appears only when it is whole.
        rules: size, channels, fit, filter and what to do with small images.
        progress: called with (images done, images in all).

    Raises:
        DataError: the disk is short, or no usable image is left.
    """
    needed = source.count * rules.channels * rules.resolution**2
    require_space(out.parent, needed, f"a packed copy of {source.path}")
    with packed_writer(out, rules.channels, rules.resolution) as writer:
        return _fill(writer, source, rules, progress)
