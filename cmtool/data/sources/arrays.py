"""Image collections stored as arrays: .npz files, CIFAR-10's batches, image-net.org's downsampled batches."""

from __future__ import annotations

import hashlib
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmtool.data.archives import NpzReader
from cmtool.data.cache import file_digest
from cmtool.data.pickles import read_array_pickle
from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.data.sources.known import CIFAR10_MD5
from cmtool.errors import DataError, unknown

IMAGE_KEYS = ("arr_0", "images", "data", "x", "samples")
LABEL_KEYS = ("arr_1", "labels", "label", "y")
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
DEVKIT_NOTE = (
    "class numbers are the ImageNet development kit's, not the sorted WordNet order of published class-conditional "
    "models; put map_clsloc.txt beside the batches to have them mapped"
)


def _pixels(block: NDArray[Any], place: Path) -> NDArray[np.uint8]:
    """Bring a block of rows to (B, H, W, C): flat planar rows, (B, H, W), (B, H, W, C) or (B, C, H, W)."""
    if block.dtype != np.uint8:
        raise DataError(f"{place} holds {block.dtype} images; only bytes (uint8) are images here.")
    if block.ndim == 2:
        side = math.isqrt(block.shape[1] // 3)
        if 3 * side * side != block.shape[1]:
            raise DataError(f"{place}: rows of {block.shape[1]} bytes are no square RGB images.")
        block = block.reshape(-1, 3, side, side)
    if block.ndim == 3:
        return block[..., None]
    if block.ndim != 4 or not {block.shape[1], block.shape[3]} & {1, 3, 4}:
        raise DataError(f"{place}: an array {tuple(block.shape)} is no batch of images.")
    return block if block.shape[3] in (1, 3, 4) else block.transpose(0, 2, 3, 1)


def _labels(values: Any, count: int, place: Path) -> list[int]:
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "iu" or (count and array.min() < 0):
        raise DataError(f"{place} has labels {array.dtype} {array.shape} where {count} class numbers are expected.")
    return [int(label) for label in array]


@dataclass(frozen=True)
class Part:
    """One file of a collection: how many images, their labels, and its pixels in blocks on demand."""

    path: Path
    count: int
    labels: list[int] | None
    blocks: Callable[[], Iterator[NDArray[Any]]]


def collect(kind: str, place: Path, parts: list[Part], signature: str, **facts: Any) -> Source:
    """Join files into one source; either all have labels or the labels are dropped."""
    labeled = all(part.labels is not None for part in parts)
    top = max((max(part.labels or [0]) for part in parts), default=0)

    def records() -> Iterator[Record]:
        for part in parts:
            index = 0
            for block in part.blocks():
                for image in _pixels(block, part.path):
                    yield Record(f"{part.path.name}[{index}]", image, part.labels[index] if part.labels else None)
                    index += 1

    count = sum(part.count for part in parts)
    return Source(kind, place, count, records, signature, classes=top + 1 if labeled else None, **facts)


def npz_part(path: Path, shift: int = 0) -> Part:
    """Open one .npz; `shift` is subtracted from its labels."""
    reader = NpzReader(path)
    image = next((key for key in IMAGE_KEYS if key in reader.arrays), None)
    if image is None:
        raise DataError(
            f"{path} has no images: its arrays are {', '.join(reader.arrays)}, none of {', '.join(IMAGE_KEYS)}."
        )
    count = reader.arrays[image].shape[0] if reader.arrays[image].shape else 0
    label = next((key for key in LABEL_KEYS if key in reader.arrays), None)
    labels = None if label is None else _labels(reader.read(label).astype(np.int64) - shift, count, path)
    return Part(path, count, labels, lambda: reader.rows(image))


def open_npz(path: Path) -> Source:
    """Open an .npz of images: `arr_0` or `images`, `data`, `x`, `samples`; labels `arr_1` or `labels`, `label`, `y`.

    Raises:
        DataError: it holds objects, expands like a bomb, is damaged, or has no images of bytes.
    """
    first_of_1000 = 1 if path.name.startswith(("train_data_batch", "val_data")) else 0
    notes = (DEVKIT_NOTE,) if first_of_1000 else ()
    return collect("npz", path, [npz_part(path, first_of_1000)], sign_file("npz", path), notes=notes)


def pickle_part(path: Path, shift: int = 0, blob: bytes | None = None) -> Part:
    """Open one pickled batch; `shift` is subtracted from its labels.

    A batch of the 64-pixel set is 1.6 GB: only its labels are kept, and its pixels are read again when they are due.
    `blob` is the file's content where it is not on the disk by itself.
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
    labels = None if values is None else _labels(np.asarray(values, dtype=np.int64) - shift, len(data), path)
    return Part(path, len(data), labels, lambda: iter([read()["data"]]))


def open_pickle(path: Path) -> Source:
    """Open one pickled batch (`data`, `labels`) with the restricted reader."""
    shift = 1 if path.name.startswith(("train_data_batch", "val_data")) else 0
    return collect("pickled batch", path, [pickle_part(path, shift)], sign_file("pickle", path))


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
    """Open CIFAR-10's python batches; every file's MD5 is compared before anything in it is read.

    Args:
        path: `cifar-10-batches-py`, or the folder that holds it.
        part: "train" (or None): the 50,000; "test": the 10,000.

    Raises:
        DataError: a batch is missing or not the published one.
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
