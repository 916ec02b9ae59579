"""Pictures and masks as people have them: files, Pillow images, arrays; with alpha, color profiles, JPEG artifacts.

A mask is float64 (H, W) in [0, 1]: 1 where something is to be generated, 0 where bytes are kept, between at a seam.
Its levels (0 black, 255 white) are read as follows:

* a mask of two levels, whatever they are: the lower one is black, the higher one white;
* others: up to `NEAR` is black, from 255 - `NEAR` on white, and the seam between is linear;
* a mask with hard edges that was stored with loss (a JPEG of low quality, or the grain that such files leave): up to
  `GRAIN` is black, from 255 - `GRAIN` on white, and hard edges are cut at the middle. A black pixel beside a white one
  reaches level 103 in a JPEG of quality 50.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from cmtool.data.decode import channels_of, is_transparent, to_bytes, upright
from cmtool.data.images import to_uint8
from cmtool.data.profiles import convert, other_profile, own_profile
from cmtool.editing.regions import PAINT, Mask
from cmtool.errors import DataError, UserError

Bytes = NDArray[np.uint8]
# A file, a Pillow image, bytes (H, W, C) or (H, W), or a float tensor (C, H, W) in [-1, 1].
Picture: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8] | Tensor"
Floats = NDArray[np.float64]
NEAR, GRAIN = 24, 96
# A pixel whose channels differ by more levels than this has a color; a weaker tint still counts as black or white.
COLORED = 24
# Neighbors that differ by more levels than this form a hard edge.
STEEP = 128
# Faint levels, beyond the noise of 1 to 3 levels of a canvas. Drawn edges have them beside steep ones alone, JPEGs also
# elsewhere: in a hundredth (drawn) and a tenth (JPEG) of as many pixels as are steep. Or, where all is steep, they are
# nearly as many as levels between: up to .83 of them in drawn masks, 1.6 and more in JPEGs that need it.
FAINT, STRAY, GRAINY = (6, 24), 0.03, 0.9
# A JPEG with a coarser quantization table on average (quality 82 and below) has grain, visible or not.
COARSE = 20


@dataclass(frozen=True)
class Photo:
    """One upright picture in its own color space.

    Attributes:
        pixels: (H, W, C); where it is transparent, laid on white, or with `holes` the colors as they are stored.
        holes: (H, W), 1 where it is transparent, between 0 and 1 where partly so; None: opaque, or laid on white.
        profile: the ICC profile that `pixels` are in; None: sRGB.
        dpi: pixels an inch, across and down, where the file says so.
        notes: what was done to the picture, for the user.
    """

    pixels: Bytes
    holes: Mask | None = None
    profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def to_srgb(self, pixels: Bytes) -> Bytes:
        """Convert bytes (H, W, C) of the picture's color space to those of the model, sRGB."""
        return convert(pixels, self.profile)

    def from_srgb(self, pixels: Bytes) -> Bytes:
        """Convert bytes (H, W, C) that the model made to the picture's color space."""
        return convert(pixels, self.profile, back=True)


def opened(picture: Picture, name: str = "the picture") -> tuple[Image.Image, str]:
    """Return a picture of any form as an upright Pillow image of any mode, and what messages call it.

    Raises:
        DataError: there is no such file, or the array is no picture.
    """
    if isinstance(picture, (str, Path)):
        return upright(Path(picture)), str(picture)
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture), name
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or not picture.is_floating_point():
            raise DataError(f"a tensor {tuple(picture.shape)} of {picture.dtype} is no picture (C, H, W) in [-1, 1].")
        picture = to_uint8(picture.detach().cpu()).permute(1, 2, 0).numpy()
    flat = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
    if flat.dtype != np.uint8 or not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[-1] in (3, 4))):
        kind = f"{picture.dtype} {picture.shape}"
        raise DataError(f"an array of {kind} is no picture: uint8 (H, W) or (H, W, 1, 3 or 4).")
    return Image.fromarray(np.ascontiguousarray(flat)), name


def photo_of(picture: Picture, channels: int, see_through: bool = False) -> Photo:
    """Return a picture of any form and mode as an edit takes it.

    Args:
        picture: a path, a Pillow image, uint8 (H, W) or (H, W, C), or a float tensor (C, H, W) in [-1, 1].
        channels: those of the model: 1 (gray), 3 (color) or 4.
        see_through: what is transparent is a hole, not white.

    Raises:
        DataError: there is no such file, or the array is no picture.
    """
    image, name = opened(picture)
    profile, notes = own_profile(image, channels), []
    other = other_profile(image)
    if other is not None:
        way = "converted to sRGB" if profile is None else "converted to sRGB for the model, and back"
        notes.append(f"its colors ({other}) are {way}")
    plain = image.copy()
    if profile is not None:  # the decoder is not to convert them
        plain.info.pop("icc_profile")
    holes = None
    if see_through and is_transparent(plain):
        stored = to_bytes(plain, 4, name)
        holes = mask_from_alpha(stored[..., 3])
    if holes is not None and holes.any():
        pixels = stored if channels == 4 else channels_of(stored[..., :3], channels)
    else:
        holes, pixels = None, to_bytes(plain, channels, name)
        if channels != 4 and is_transparent(plain) and to_bytes(plain, 4, name)[..., 3].min() < 255:
            notes.append("what is transparent is laid on white and written so: results have no transparency")
    if channels == 1 and _has_colors(plain):
        notes.append("its colors are dropped, for the model is gray")
    return Photo(pixels, holes, profile, _dpi(image.info.get("dpi")), tuple(notes))


def _has_colors(image: Image.Image) -> bool:
    if image.mode.startswith(("1", "L", "I", "F")) and image.mode != "LAB":
        return False
    colors = np.asarray(image.convert("RGB"))
    return bool((colors != colors[..., :1]).any())


def _dpi(given: Any) -> tuple[float, float] | None:
    """The resolution if a PNG can hold it, None if it is nonsense."""
    try:
        across, down = (float(value) for value in given)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    fine = all(math.isfinite(value) and 0.1 <= value <= 1e6 for value in (across, down))
    return (across, down) if fine else None


# --- masks -----------------------------------------------------------------------------------------------------------


class Painted(NamedTuple):
    """A mask, and what the user should be told about it."""

    mask: Mask
    notices: tuple[str, ...] = ()


def mask_of(mask: Picture | NDArray[Any], invert: bool = False) -> Painted:
    """Return a mask (H, W) in [0, 1], 1 (white, True) where the model generates, and what is odd about it.

    Args:
        mask: a picture whose white is to be generated (what is transparent is not white), or an array (H, W) of
            booleans, or of two different numbers: the lower one is kept.
        invert: white is kept, black is generated.
    """
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) and mask.ndim == 2 else mask
    if isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype != np.uint8:
        white = 1.0 if array.dtype == np.bool_ or array.dtype.kind == "f" else float(np.iinfo(array.dtype).max)
        return mask_from_levels(array.astype(np.float64), white, "the mask", invert)
    return mask_from_image(*opened(array, "the mask"), invert)


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
        UserError: one level everywhere that is neither black nor white, or several that are all black.
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
    if low < high and not mask.any():
        raise UserError(
            f"{name} is empty: its highest level is {high:g} of {white:g}, and up to {NEAR * white / 255:g} is black.",
            f"paint what is to be generated white ({white:g}), or save two values alone: the higher one is generated",
        )
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
    """Whether an image is a JPEG of low quality, or in a lossy format that does not say how much it lost."""
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
