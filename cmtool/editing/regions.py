"""Pictures of any shape for models of one size: a region is cut out, fitted, and put back where it came from.

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
from cmtool.errors import DataError, UserError

Bytes = NDArray[np.uint8]
Mask = NDArray[np.float64]
# A mask whose shape differs from the picture's by more than this belongs to another picture.
ASPECT_SLACK = 0.02
PAINT = "paint white what is to be generated, or --invert-mask"
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

    A vast region is resized one axis at a time, first the one inside the picture, so that it is never held as a whole.
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

    A vast region is resized one axis at a time, first the one that reaches beyond the picture, where most of it is cut.
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


def describe(original: Bytes, region: Region, side: int, fit: str) -> tuple[str, ...]:
    """Say how a picture was brought to the model's side; nothing if it already has that side."""
    height, width = original.shape[:2]
    if (height, width) == (side, side):
        return ()
    done = {"crop": "its middle square", "pad": "padded to a square,", "stretch": "stretched,"}[fit]
    if region.is_square and region.height == height == width:
        done = ""
    verb = "reduced" if region.height > side else "enlarged"
    return (" ".join(f"{width} x {height}: {done} {verb} to {side} x {side}".split()),)


def region_around(mask: Mask, least: int) -> Region:
    """Return a square around the white of a mask of which the mask's box fills at most half a side, at least `least`.

    It stays inside the picture where it can; a side longer than the picture is cut to the picture's shorter side, as
    long as the box fits.

    Raises:
        UserError: if the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise UserError("the mask is empty: nothing is white.", PAINT)
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


# --- holes -----------------------------------------------------------------------------------------------------------


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """Resize a mask so that it still covers what it covered: each pixel takes the largest value of all that it touches.

    So nothing under the mask can leak into known pixels, however soft the seam.
    """
    if mask.shape == (height, width):
        return mask
    return _largest(_largest(mask, height).T, width).T


def _largest(values: Mask, length: int) -> Mask:
    """Bring the rows of (N, ...) to `length` by the largest of those that each new row touches."""
    count, places = len(values), np.arange(length)
    first = places * count // length
    end = -((-(places + 1) * count) // length)
    # reduceat takes [first, end) at even places; a last row of zeros lets `end` point behind the rows.
    padded = np.concatenate([values, np.zeros_like(values[:1])])
    return np.maximum.reduceat(padded, np.stack([first, end], axis=1).reshape(-1), axis=0)[::2]


def match_mask(mask: Mask, height: int, width: int, name: str) -> tuple[Mask, str | None]:
    """Return the mask at the picture's size, and a notice if it had to be resized.

    Raises:
        DataError: if it is of another shape.
        UserError: if it is empty or full.
    """
    notice = None
    if mask.shape != (height, width):
        aspect, wanted = mask.shape[1] / mask.shape[0], width / height
        size = f"{mask.shape[1]} x {mask.shape[0]}"
        if abs(aspect / wanted - 1) > ASPECT_SLACK:
            raise DataError(
                f"the mask is {size} and {name} is {width} x {height}: another shape, so another picture.",
                f"paint one of {width} x {height} pixels, or of that shape",
            )
        notice = f"the mask is resized from {size} to {width} x {height}"
        mask = resize_mask(mask, height, width)
    if mask.max() <= 0:
        raise UserError("the mask is empty: nothing is white.", PAINT)
    if mask.min() >= 1:
        raise UserError("the mask is full: no pixel is known.", "use cmtool sample, or --invert-mask")
    return mask, notice


def blend(original: Bytes, edited: Bytes, mask: Mask) -> Bytes:
    """Lay `edited` over `original` where the mask is white; where it is black the bytes stay as they are."""
    share = mask[..., None]
    mixed = original + share * (edited.astype(np.float64) - original)
    return np.floor(mixed + 0.5).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Hole:
    """The hole to fill in a picture, at the picture's size and at the model's.

    Attributes:
        original: the picture (H, W, C).
        mask: (H, W), 1 where something is generated.
        region: the part of the picture that the model works on.
        small: that part at the model's side; nothing from under the mask is mixed into its known pixels.
        inner: the mask there.
        shown: that part, gray where something is generated.
        paste: the result is the whole picture, not the model's part of it.
        notes: what was done, for the user.
    """

    original: Bytes
    mask: Mask
    region: Region
    small: Bytes
    inner: Mask
    shown: Bytes
    paste: bool
    notes: tuple[str, ...]

    def given(self) -> Bytes:
        """What `closed` would return if nothing were generated."""
        side = len(self.small)
        return self.original if self.paste else take_resized(self.original, self.region, side, side, resize)

    def closed(self, made: Bytes) -> Bytes:
        """Return the picture with the bytes (side, side, C) of an edit in the hole and nowhere else."""
        if self.paste:
            return blend(self.original, put_resized(self.original, self.region, made, resize), self.mask)
        return np.where(self.inner[..., None] > 0, made, self.small)


def open_hole(original: Bytes, mask: Mask, side: int, *, fit: str, paste: bool, name: str, hidden: bool) -> Hole:
    """Prepare the hole that a mask of any size opens in a picture.

    Args:
        side: the model's, in pixels.
        fit: as in `region_of_fit`; with `paste` the model works on a square around the mask.
        name: what messages call the picture.
        hidden: what is under the mask must not be seen even where nothing is resized.

    Raises:
        DataError: the mask is of another shape.
        UserError: it leaves nothing to generate, or nothing that is known.
    """
    mask, resized = match_mask(mask, original.shape[0], original.shape[1], name)
    if paste:
        region = region_around(mask, side)
        said: tuple[str, ...] = (f"working on {region.width} x {region.height} pixels around the mask",)
    else:
        region = region_of_fit(original.shape[0], original.shape[1], fit)
        said = describe(original, region, side, fit)
    inner = take_resized(mask, region, side, side, resize_mask)
    if inner.max() == 0:
        raise UserError("the mask lies outside the part that is kept.", "use --fit pad, or --paste")
    if inner.min() >= 1 and not paste:
        raise UserError("the mask covers all of the part that is kept.", "use --fit pad, or --paste")
    small = _known_part(original, mask, region, side, hidden)
    shown = blend(small, np.full_like(small, 128), inner)
    return Hole(original, mask, region, small, inner, shown, paste, (*([resized] if resized else []), *said))


def _known_part(original: Bytes, mask: Mask, region: Region, side: int, hidden: bool) -> Bytes:
    """The region at the model's size, into whose known pixels nothing from under the mask was mixed.

    Args:
        hidden: what is under the mask must not be seen even where nothing is resized.
    """
    if (region.height, region.width) != (side, side):
        original = filled(original, mask > 0)
    elif hidden:
        original = filled(original, mask >= 1)
    return take_resized(original, region, side, side, resize)
