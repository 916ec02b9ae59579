"""Masks as people have them: JPEGs, noisy or anti-aliased strokes, values 0 and 1, layers, the picture's own alpha.

A mask is float64 (H, W) in [0, 1]: 1 where something is to be generated, 0 where bytes are kept, between at a seam.
Its levels (0 black, 255 white) are read so:

* a mask of two levels, whatever they are: the lower one is black, the higher one white;
* others: up to `NEAR` is black, from 255 - `NEAR` on white, and the seam between is linear;
* a mask with hard edges that was stored with loss (a JPEG of low quality, or the grain that such files leave): up to
  `GRAIN` is black, from 255 - `GRAIN` on white, and hard edges are cut at the middle. A black pixel beside a white one
  reaches level 103 in a JPEG of quality 50.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from cmtool.errors import DataError, UserError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Mask = NDArray[np.float64]
NEAR, GRAIN = 24, 96
# A pixel whose channels differ by more levels has a color; a tint below it leaves black and white as they are.
COLORED = 24
# Neighbors that differ by more levels are a hard edge.
STEEP = 128
# Faint levels, beyond the noise of 1 to 3 levels of a canvas. Drawn edges have them beside steep ones alone, JPEGs also
# elsewhere: in a hundredth (drawn) and a tenth (JPEG) of as many pixels as are steep. Or, where all is steep, they are
# nearly as many as levels between: up to .83 of them in drawn masks, 1.6 and more in JPEGs that need it.
FAINT, STRAY, GRAINY = (6, 24), 0.03, 0.9
# A JPEG whose table of quantization is coarser on average (quality 82 and less) has grain whatever is seen of it.
COARSE = 20
# Masks whose shape differs from the picture's by more than this are of another picture.
ASPECT_SLACK = 0.02
PAINT = "paint white what is to be generated, or --invert-mask"


class Painted(NamedTuple):
    """A mask, and what the user should hear about it."""

    mask: Mask
    notices: tuple[str, ...] = ()


def mask_from_image(image: Image.Image, name: str, invert: bool = False) -> Painted:
    """Return the mask that an image of any Pillow mode paints: white is generated, what is transparent is not white.

    Args:
        image: upright.
        name: what messages call it.
        invert: white is kept, black is generated.

    Raises:
        DataError: it is in color, or its values have no range.
        UserError: it has one level everywhere that is neither black nor white.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        white = 1.0 if image.mode == "F" else 65535.0
        levels = np.asarray(image).astype(np.float64)
        return mask_from_levels(white - levels if image.info.get("white_is_zero") else levels, white, name, invert)
    painted = on_black(np.asarray(image.convert("RGBA")))
    check_gray(painted, name)
    luma = np.asarray(Image.fromarray(painted).convert("L"))
    return mask_from_levels(luma, 255.0, name, invert, _is_coarse(image))


def mask_from_levels(
    levels: NDArray[Any], white: float, name: str, invert: bool = False, lossy: bool = False
) -> Painted:
    """Return the mask of gray levels (H, W), of which `white` is the highest that there can be.

    Raises:
        DataError: levels that are not finite, or outside [0, white] where there are more than two.
        UserError: one level everywhere that is neither black nor white.
    """
    low, high = float(levels.min()), float(levels.max())
    if not np.isfinite([low, high]).all():
        raise DataError(f"{name} has values that are no numbers.", "save it as an 8-bit PNG, black and white")
    if low < high and bool(((levels == low) | (levels == high)).all()):
        mask, notices = (levels == high).astype(np.float64), _two(low, high, white, name, invert)
        return Painted(1.0 - mask if invert else mask, notices)
    if low < 0 or high > white:
        raise DataError(f"{name} has values outside [0, {white:g}].", "save it as an 8-bit PNG, black and white")
    scaled = levels.astype(np.float64) * (255.0 / white)
    if low == high and NEAR < scaled.flat[0] < 255 - NEAR:
        raise UserError(f"{name} has one level everywhere: it does not say where to generate.", PAINT)
    mask = cleaned(scaled, lossy)
    return Painted(1.0 - mask if invert else mask, _doubts(mask, scaled, name, invert))


def _two(low: float, high: float, white: float, name: str, invert: bool) -> tuple[str, ...]:
    """Say how a mask of two levels is read where these are not near black and near white."""
    if low * 255 <= NEAR * white and high * 255 >= (255 - NEAR) * white:
        return ()
    made, kept = (low, high) if invert else (high, low)
    return (f"{name} has two levels: {kept:g} is kept, {made:g} is generated",)


