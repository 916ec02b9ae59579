"""Images in an .npz from any source: which array holds them, the order of its axes, the range of its values, labels.

An array that can be read in two ways is refused rather than guessed at, and the message says how to resolve it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmtool.data.images import to_uint8
from cmtool.errors import DataError
from cmtool.files.archives import ArrayInfo, NpzReader

IMAGE_KEYS = ("arr_0", "images", "data", "x", "samples")
LABEL_KEYS = ("arr_1", "labels", "label", "y")
RANGE = "range"  # names an array of two numbers, the values of black and white
_MARGIN = 1e-3  # values may leave the range by this share of it, through rounding
FLAT_NOTE = "each row is read as a plane of red, one of green and one of blue, as CIFAR-10 has them"


def layout(shape: tuple[int, ...], place: Path) -> tuple[str, tuple[int, int, int]]:
    """Return the order of the axes in an array of images.

    Args:
        shape: the shape of the array; the first axis counts images.
        place: the file, for messages.

    Returns:
        "NHWC", "NCHW", "NHW" or "flat" (rows of square RGB planes), and the shape (H, W, C) of one image.

    Raises:
        DataError: the array is not a batch of images, or could be one in two ways.
    """
    if len(shape) == 2:
        side = math.isqrt(shape[1] // 3)
        if not side or 3 * side * side != shape[1]:
            raise DataError(f"{place}: rows of {shape[1]} bytes are no square RGB images.")
        return "flat", (side, side, 3)
    if len(shape) == 3:
        if shape[2] in (3, 4) and shape[0] > 1:
            raise DataError(
                f"{place}: an array {shape} is one picture in color or {shape[0]} gray ones.",
                "give it all four axes: (N, H, W, C)",
            )
        return "NHW", (shape[1], shape[2], 1)
    last = len(shape) == 4 and shape[3] in (1, 3, 4)
    first = len(shape) == 4 and shape[1] in (1, 3, 4)
    if last and first:  # tiny images: take the reading that makes them square
        last, first = shape[1] == shape[2], shape[2] == shape[3]
        if last == first:
            raise DataError(
                f"{place}: an array {shape} can be read as (N, H, W, C) and as (N, C, H, W).",
                "save each image as a file, or enlarge them",
            )
    if last:
        return "NHWC", (shape[1], shape[2], shape[3])
    if first:
        return "NCHW", (shape[2], shape[3], shape[1])
    raise DataError(
        f"{place}: an array {shape} is no batch of images; they are uint8 (N, H, W, C) with 1, 3 or 4 channels."
    )


def to_nhwc(block: NDArray[Any], kind: str) -> NDArray[Any]:
    """Rearrange rows of an array in any of the layouts to (B, H, W, C)."""
    if kind == "flat":
        side = math.isqrt(block.shape[1] // 3)
        return block.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    if kind == "NHW":
        return block[..., None]
    return block.transpose(0, 2, 3, 1) if kind == "NCHW" else block


def class_numbers(values: Any, count: int, place: Path) -> NDArray[np.int64]:
    """Return labels as int64 (count,); raises DataError unless there is one class number for each image."""
    array = np.asarray(values)
    whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and bool((array == np.floor(array)).all()))
    if array.shape != (count,) or not whole or (count and array.min() < 0):
        raise DataError(
            f"{place} has labels of shape {array.shape} for {count} images ({array.dtype}) where {count} class numbers "
            "are expected."
        )
    return array.astype(np.int64)


def _named(reader: NpzReader, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if key in reader.arrays]


def _image_key(reader: NpzReader) -> str:
    """Return the name of the array that holds the images.

    Raises:
        DataError: there is none, or more than one.
    """
    found = _named(reader, IMAGE_KEYS)
    held = ", ".join(reader.arrays)
    if not found:
        raise DataError(
            f"{reader.path} has no images: its arrays are {held}, none of {', '.join(IMAGE_KEYS)}.",
            "save the images as arr_0",
        )
    alike = [key for key in found if len(reader.arrays[key].shape) >= 3]
    if len(alike) > 1:
        raise DataError(f"{reader.path} has several arrays of images: {', '.join(alike)}.", "leave one of them")
    return (alike or found)[0]


@dataclass(frozen=True)
class ArrayImages:
    """The images of an .npz. `shape` is (H, W, C); `points` are float32 (B, D, 1, 1) and stay floats."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None
    meta: dict[str, Any]
    points: bool
    notes: tuple[str, ...]
    key: str
    _reader: NpzReader = field(repr=False)
    _layout: str
    _range: tuple[float, float] | None

    def blocks(self, size: int = 256) -> Iterator[NDArray[Any]]:
        """Yield the images in order, `size` at a time: uint8 (B, H, W, C), or float32 points.

        Raises:
            DataError: the file is damaged, or holds values that are not finite or lie outside the range.
        """
        for block in self._reader.rows(self.key, size):
            if self.points:
                yield _finite(block.astype(np.float32), self.path)
            else:
                images = to_nhwc(block, self._layout)
                yield images if self._range is None else _scaled(images, self._range, self.path)


