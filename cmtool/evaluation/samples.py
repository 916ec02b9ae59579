"""Sets of images to be judged: an npz, a folder, a zip or images in memory, read in batches.

Everything is uint8 (B, H, W, C) with all images of one size. Points (toy data) are float32 (B, D, 1, 1) in an npz and
stay floats. Nothing that a file holds is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmtool.data import Dataset, read_image, to_uint8
from cmtool.data.archives import is_zip, open_zip, read_member
from cmtool.data.decode import is_gray
from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
BATCH = 64
Batches = Callable[[int], Iterator[Array]]


@dataclass(frozen=True)
class ImageSet:
    """Images and what is known about them.

    `shape` is (H, W, C); `read(size)` yields batches; `labels` (N,) int64 or None; `meta` what the maker wrote into the
    file (model, nfe, times, seeds).
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    read: Batches
    labels: Array | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    points: bool = False

    def batches(self, size: int = BATCH) -> Iterator[Array]:
        """Yield uint8 (b, H, W, C) batches (float32 for points), `count` images in all, in order."""
        left = self.count
        for batch in self.read(size):
            yield batch[:left]
            left -= len(batch[:left])
            if left <= 0:
                return
        if left > 0:
            raise DataError(f"{self.name} holds {self.count - left} images where {self.count} were announced.")

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of the pixels: the same images in another container have the same."""
        digest = hashlib.blake2b(f"{self.shape} {self.points}".encode(), digest_size=16)
        for batch in self.batches(256):
            digest.update(np.ascontiguousarray(batch).tobytes())
        digest.update(str(self.count).encode())
        return digest.hexdigest()

    def first(self, count: int) -> ImageSet:
        """Return the set of the first `count` images; raises `DataError` when there are fewer."""
        if count > self.count:
            raise DataError(f"{self.name} holds {self.count} images; {count} are asked for.")
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, count=count, labels=labels) if count < self.count else self

    def all(self) -> Array:
        """Return every image at once (N, H, W, C)."""
        return np.concatenate(list(self.batches(1024)))


def from_array(images: Array, name: str, labels: Array | None = None, meta: dict[str, Any] | None = None) -> ImageSet:
    """Wrap uint8 images (N, H, W, C), or float32 points (N, D, 1, 1), that are in memory."""

    def read(size: int) -> Iterator[Array]:
        yield from (images[start : start + size] for start in range(0, len(images), size))

    if not len(images):
        raise DataError(f"{name} holds no images.")
    shape = (images.shape[1], images.shape[2], images.shape[3])
    points = images.dtype != np.uint8
    return ImageSet(name, len(images), shape, read, labels, meta or {}, points)


def from_dataset(data: Dataset, name: str) -> ImageSet:
    """Wrap a data set."""
    labels = None if data.labels is None else data.labels.numpy()
    if data.float_samples:
        return from_array(data.images.float().numpy(), name, labels)
    return from_array(data.images.permute(0, 2, 3, 1).numpy(), name, labels)


def open_images(path: str | Path) -> ImageSet:
    """Open an npz, a folder of images or a zip of images.

    Raises:
        DataError: missing, empty, damaged, of several sizes, floats outside [-1, 1], or an npz of Python objects.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise DataError(
            f"there are no samples at {path}.", "name an .npz, a folder or a zip of images, or a run folder"
        )
    if path.suffix == ".npz":
        return _open_npz(path)
    if is_zip(path):
        return _open_zip(path)
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{path} is a single image, not a set of samples.", "write samples with --out samples.npz")
    raise DataError(f"{path} is no .npz, no folder and no zip of images, or it is damaged.")


# --- npz -------------------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> ImageSet:
    if not is_zip(path):
        raise DataError(f"{path} is damaged or is no npz.")
    open_zip(path).close()  # refuses what would expand like a bomb
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "arr_0" not in archive.files:
                found = ", ".join(archive.files) or "nothing"
                raise DataError(f"{path} has no entry arr_0 (found: {found}): it holds no images.")
            labels = archive["arr_1"] if "arr_1" in archive.files else None
            meta = json.loads(str(archive["meta"])) if "meta" in archive.files else {}
        shape, dtype = _npy_header(path)
        if labels is not None and not isinstance(labels, np.ndarray):
            raise DataError(f"{path} is damaged: its labels are no array.")
    except DataError:
        raise
    except ValueError as error:
        if "pickle" in str(error).lower() or "object" in str(error).lower():
            raise DataError(f"{path} holds Python objects, which are never loaded: they can run code.") from error
        raise DataError(f"{path} is damaged or is no npz: {error}.") from error
    except MemoryError:
        raise
    except Exception as error:
        # A strange archive fails in any way inside zipfile, zlib and NumPy; none of them may end in a traceback.
        raise DataError(f"{path} is damaged or is no npz.") from error
    return _checked_npz(path, shape, dtype, labels, meta if isinstance(meta, dict) else {})


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of arr_0 without reading it."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise DataError(f"{path} holds Python objects, which are never loaded: they can run code.")
    if fortran and len(shape) > 1:
        raise DataError(f"{path} stores arr_0 in Fortran order, which cannot be read in batches.", "save it in C order")
    return shape, dtype


