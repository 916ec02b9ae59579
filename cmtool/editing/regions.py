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
from cmtool.errors import DataError, UserError

Bytes = NDArray[np.uint8]
Mask = NDArray[np.float64]
Resize = Callable[[Any, int, int], NDArray[Any]]
# Masks whose shape differs from the picture's by more than this are of another picture.
ASPECT_SLACK = 0.02
# A pixel whose channels differ by more levels than this has a color.
COLORED = 40


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


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """Resize a mask by area. A hard mask stays hard and covers every pixel that it touched, so that nothing of what
    was under it leaks into the known pixels; a soft one is averaged.
    """
    if mask.shape == (height, width):
        return mask
    hard = bool(np.isin(mask, (0.0, 1.0)).all())
    image = Image.fromarray(mask.astype(np.float32))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float64).clip(0, 1)
    return (resized > 1e-6).astype(np.float64) if hard else resized


def check_mask(colors: Bytes, name: str) -> str | None:
    """Return a notice if a mask (H, W, 3) is mostly neither black nor white.

    Raises:
        DataError: if it is in color, as photographs are and masks are not.
    """
    spread = colors.max(axis=2).astype(int) - colors.min(axis=2)
    if (spread > COLORED).mean() > 0.05:
        raise DataError(f"{name} is in color and looks like a picture, not like a mask.", "masks are black and white")
    between = (colors[..., 0] > 12) & (colors[..., 0] < 243)
    return f"{name} is mostly gray: is it a mask?" if between.mean() > 0.5 else None


def on_black(picture: Bytes) -> Bytes:
    """Lay RGBA (H, W, 4) on black: what was not painted in a mask is not white. Returns RGB (H, W, 3)."""
    alpha = picture[..., 3:].astype(np.uint16)
    return ((picture[..., :3] * alpha + 127) // 255).astype(np.uint8)


def mask_from_bytes(picture: Bytes, invert: bool) -> Mask:
    """Turn a picture (H, W, 3) into a mask by its luma: white is generated, black is kept."""
    mask = np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float64) / 255.0
    return 1.0 - mask if invert else mask


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
    if mask.max() < 0.5 / 255:
        raise UserError("the mask is empty: nothing is white.", "paint white what is to be generated, or --invert-mask")
    if mask.min() > 1 - 0.5 / 255:
        raise UserError("the mask is full: no pixel is known.", "use cmtool sample, or --invert-mask")
    return mask, notice


def blend(original: Bytes, edited: Bytes, mask: Mask) -> Bytes:
    """Lay `edited` over `original` where the mask is white; where it is black the bytes stay as they are."""
    share = mask[..., None]
    mixed = original + share * (edited.astype(np.float64) - original)
    return np.floor(mixed + 0.5).clip(0, 255).astype(np.uint8)
