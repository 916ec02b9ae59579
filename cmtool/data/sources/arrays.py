"""Images stored as arrays: .npz files, the batches of CIFAR-10, and image-net.org's downsampled batches."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmtool.data.array_images import class_numbers, layout, open_array_images, to_nhwc
from cmtool.data.pickles import read_array_pickle
from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.data.sources.known import CIFAR10_MD5
from cmtool.errors import DataError, unknown
from cmtool.files.cache import file_digest

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_DEVKIT_FILES = ("train_data_batch", "val_data")
DEVKIT_NOTE = (
    "class numbers are the ImageNet development kit's, not the sorted WordNet order of published class-conditional "
    "models; put map_clsloc.txt beside the batches to have them mapped"
)


def _pixels(block: NDArray[Any], place: Path) -> NDArray[np.uint8]:
    """Rearrange the rows of a pickled batch to (B, H, W, C)."""
    if block.dtype != np.uint8:
        raise DataError(f"{place} holds {block.dtype} images; only bytes (uint8) are images here.")
    return to_nhwc(block, layout(block.shape, place)[0])


@dataclass(frozen=True)
class Part:
    """One file of a collection: number of images, labels, and pixels in blocks on demand."""

    path: Path
    count: int
    labels: list[int] | None
    blocks: Callable[[], Iterator[NDArray[Any]]]


def collect(
    kind: str, place: Path, parts: list[Part], signature: str, notes: tuple[str, ...] = (), **facts: Any
) -> Source:
    """Join files into one source. If some have no labels, all labels are dropped and a note says so."""
    without = sum(part.labels is None for part in parts)
    if 0 < without < len(parts):
        notes += (f"{without:,} of {len(parts):,} files have no labels, so that none is used",)
    top = max((max(part.labels or [0]) for part in parts), default=0)

    def records() -> Iterator[Record]:
        for part in parts:
            index = 0
            for block in part.blocks():
                for image in block:
                    label = part.labels[index] if part.labels and not without else None
                    yield Record(f"{part.path.name}[{index}]", image, label)
                    index += 1

    count = sum(part.count for part in parts)
    return Source(kind, place, count, records, signature, classes=None if without else top + 1, notes=notes, **facts)


def _shifted(labels: NDArray[np.int64], devkit: bool) -> list[int]:
    """Return labels that start from 0; in image-net.org's batches they start from 1."""
    return (labels - (devkit and labels.min(initial=1) > 0)).tolist()


def npz_part(path: Path) -> tuple[Part, tuple[str, ...]]:
    """Open one .npz; also return notes for the user."""
    images = open_array_images(path)
    if images.points:
        raise DataError(f"{path} are points, not images: there is nothing to pack.")
    devkit = path.name.startswith(_DEVKIT_FILES) and images.key == "data"
    labels = None if images.labels is None else _shifted(images.labels, devkit)
    notes = (DEVKIT_NOTE,) if devkit else images.notes
    return Part(path, images.count, labels, images.blocks), notes


def open_npz(path: Path) -> Source:
    """Open an .npz of images, see `open_array_images`.

    Raises:
        DataError: it holds objects, would expand like a bomb, is damaged, or has no images.
    """
    part, notes = npz_part(path)
    return collect("npz", path, [part], sign_file("npz", path), notes=notes)


def pickle_part(path: Path, blob: bytes | None = None) -> Part:
    """Open one pickled batch.

    A batch of the 64-pixel set takes 1.6 GB, so only its labels are kept, and its pixels are read again when needed.
    `blob` is the content of a batch that is not a file of its own.
    """

    def read() -> dict[str, Any]:
        if blob is not None:
            return read_array_pickle(blob, str(path))
        with open(path, "rb") as stream:
            return read_array_pickle(stream, str(path))

    held = read()
    data = held.get("data")
    if not isinstance(data, np.ndarray):
        raise DataError(f"{path} has no array 'data'; it has {', '.join(held)}.")
    values = held.get("labels", held.get("fine_labels"))
    devkit = path.name.startswith(_DEVKIT_FILES)
    labels = None if values is None else _shifted(class_numbers(values, len(data), path), devkit)
    return Part(path, len(data), labels, lambda: iter([_pixels(read()["data"], path)]))


def open_pickle(path: Path) -> Source:
    """Open one pickled batch (`data`, `labels`) with the restricted unpickler."""
    return collect("pickled batch", path, [pickle_part(path)], sign_file("pickle", path))


def _cifar_names(part: str | None) -> list[str]:
    if part not in (None, "train", "test"):
        raise DataError(unknown("part of cifar10", str(part), ("train", "test")))
    return ["test_batch"] if part == "test" else [f"data_batch_{index}" for index in range(1, 6)]


def _cifar(place: Path, blobs: dict[str, bytes], signature: str) -> Source:
    for name, blob in blobs.items():
        if hashlib.md5(blob, usedforsecurity=False).hexdigest() != CIFAR_MD5[name]:
            raise DataError(
                f"{place}: {name} is damaged or is not CIFAR-10's (its MD5 differs).",
                f"remove it and fetch the data again (the archive's MD5 is {CIFAR10_MD5})",
            )
    parts = [pickle_part(place / name, blob=blob) for name, blob in blobs.items()]
    source = collect("cifar10", place, parts, signature)
    source.class_names = CIFAR_CLASSES if source.classes == len(CIFAR_CLASSES) else None
    return source


def open_cifar_folder(path: Path, part: str | None = None) -> Source:
    """Open the Python batches of CIFAR-10. Each file's MD5 is checked before anything in it is read.

    Args:
        path: `cifar-10-batches-py`, or the folder that holds it.
        part: "train" (or None): the 50,000; "test": the 10,000.

    Raises:
        DataError: a batch is missing, or is not the published one.
    """
    folder = path / CIFAR_FOLDER if (path / CIFAR_FOLDER).is_dir() else path
    files = [folder / name for name in _cifar_names(part)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} of CIFAR-10.", "unpack cifar-10-python.tar.gz again")
    return _cifar(folder, {file.name: file.read_bytes() for file in files}, sign_file(f"cifar {part}", *files))


def open_cifar_archive(path: Path, part: str | None = None) -> Source:
    """Read CIFAR-10's batches inside `cifar-10-python.tar.gz`; nothing is extracted to the disk."""
    names = _cifar_names(part)
    if file_digest(path) != CIFAR10_MD5:
        raise DataError(
            f"{path} is not CIFAR-10's archive (its MD5 is not {CIFAR10_MD5}); no other .tar.gz is read.",
            "unpack other archives and give the folder",
        )
    blobs = {}
    with tarfile.open(path, "r:gz") as archive:
        for name in names:
            member = archive.extractfile(f"{CIFAR_FOLDER}/{name}")
            if member is None:
                raise DataError(f"{path} has no {name}.")
            blobs[name] = member.read()
    return _cifar(path, blobs, sign_file(f"cifar {part}", path))