def _checked_npz(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, labels: Array | None, meta: dict[str, Any]
) -> ImageSet:
    kind = f"arr_0 is {dtype} {shape}"
    points = dtype.kind == "f" and len(shape) == 4 and shape[2:] == (1, 1)
    if len(shape) != 4 or not (points or shape[-1] in (1, 3, 4)):
        raise DataError(f"{path}: {kind}; samples are uint8 (N, H, W, C) with 1, 3 or 4 channels.")
    if dtype != np.uint8 and dtype.kind != "f":
        raise DataError(f"{path}: {kind}; samples are uint8, or floats in [-1, 1].")
    if shape[0] == 0 or 0 in shape:
        raise DataError(f"{path} holds no images ({kind}).")
    if labels is not None and labels.shape != (shape[0],):
        raise DataError(f"{path}: arr_1 holds labels of shape {labels.shape} for {shape[0]} images.")

    def read(size: int) -> Iterator[Array]:
        for batch in _npy_batches(path, shape, dtype, size):
            yield batch if dtype == np.uint8 else _from_floats(batch, path, points)

    return ImageSet(str(path), shape[0], (shape[1], shape[2], shape[3]), read, labels, meta, points)


def _npy_batches(path: Path, shape: tuple[int, ...], dtype: np.dtype, size: int) -> Iterator[Array]:
    row = int(np.prod(shape[1:])) * dtype.itemsize
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            read(stream)
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                data = stream.read(count * row)
                if len(data) != count * row:
                    raise DataError(f"{path} is damaged: it ends after {start} of {shape[0]} images.")
                yield np.frombuffer(bytearray(data), dtype=dtype).reshape(
                    count, *shape[1:]
                )  # a copy that may be written to
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}.") from error


def _from_floats(batch: Array, path: Path, points: bool) -> Array:
    values = batch.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path} holds values that are not finite (NaN or infinity).")
    if points:
        return values
    low, high = float(values.min()), float(values.max())
    if low < -1.001 or high > 1.001:
        raise DataError(
            f"{path} holds floats from {low:.4g} to {high:.4g}; float images must lie in [-1, 1].",
            "save uint8 (0 to 255), or scale by x / 127.5 - 1",
        )
    return to_uint8(torch.from_numpy(values)).numpy()


# --- files of images -------------------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> ImageSet:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return _from_files(str(folder), [str(path) for path in files], lambda name: Path(name).read_bytes())


def _open_zip(path: Path) -> ImageSet:
    with open_zip(path) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith(SUFFIXES))

    def load(name: str) -> bytes:
        with open_zip(path) as archive:
            return read_member(archive, name)

    return _from_files(str(path), names, load)


def _from_files(where: str, names: list[str], load: Callable[[str], bytes]) -> ImageSet:
    if not names:
        raise DataError(f"{where} holds no images.", f"the endings that count are {', '.join(SUFFIXES)}")
    channels = 1 if is_gray(load(names[0])) else 3
    first = read_image(load(names[0]), channels, names[0])

    def read(size: int) -> Iterator[Array]:
        for start in range(0, len(names), size):
            images = [read_image(load(name), channels, name) for name in names[start : start + size]]
            for name, image in zip(names[start : start + size], images, strict=True):
                if image.shape != first.shape:
                    raise DataError(
                        f"{where}: {names[0]} is {_size(first)} and {name} is {_size(image)}; all must be of one size.",
                        "bring them to one size first; figures of mixed sizes mean nothing",
                    )
            yield np.stack(images)

    shape = (first.shape[0], first.shape[1], first.shape[2])
    return ImageSet(where, len(names), shape, read)


def _size(image: Array) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"