def _finite(values: NDArray[Any], path: Path) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise DataError(f"{path} holds values that are not finite (NaN or infinity).")
    return values


def _scaled(block: NDArray[Any], limits: tuple[float, float], path: Path) -> NDArray[np.uint8]:
    """Map values from their range to bytes by rounding."""
    low, high = limits
    values = _finite(block.astype(np.float32), path)
    least, most = float(values.min()), float(values.max())
    margin = _MARGIN * (high - low) / 2
    if least < low - margin or most > high + margin:
        raise DataError(
            f"{path} holds numbers from {least:.4g} to {most:.4g}; float images must lie in [{low:g}, {high:g}].",
            "save uint8 (0 to 255), or scale by x / 127.5 - 1",
        )
    if limits != (-1.0, 1.0):
        values = (values - low) * (2 / (high - low)) - 1
    return to_uint8(torch.from_numpy(np.ascontiguousarray(values))).numpy()


def _limits(reader: NpzReader, key: str) -> tuple[float, float] | None:
    """Return the values of black and white, or None for bytes that need no scaling.

    Raises:
        DataError: the file does not name them and the values fit two ranges.
    """
    info = reader.arrays[key]
    if RANGE in reader.arrays:
        return _said_range(reader)
    if info.dtype.kind == "f":
        return _signed(reader, key)
    if info.dtype != np.uint8:
        raise DataError(
            f"{reader.path}: {key} is {info.dtype} {info.shape}; images are uint8, or floats in [-1, 1].",
            f"save them as uint8, or add an array '{RANGE}' of the values of black and white",
        )
    top = 0
    for block in reader.rows(key):
        top = max(top, int(block.max(initial=0)))
        if top > 1:
            return None
    if top == 1:
        raise DataError(
            f"{reader.path}: {key} holds only the bytes 0 and 1: black and white, or all black?",
            f"save 0 and 255, or add an array '{RANGE}': [0, 1] or [0, 255]",
        )
    return None


def _said_range(reader: NpzReader) -> tuple[float, float] | None:
    values = reader.read(RANGE)
    if values.shape != (2,) or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{reader.path}: '{RANGE}' must be the two values of black and white, as [0, 1] or [-1, 1].")
    low, high = float(values[0]), float(values[1])
    if low >= high:
        raise DataError(f"{reader.path}: '{RANGE}' must rise, and is [{low:g}, {high:g}].")
    return (low, high)


def _signed(reader: NpzReader, key: str) -> tuple[float, float]:
    """Return [-1, 1] after checking that some values lie well below 0, so that [0, 1] cannot be meant."""
    low, high = math.inf, -math.inf
    for block in reader.rows(key):
        values = _finite(block.astype(np.float32), reader.path)
        low, high = min(low, float(values.min(initial=low))), max(high, float(values.max(initial=high)))
        if low < -0.5 or high > 1 + _MARGIN:
            return (-1.0, 1.0)
    raise DataError(
        f"{reader.path} holds floats from {low:.4g} to {high:.4g}, which can be read in [0, 1] and in [-1, 1].",
        f"add an array '{RANGE}' with [0, 1] or [-1, 1], or save uint8 (0 to 255)",
    )


def _meta(reader: NpzReader) -> dict[str, Any]:
    """Return the JSON that cmtool writes into its sample files, {} if there is none."""
    if "meta" not in reader.arrays:
        return {}
    text = reader.read("meta")
    if text.shape or text.dtype.kind not in "US":
        return {}
    try:
        found = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{reader.path} is damaged: the entry meta cannot be read ({error}).") from None
    return found if isinstance(found, dict) else {}


def _is_points(info: ArrayInfo) -> bool:
    return info.dtype.kind == "f" and len(info.shape) == 4 and info.shape[2:] == (1, 1)


def open_array_images(path: Path, reader: NpzReader | None = None) -> ArrayImages:
    """Open the images of an .npz: `arr_0` or `images`, `data`, `x`, `samples`; labels `arr_1`, `labels`, `label`, `y`.

    Args:
        path: the file.
        reader: the file if it is already open.

    Raises:
        DataError: the file is damaged or refused, has no images, or has some that can be read in two ways.
    """
    reader = reader or NpzReader(path)
    key = _image_key(reader)
    info = reader.arrays[key]
    if 0 in info.shape or not info.shape:
        raise DataError(f"{path} holds no images ({key} is {info.dtype} {info.shape}).")
    count, points = info.shape[0], _is_points(info)
    kind, shape = ("points", (info.shape[1], 1, 1)) if points else layout(info.shape, path)
    named = _named(reader, LABEL_KEYS)
    if len(named) > 1:
        raise DataError(f"{path} has several arrays of labels: {', '.join(named)}.", "leave one of them")
    labels = class_numbers(reader.read(named[0]), count, path) if named else None
    limits = None if points else _limits(reader, key)
    notes = (FLAT_NOTE,) if kind == "flat" else ()
    return ArrayImages(path, count, shape, labels, _meta(reader), points, notes, key, reader, kind, limits)
