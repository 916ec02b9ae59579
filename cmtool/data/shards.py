"""Large sample sets in shards, so that a kill loses little; the result is still one file or folder.

While `big.npz` is being made, `big.npz.partial/` holds the request (JSON) and shards of consecutive samples, each
written atomically. The same request continues after the last complete shard. At the end the shards are streamed into
the file and removed.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmtool.data.images import npz_writer
from cmtool.errors import DataError
from cmtool.files.archives import NpzReader
from cmtool.files.atomic import atomic_text, atomic_write

Array = NDArray[Any]
REQUEST = "request.json"
# A shard is closed at this size or age, so that a kill costs seconds and 50,000 samples make few files.
SHARD_BYTES = 32 * 2**20
SHARD_SECONDS = 5.0


def read_request(path: Path, request: Mapping[str, Any]) -> bool:
    """Whether `path` holds this request; False if it holds none.

    Raises:
        DataError: it holds a different one; the message names the first entry that differs.
    """
    if not path.exists():
        return False
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        held = {}
    held = held if isinstance(held, dict) else {}
    plain = json.loads(json.dumps(dict(request)))
    different = [key for key in sorted({*held, *plain}) if held.get(key) != plain.get(key)]
    if not different:
        return True
    key = different[0]
    raise DataError(
        f"{path.parent} belongs to another request: {key} is {held.get(key)!r} there and {plain.get(key)!r} now.",
        f"choose another --out, or remove {path.parent}",
    )


class ShardStore:
    """Appends batches of samples (and labels) and assembles them; memory is bounded by one shard."""

    def __init__(self, target: Path, request: Mapping[str, Any]) -> None:
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        self._batches: list[tuple[Array, Array | None]] = []
        self._bytes, self._opened = 0, time.monotonic()
        if not read_request(self.folder / REQUEST, request):
            atomic_text(self.folder / REQUEST, json.dumps(dict(request), indent=1))
        self.count = sum(stop - start for start, stop, _ in self.shards())

    def shards(self) -> list[tuple[int, int, Path]]:
        """Return (start, stop, file) of the shards that continue each other from sample 0 on."""
        found, stop = [], 0
        for file in sorted(self.folder.glob("*.npz")):
            match = re.fullmatch(r"([0-9]{9,})-([0-9]{9,})", file.stem)
            first, last = (int(part) for part in match.groups()) if match else (-1, -1)
            if first == stop:
                found.append((first, last, file))
                stop = last
        return found

    def append(self, samples: Array, labels: Array | None) -> None:
        """Add the next samples (B, ...) and their labels (B,); they survive a kill once their shard is closed."""
        self._batches.append((samples, labels))
        self._bytes += samples.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._opened >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Close the current shard."""
        if self._batches:
            samples = np.concatenate([batch for batch, _ in self._batches])
            labels = [label for _, label in self._batches if label is not None]
            entries: dict[str, Any] = {"samples": samples}
            if labels:
                entries["labels"] = np.concatenate(labels)
            stop = self.count + len(samples)
            with (
                atomic_write(self.folder / f"{self.count:09d}-{stop:09d}.npz") as temporary,
                temporary.open("wb") as stream,
            ):
                np.savez(stream, **entries)
            self.count = stop
        self._batches, self._bytes, self._opened = [], 0, time.monotonic()

    def blocks(self) -> Iterator[tuple[Array, Array | None]]:
        """Yield (samples, labels or None) of each complete shard in turn."""
        for shard in self.shards():
            labeled = "labels" in NpzReader(shard[2]).arrays
            yield self._entry(shard, "samples"), self._entry(shard, "labels") if labeled else None

    def assemble(self, meta: Mapping[str, Any]) -> Path:
        """Stream all shards into the target (`arr_0`, `arr_1` when labeled, `meta`) and remove them."""
        self.flush()
        shards = self.shards()
        labels: list[Array] = []
        first = self._entry(shards[0], "samples")
        if "labels" in NpzReader(shards[0][2]).arrays:
            of_first = self._entry(shards[0], "labels")
            labels = [self._entry(shard, "labels", of_first) for shard in shards]
        given = np.concatenate(labels) if labels else None
        with npz_writer(self.target, (self.count, *first.shape[1:]), str(first.dtype), given, meta) as writer:
            for shard in shards:
                writer.append(self._entry(shard, "samples", first))
        shutil.rmtree(self.folder)
        return self.target

    @staticmethod
    def _entry(shard: tuple[int, int, Path], name: str, like: Array | None = None) -> Array:
        """Read an array of a shard; it must have the type and shape of `like`, from another shard."""
        start, stop, file = shard
        try:
            found = NpzReader(file).read(name)
            fits = like is None or (found.dtype == like.dtype and found.shape[1:] == like.shape[1:])
            if not fits or found.shape[:1] != (stop - start,):
                raise DataError(f"{file} does not hold the {stop - start:,} samples that its name says.")
        except DataError as error:
            raise DataError(error.message, f"remove {file} and type the same command again: it is made again") from None
        return found
