"""Where samples go as they are made: a picture, a grid, a scatter plot, an .npz file or a folder of PNGs.

A sink takes the samples in order. Output of many images survives a kill: `start` is how many samples of the same
request already exist.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cmtool.data.images import save_pictures, save_png, save_scatter
from cmtool.data.shards import ShardStore, read_request
from cmtool.errors import DataError
from cmtool.files.atomic import atomic_text

Array = NDArray[Any]
FOLDER_REQUEST = "samples.json"
# Batches that may wait for the writer: enough to overlap with computing, few enough to bound memory.
WAITING = 4
# The last chunk of every PNG: length zero, name, checksum.
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class Sink(Protocol):
    """Takes samples in order, uint8 (B, H, W, C) or float points (B, C, H, W), with labels (B,) or None."""

    start: int

    def append(self, samples: Array, labels: Array | None) -> None:
        """Take the next samples."""

    def pause(self) -> None:
        """Make sure that samples taken so far survive the end of the process, if the format allows it."""

    def finish(self) -> Path:
        """Complete the output; return its path."""


class PictureSink:
    """Keeps the samples and writes one picture at the end: the image, a grid of several, or a scatter plot of points.

    Args:
        path: of the PNG.
        text: what it says of itself.
        seeds: one for each sample; a picture of one sample says its seed and label, as it does in a folder.
        columns: of the grid.
        grid: a grid of one image too.
    """

    def __init__(
        self, path: Path, text: Mapping[str, Any], seeds: Sequence[int], columns: int | None = None, grid: bool = False
    ) -> None:
        self.path, self.text, self.columns, self.start = path, dict(text), columns, 0
        self._seeds, self._grid = seeds, grid
        self._samples: list[Array] = []
        self._labels: list[Array] = []

    def append(self, samples: Array, labels: Array | None) -> None:
        """Keep the next samples."""
        self._samples.append(samples)
        if labels is not None:
            self._labels.append(labels)

    def pause(self) -> None:
        """Do nothing: a picture is either complete or absent."""

    def finish(self) -> Path:
        """Write the picture."""
        samples = np.concatenate(self._samples)
        labels = np.concatenate(self._labels) if self._labels else None
        if samples.dtype != np.uint8:
            classes = None if labels is None else torch.from_numpy(labels)
            return save_scatter(torch.from_numpy(samples), self.path, classes, text=self.text)
        single = len(samples) == 1 and not self._grid
        text = image_text(self.text, self._seeds[0], None if labels is None else labels[0]) if single else self.text
        return save_pictures(samples, self.path, self.columns, text, self._grid)


class ShareSink:
    """Keeps one process's share in shards that survive a kill, until the shares are assembled."""

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self._store = ShardStore(path, request)
        self.start = self._store.count

    def append(self, samples: Array, labels: Array | None) -> None:
        """Add to the current shard."""
        self._store.append(samples, labels)

    def pause(self) -> None:
        """Close the current shard."""
        self._store.flush()

    def finish(self) -> Path:
        """Close the last shard; return the folder of all."""
        self._store.flush()
        return self._store.folder


class NpzSink(ShareSink):
    """Writes `arr_0`, `arr_1` and `meta` through shards that survive a kill."""

    def __init__(self, path: Path, request: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        super().__init__(path, request)
        self._meta = dict(meta)

    def finish(self) -> Path:
        """Stream the shards into the file."""
        return self._store.assemble(self._meta)


def is_whole_png(path: Path) -> bool:
    """Whether a file exists and ends like a PNG, unlike one that a power cut left empty or full of zeros."""
    try:
        with open(path, "rb") as stream:
            stream.seek(-len(PNG_END), os.SEEK_END)
            return stream.read() == PNG_END
    except OSError:
        return False


def image_text(meta: Mapping[str, Any], seed: int, label: Any) -> dict[str, Any]:
    """What the file of one image says: what all say, its seed, and its label where it has one."""
    return {**meta, "seed": str(seed), **({} if label is None else {"label": str(int(label))})}


class FolderSink:
    """Writes each image as `000000.png`, `000001.png`, ... with its seed and label as text in the file."""

    def __init__(self, path: Path, request: Mapping[str, Any], meta: Mapping[str, Any], seeds: Sequence[int]) -> None:
        self.path, self._meta, self._seeds = path, dict(meta), seeds
        if not read_request(path / FOLDER_REQUEST, request):
            if path.is_dir() and any(path.iterdir()):
                raise DataError(f"{path} holds other files already.", "choose an empty or a new folder with --out")
            atomic_text(path / FOLDER_REQUEST, json.dumps(dict(request), indent=1))
        self.start = self._there()

    def _there(self) -> int:
        count = 0
        while count < len(self._seeds) and is_whole_png(self.path / f"{count:06d}.png"):
            count += 1
        return count

    def append(self, samples: Array, labels: Array | None) -> None:
        """Write the next images."""
        for row, image in enumerate(samples):
            index = self.start + row
            text = image_text(self._meta, self._seeds[index], None if labels is None else labels[row])
            # Images are not synced one by one: after a power cut, the next start looks for the first broken file.
            save_png(image, self.path / f"{index:06d}.png", text, synced=False)
        self.start += len(samples)

    def pause(self) -> None:
        """Do nothing: every image is already a file."""

    def finish(self) -> Path:
        """Return the folder."""
        return self.path


class BackgroundSink:
    """Passes batches to a sink on another thread, so that the model can compute while files are written."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._queue: queue.Queue[tuple[Array, Array | None] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._sink.append(*item)
                except BaseException as error:
                    self._error = error

    def append(self, samples: Array, labels: Array | None) -> None:
        """Queue the next samples; re-raises an error of the writer."""
        if self._error is not None:
            raise self._error
        self._queue.put((samples, labels))

    def close(self) -> None:
        """Wait until everything queued is written; re-raises an error of the writer."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error


@contextmanager
def in_background(sink: Sink) -> Iterator[BackgroundSink]:
    """Write to `sink` while the block computes; samples taken are kept however the block ends."""
    background = BackgroundSink(sink)
    try:
        yield background
    finally:
        background.close()
        sink.pause()
