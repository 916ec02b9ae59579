"""Color profiles: pictures in other color spaces than sRGB are converted for the model, and back.

A profile is the ICC data that a file carries. One that cannot be read, or that is of another kind than the pixels (an
RGB profile on a gray picture), is ignored, as viewers do.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Bytes = NDArray[np.uint8]
# What ICC calls the colors of the Pillow modes that have pixels of this kind.
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
# Profiles of sRGB by different makers differ by a level or two in dark colors: pixels stay as they are.
ALIKE = 2
# Without a cache inside the transform, several threads may use it at once. Gray is not optimized: lcms would put few
# points on a steep curve, and be ten levels off in the dark.
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
_FLAGS_OF = {"L": _FLAGS | ImageCms.Flags.NOOPTIMIZE, "RGB": _FLAGS, "CMYK": _FLAGS}


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image with its colors in sRGB: converted by the profile it carries, else as it is.

    Args:
        image: of any Pillow mode. Transparency is kept; 16-bit and floating-point pixels are not converted.
    """
    if other_profile(image) is None:
        return image
    plain, alpha = _apart(image)
    transform = _transform(image.info["icc_profile"], plain.mode, False)
    converted = _applied(plain, transform)
    converted = converted.convert("L") if plain.mode == "L" else converted
    if alpha is not None:
        converted.putalpha(alpha)
    converted.info.pop("icc_profile", None)
    return converted


def other_profile(image: Image.Image) -> str | None:
    """Return the name of an image's color profile if it has one whose colors are not those of sRGB."""
    profile, mode = image.info.get("icc_profile"), _plain_mode(image.mode)
    if not profile or mode is None or _transform(profile, mode, False) is None:
        return None
    return _name(profile)


def converted_note(names: Sequence[str], total: int) -> list[str]:
    """Say once for all pictures of a set that some were converted; `names` are those of their profiles."""
    if not names:
        return []
    kinds = ", ".join(f"{count:,} of {name}" for name, count in Counter(names).most_common(3))
    return [f"{len(names):,} of {total:,} images have another color profile and are converted to sRGB ({kinds})"]


def own_profile(image: Image.Image, channels: int) -> bytes | None:
    """Return the profile of an image if bytes of `channels` (1, 3 or 4) taken from it can carry it, else None."""
    profile, mode = image.info.get("icc_profile"), _plain_mode(image.mode)
    wanted = "L" if channels == 1 else "RGB"
    return profile if profile and mode == wanted and _space(profile) == _SPACES[wanted] else None


def convert(pixels: Bytes, profile: bytes | None, back: bool = False) -> Bytes:
    """Return pixels (H, W, 1, 3 or 4) converted from a profile to sRGB, or `back` from sRGB; alpha stays.

    `profile` is one that `own_profile` returned; without one, or where it is sRGB itself, pixels stay as they are.
    """
    mode = "L" if pixels.shape[-1] == 1 else "RGB"
    transform = None if profile is None else _transform(profile, mode, back)
    if transform is None:
        return pixels
    plain = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if mode == "L" else pixels[..., :3]))
    changed = _applied(plain.convert("RGB") if mode == "L" and back else plain, transform)
    array = np.asarray(changed.convert(mode))
    return np.concatenate([array.reshape(*pixels.shape[:2], -1), pixels[..., 3:]], axis=-1)


def _applied(image: Image.Image, transform: Any) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    if changed is None:
        raise AssertionError("only transforms in place return nothing")
    return changed


def _apart(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an image into plain colors (L, RGB or CMYK) and its alpha channel, None where it is opaque."""
    mode = _plain_mode(image.mode) or "RGB"
    if "A" not in image.mode and "transparency" not in image.info:
        return image.convert(mode), None
    return image.convert("RGBA").convert(mode), image.convert("RGBA").getchannel("A")


def _plain_mode(mode: str) -> str | None:
    """The Pillow mode of an image's colors without alpha and palette; None: a kind that is not converted."""
    if mode in ("RGB", "RGBA", "RGBX", "P", "PA"):
        return "RGB"
    return {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(mode)


@lru_cache(maxsize=32)
def _opened(profile: bytes) -> Any:
    """The profile as lcms sees it; None if it is damaged, or if Pillow was built without lcms."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (OSError, TypeError, ValueError, ImportError):
        return None


def _space(profile: bytes) -> str | None:
    opened = _opened(profile)
    return None if opened is None else str(opened.profile.xcolor_space)


def _name(profile: bytes) -> str:
    try:
        return ImageCms.getProfileDescription(_opened(profile)).strip() or "without a name"
    except (ImageCms.PyCMSError, UnicodeError):
        return "without a name"


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str, back: bool) -> Any:
    """The way from a profile to sRGB, or `back`; None if there is none: unusable, of another kind, or sRGB."""
    if _space(profile) != _SPACES[mode]:
        return None
    try:
        own, srgb = _opened(profile), ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        forth = ImageCms.buildTransform(own, srgb, mode, "RGB", intent, _FLAGS_OF[mode])
        if _is_identity(forth, mode):
            return None
        return ImageCms.buildTransform(srgb, own, "RGB", mode, intent, _FLAGS_OF[mode]) if back else forth
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def _is_identity(transform: Any, mode: str) -> bool:
    """Whether a transform into sRGB leaves a lattice of all colors as it is, but for rounding."""
    if mode == "CMYK":
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
    given = Image.fromarray(lattice) if mode == "RGB" else Image.fromarray(steps[None])
    made = np.asarray(_applied(given, transform)).astype(int)
    return bool(np.abs(made - np.asarray(given.convert("RGB"))).max() <= ALIKE)
