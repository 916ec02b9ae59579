"""Pictures of any shape and models of one size: cut out, fit, and put back where it came from.

All pictures are uint8 (H, W, C); masks are float64 (H, W) in [0, 1] with 1 where something is to be generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmtool.data.images import MAX_PIXELS, MODES
from cmtool.editing.masks import Mask
from cmtool.errors import UserError

Bytes = NDArray[np.uint8]
Resize = Callable[[Any, int, int], NDArray[Any]]


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture in pixels; it may reach beyond the rim, where rim pixels are repeated."""

    top: int
    left: int
    height: int
    width: int

    def take(self, picture: NDArray[Any]) -> NDArray[Any]:
        """Return the pixels of the rectangle, (height, width, ...)."""
        rows = np.clip(np.arange(self.top, self.top + self.height), 0, picture.shape[0] - 1)
        columns = np.clip(np.arange(self.left, self.left + self.width), 0, picture.shape[1] - 1)
        return np.ascontiguousarray(picture[np.ix_(rows, columns)])

    def put(self, picture: NDArray[Any], part: NDArray[Any]) -> NDArray[Any]:
        """Return a copy of `picture` with `part` (height, width, ...) in its rectangle; what reaches beyond is cut."""
        out = picture.copy()
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = min(self.top + self.height, out.shape[0]), min(self.left + self.width, out.shape[1])
        out[top:bottom, left:right] = part[top - self.top : bottom - self.top, left - self.left : right - self.left]
        return out

    @property
    def is_square(self) -> bool:
        """Whether it fits a square model without distortion."""
        return self.height == self.width

    @property
    def is_vast(self) -> bool:
        """Whether it has more pixels than any picture may: the square around a long strip, too large to be held."""
        return self.height * self.width > MAX_PIXELS

    @property
    def turned(self) -> Region:
        """The same rectangle of the transposed picture."""
        return Region(self.left, self.top, self.width, self.height)


def take_resized(picture: NDArray[Any], region: Region, height: int, width: int, rule: Resize) -> NDArray[Any]:
    """Return the pixels of a region at height x width, by `rule` (resize, resize_mask, ...).

    A vast region goes axis by axis, first the one that lies inside the picture, so that it is never held as a whole.
    """
    if not region.is_vast:
        return rule(region.take(picture), height, width)
    if region.width > picture.shape[1] and region.height <= picture.shape[0]:
        return _transposed(take_resized(_transposed(picture), region.turned, width, height, rule))
    rows = picture.shape[0]
    narrow = rule(Region(0, region.left, rows, region.width).take(picture), rows, width)
    return rule(Region(region.top, 0, region.height, width).take(narrow), height, width)


def put_resized(picture: NDArray[Any], region: Region, small: NDArray[Any], rule: Resize) -> NDArray[Any]:
    """Return a copy of `picture` with `small` brought to the size of a region and laid there; `rule` as above.

    A vast region goes axis by axis, first the one that reaches beyond the picture, where most of it is cut.
    """
    if not region.is_vast:
        return region.put(picture, rule(small, region.height, region.width))
    if region.width > picture.shape[1] and region.height <= picture.shape[0]:
        return _transposed(put_resized(_transposed(picture), region.turned, _transposed(small), rule))
    inside = slice(max(0, -region.top), min(region.height, picture.shape[0] - region.top))
    tall = rule(small, region.height, small.shape[1])[inside]
    kept = Region(max(region.top, 0), region.left, len(tall), region.width)
    return kept.put(picture, rule(tall, kept.height, kept.width))


def _transposed(picture: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(picture.swapaxes(0, 1))


def region_of_fit(height: int, width: int, fit: str) -> Region:
    """Return the rectangle of a picture that becomes the model's square.

    "crop" is the middle square, "pad" the square around the picture (rim pixels repeated), "stretch" the picture.
    """
    if fit == "stretch":
        return Region(0, 0, height, width)
    side = min(height, width) if fit == "crop" else max(height, width)
    return Region((height - side) // 2, (width - side) // 2, side, side)


def region_around(mask: Mask, least: int) -> Region:
    """Return a square around the white of a mask of which the mask's box fills at most half a side, at least `least`.

    It stays inside the picture where it can; a side longer than the picture is cut to the picture's shorter side, as
    long as the box fits.

    Raises:
        UserError: if the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise UserError("the mask is empty: nothing is white.", "paint white what is to be generated, or --invert-mask")
    box_height, box_width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    box = int(max(box_height, box_width))
    side = max(2 * box, least)
    side = max(min(side, *mask.shape), box)
    top = _place(int(rows[0]), int(box_height), side, mask.shape[0])
    left = _place(int(columns[0]), int(box_width), side, mask.shape[1])
    return Region(top, left, side, side)


def _place(first: int, length: int, side: int, limit: int) -> int:
    start = first - (side - length) // 2
    return min(max(start, 0), limit - side) if side <= limit else (limit - side) // 2


def resize(picture: Bytes, height: int, width: int, rule: Image.Resampling | None = None) -> Bytes:
    """Resize bytes; the usual rule averages when shrinking (Pillow's filters widen) and is bicubic."""
    if picture.shape[:2] == (height, width):
        return picture
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture, MODES[picture.shape[-1]])
    array = np.asarray(image.resize((width, height), rule or Image.Resampling.BICUBIC))
    return array[..., None] if array.ndim == 2 else array


def resize_floats(values: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Resize (H, W) or (H, W, C) floats bicubically."""
    if values.ndim == 3:
        return np.stack([resize_floats(values[..., c], height, width) for c in range(values.shape[2])], axis=-1)
    if values.shape == (height, width):
        return values
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


def blend(original: Bytes, edited: Bytes, mask: Mask) -> Bytes:
    """Lay `edited` over `original` where the mask is white; where it is black the bytes stay as they are."""
    share = mask[..., None]
    mixed = original + share * (edited.astype(np.float64) - original)
    return np.floor(mixed + 0.5).clip(0, 255).astype(np.uint8)


def filled(picture: Bytes, hole: NDArray[np.bool_]) -> Bytes:
    """Return a picture (H, W, C) whose hole (H, W) holds the colors around it, so that resizing mixes in nothing else.

    Known pixels keep their bytes; those of the hole become means over the smallest squares with a known pixel.
    """
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    if not len(rows):
        return picture
    # Far from the hole nothing is asked of the picture: photos are large.
    box = tuple(slice(max(0, int(found[0]) - 16), int(found[-1]) + 17) for found in (rows, columns))
    out = picture.copy()
    part, open_part = out[box], hole[box]
    around = _pulled(part.astype(np.float32) * ~open_part[..., None], (~open_part).astype(np.float32))
    part[open_part] = np.floor(around[open_part] + 0.5).clip(0, 255).astype(np.uint8)
    return out


def _pulled(total: NDArray[Any], count: NDArray[Any]) -> NDArray[Any]:
    """Means (H, W, C) of sums over `count` (H, W) known pixels; where none is known, the mean at half the size."""
    mean = total / np.maximum(count, np.float32(1.0))[..., None]
    if (count > 0).all() or count.size == 1:
        return mean
    even = [(0, length % 2) for length in count.shape]
    wide, known = np.pad(total, [*even, (0, 0)]), np.pad(count, even)
    half = _pulled(_halved(wide), _halved(known)).repeat(2, axis=0).repeat(2, axis=1)
    return np.where(count[..., None] > 0, mean, half[: count.shape[0], : count.shape[1]])


def _halved(values: NDArray[Any]) -> NDArray[Any]:
    return values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]
