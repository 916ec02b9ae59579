"""From any source to one packed file: decoding in threads, one square size, skips counted by reason."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cmtool.data.cache import require_space
from cmtool.data.decode import Bytes, SkippedImage, fit_image, read_image
from cmtool.data.packed import PackedWriter, packed_writer
from cmtool.data.sources.base import Record, Source
from cmtool.errors import DataError

_CHUNK = 16  # records per task
Progress = Callable[[int, int], None]
Outcome = tuple[Bytes | SkippedImage, int | None]


@dataclass(frozen=True)
class Rules:
    """How images of any kind become alike; the fields are those of the [data] table."""

    resolution: int
    channels: int = 3
    fit: str = "crop"
    filter: str = "adm"
    small: str = "skip"


def channels_of(image: Bytes, channels: int) -> Bytes:
    """Bring an array (H, W, C) that needs no decoding to the wanted channels; gray is ITU-R 601, as Pillow's."""
    if image.shape[-1] == channels:
        return image
    if image.shape[-1] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[-1] == 3 and channels == 1:
        gray = image.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000
        return (gray >> 16).astype(np.uint8)[..., None]
    raise DataError(f"images with {image.shape[-1]} channels cannot become {channels}.", "set data.channels")


def _prepare(record: Record, rules: Rules) -> Bytes:
    """Decode and fit one record; raises `SkippedImage` when it cannot be used."""
    if isinstance(record.data, np.ndarray):
        image = channels_of(record.data, rules.channels)
    else:
        image = read_image(record.data, rules.channels, name=record.name)
    if min(image.shape[:2]) < rules.resolution and rules.small == "skip":
        size = f"{image.shape[1]} x {image.shape[0]} pixels is smaller than {rules.resolution}."
        raise SkippedImage(record.name, "too small", size)
    return fit_image(image, rules.resolution, rules.fit, rules.filter)


def _task(records: list[Record], rules: Rules) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for record in records:
        try:
            outcomes.append((_prepare(record, rules), record.label))
        except SkippedImage as skip:
            outcomes.append((skip, None))
    return outcomes


def _outcomes(source: Source, rules: Rules, workers: int) -> Iterator[Outcome]:
    """Decode in threads (Pillow and zlib release the interpreter), in order, with a bounded number in flight."""
    records = source.records()
    waiting: deque[Future[list[Outcome]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(waiting) < 3 * workers and (chunk := list(islice(records, _CHUNK))):
                waiting.append(pool.submit(_task, chunk, rules))
            if not waiting:
                return
            yield from waiting.popleft().result()


def _refuse_empty(source: Source, skipped: Counter[str], first: SkippedImage | None, rules: Rules) -> None:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    example = f" The first: {first.message}" if first else ""
    hint = "use --small upscale, or a smaller resolution" if skipped["too small"] else "point --data at readable images"
    raise DataError(f"no usable image is left of {source.found:,} files in {source.path} ({reasons}).{example}", hint)


def _facts(source: Source, rules: Rules, skipped: Counter[str]) -> dict[str, Any]:
    return {
        "source": source.kind,
        "path": str(source.path),
        "found": source.found,
        "skipped": dict(skipped),
        "class_names": list(source.class_names) if source.class_names else None,
        "classes": source.classes,
        "rules": asdict(rules),
        "notes": list(source.notes),
    }


def _fill(writer: PackedWriter, source: Source, rules: Rules, progress: Progress | None) -> dict[str, Any]:
    skipped, first = Counter(source.skipped), None
    for done, (outcome, label) in enumerate(_outcomes(source, rules, _workers()), start=1):
        if isinstance(outcome, SkippedImage):
            skipped[outcome.reason] += 1
            first = first or outcome
        else:
            writer.append(outcome, label)
        if progress is not None:
            progress(done, source.count)
    if not writer.count:
        _refuse_empty(source, skipped, first, rules)
    return writer.finish(_facts(source, rules, skipped))


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
