"""A picture as it was given: its bytes, what is transparent in it, and what its file says of colors and size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmtool.data.decode import channels_of, is_transparent, to_bytes, upright
from cmtool.data.profiles import convert, other_profile, own_profile, to_srgb
from cmtool.editing.masks import Mask, mask_from_alpha

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Photo:
    """One upright picture in its own color space.

    Attributes:
        pixels: (H, W, C); where it is transparent, laid on white, or with `holes` the colors as they are stored.
        holes: (H, W), 1 where nothing is to be seen, between 0 and 1 where little is; None: opaque, or laid on white.
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


def read_photo(path: Path, channels: int, see_through: bool = False) -> Photo:
    """Read an image file for a model of `channels` (1, 3 or 4); arguments and errors as `photo_of`, `read_image`."""
    return photo_of(upright(path), channels, str(path), see_through)


def photo_of(image: Image.Image, channels: int, name: str, see_through: bool = False) -> Photo:
    """Return an upright Pillow image of any mode as a picture to edit.

    Args:
        image: upright.
        channels: those of the model.
        name: what messages call it.
        see_through: what is transparent is a hole, not white.
    """
    profile, notes = own_profile(image, channels), []
    other = other_profile(image)
    if other is not None:
        way = "converted to sRGB" if profile is None else "converted to sRGB for the model, and back"
        notes.append(f"its colors ({other}) are {way}")
    # Pixels that keep their profile are not to be converted by the decoder.
    plain = to_srgb(image) if profile is None else image.copy()
    plain.info.pop("icc_profile", None)
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
    """A resolution that a PNG can hold, None for nonsense."""
    try:
        across, down = (float(value) for value in given)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    fine = all(math.isfinite(value) and 0.1 <= value <= 1e6 for value in (across, down))
    return (across, down) if fine else None