def _doubts(mask: Mask, levels: Floats, name: str, invert: bool) -> tuple[str, ...]:
    """Say what is odd about a mask of many levels."""
    if ((mask > 0) & (mask < 1)).mean() > 0.5:
        return (f"{name} is mostly gray: is it a mask?",)
    strongest = 1.0 - mask.min() if invert else mask.max()
    if not 0 < strongest < 1:
        return ()
    end, level = ("darkest", levels.min()) if invert else ("lightest", levels.max())
    return (f"the {end} level of {name} is {level:.0f} of 255: what was there shows through",)


def cleaned(levels: Floats, lossy: bool = False) -> Mask:
    """Return levels (H, W) in [0, 255] as a mask: near black is 0, near white is 1; see the head of this file.

    Args:
        lossy: the levels are known to be stored with loss; others are told by their grain.
    """
    image = Image.fromarray(np.floor(levels + 0.5).astype(np.uint8))
    steep = _filtered(image, ImageFilter.MaxFilter(3)) - _filtered(image, ImageFilter.MinFilter(3)) >= STEEP
    if not steep.any() or not _has_grain(levels, steep, lossy):
        return _soft(levels, NEAR)
    return np.where(steep, levels >= STEEP, _soft(levels, GRAIN))


def _soft(levels: Floats, near: int) -> Mask:
    """0 up to level `near`, 1 from 255 - `near` on, linear between."""
    return np.clip((levels - near) / (255.0 - 2 * near), 0.0, 1.0)


def _filtered(image: Image.Image, rule: ImageFilter.Filter) -> NDArray[np.int16]:
    return np.asarray(image.filter(rule), dtype=np.int16)


def _is_coarse(image: Image.Image) -> bool:
    """Whether an image is a JPEG of low quality, or of a format that loses and does not say how much."""
    if image.format in ("WEBP", "AVIF"):
        return True
    tables: dict[int, list[int]] = getattr(image, "quantization", None) or {}
    return any(float(np.mean(table)) > COARSE for table in list(tables.values())[:1])


def _has_grain(levels: Floats, steep: NDArray[np.bool_], lossy: bool) -> bool:
    """Whether a mask has hard edges, and so many faint levels that a lossy format must have made them."""
    distance = np.minimum(levels, 255.0 - levels)
    faint, between = (distance >= FAINT[0]) & (distance <= FAINT[1]), distance > FAINT[1]
    edges = np.count_nonzero(steep)
    if np.count_nonzero(between & ~steep) > edges:
        return False  # drawn softly: its faint levels are the ends of a slope
    stray = lossy or np.count_nonzero(faint & ~steep) > STRAY * edges
    return bool(stray or np.count_nonzero(faint) > GRAINY * np.count_nonzero(between))


def mask_from_alpha(alpha: Bytes) -> Mask:
    """Return what an alpha channel (H, W) leaves open: transparent is generated, partly transparent is the seam."""
    return _soft(255.0 - alpha.astype(np.float64), NEAR)


def check_gray(colors: Bytes, name: str) -> None:
    """Refuse a mask (H, W, 3) with colors, however few.

    Raises:
        DataError: it has some.
    """
    spread = colors.max(axis=2).astype(np.int16) - colors.min(axis=2)
    count = int(np.count_nonzero(spread > COLORED))
    if count > 0.05 * spread.size:
        raise DataError(f"{name} is in color and looks like a picture, not like a mask.", "masks are black and white")
    if count:
        first = colors.reshape(-1, 3)[int(np.argmax(spread.reshape(-1) > COLORED))]
        color = ", ".join(str(int(value)) for value in first)
        raise DataError(
            f"{name} has {count:,} colored pixel{'s' * (count != 1)}, e.g. ({color}): white or black?",
            "masks are black and white; paint in white what is to be generated",
        )


def on_black(picture: Bytes) -> Bytes:
    """Lay RGBA (H, W, 4) on black: what was not painted in a mask is not white. Returns RGB (H, W, 3)."""
    alpha = picture[..., 3:].astype(np.uint16)
    return ((picture[..., :3] * alpha + 127) // 255).astype(np.uint8)


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """Resize a mask so that it covers what it covered: each pixel takes the largest value of all that it touches.

    Nothing of what was under the mask can so become a part of known pixels, at however soft a seam.
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
