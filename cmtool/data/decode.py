"""One image file to bytes, and bytes of any shape to a square: the decoding and resizing rules of the project.

Decoding never runs foreign programs (only raster formats that Pillow decodes itself are opened) and checks the size
before it allocates. Colors of another profile are converted to sRGB (`profiles.to_srgb`).
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cmtool.data.profiles import to_srgb
from cmtool.errors import DataError

Bytes = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # a phone's MPO opens as JPEG
SUFFIXES: tuple[str, ...] = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib")
SUFFIXES += (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif")
FOREIGN: tuple[str, ...] = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".svg", ".psd")
MAX_PIXELS = 99_999_999  # larger than most cameras' single frames, small enough to decode in 0.5 GB
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "edm": Image.Resampling.LANCZOS,
}
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on a quarter turn
# What Pillow raises at damage. Memory runs out where a small file claims a huge block: `MAX_PIXELS` bounds honest ones.
_DAMAGE = (OSError, ValueError, SyntaxError, LookupError, EOFError, TypeError, MemoryError, OverflowError, struct.error)
# Pillow warns at its own, lower limit; `read_image` refuses at ours with a sentence: the warning would be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


HINTS = {
    "unreadable": "save it again as PNG or JPEG",
    "too large": "make it smaller first",
    "animated": "save one frame of it as PNG",
}


class SkippedImage(DataError):
    """An image file that cannot be used; `reason` is the short form that is counted."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}", HINTS.get(reason))
        self.reason = reason


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(source: Path | bytes, name: str) -> Image.Image:
    """Open without decoding; every failure becomes a `SkippedImage`."""
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except UnidentifiedImageError:
        raise SkippedImage(name, "unreadable", "not an image in a format that is read here.") from None
    except Image.DecompressionBombError:
        raise SkippedImage(name, "too large", "100 megapixels or more.") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file.") from None
    except _DAMAGE as error:
        raise SkippedImage(name, "unreadable", f"cannot be read ({error}).") from None


def _deep_to_bytes(picture: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit gray (0..65535) and float gray (0..1) to 8 bits by rounding; Pillow's own conversion would clip."""
    values = np.asarray(picture)
    if picture.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise SkippedImage(name, "unreadable", "a floating-point image whose values leave [0, 1].")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise SkippedImage(name, "unreadable", "an integer image of more than 16 bits.")
    return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))


def _convert(picture: Image.Image, channels: int, name: str) -> Image.Image:
    """Bring any Pillow mode to L, RGB or RGBA; transparency is laid on white unless four channels are asked for."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        profile = picture.info.get("icc_profile")
        picture = _deep_to_bytes(picture, name)
        picture.info["icc_profile"] = profile
    picture = to_srgb(picture)
    transparent = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
    if channels == 4:
        return picture.convert("RGBA")
    if transparent:
        rgba = picture.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(ground, rgba).convert("RGB")
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    return picture.convert("L" if channels == 1 else "RGB")


def read_image(source: str | Path | bytes, channels: int = 3, name: str | None = None, animated: bool = False) -> Bytes:
    """Decode one image file into bytes, upright as the EXIF orientation says.

    CMYK, palette, gray, 16-bit and float images are converted; transparent ones are laid on white (with `channels=4`
    alpha is kept); colors of another profile than sRGB are converted to it.

    Args:
        source: a path, or the bytes of a file.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA).
        name: what messages call the image; None: its path.
        animated: take the first frame of an animation instead of refusing it.

    Returns:
        uint8 (H, W, channels).

    Raises:
        DataError: the file is missing, no image, damaged, animated or above `MAX_PIXELS`; the sentence names it.
    """
    if channels not in (1, 3, 4):
        raise DataError(f"images have 1, 3 or 4 channels, not {channels}.")
    source = Path(source) if isinstance(source, str) else source
    label = name or ("an image" if isinstance(source, bytes) else str(source))
    with _checked(source, label, animated) as picture:
        return _decode(picture, channels, label)


def upright(source: Path, name: str | None = None) -> Image.Image:
    """Decode one image file, turned as its EXIF orientation says, and keep mode, transparency and profile.

    Raises:
        DataError: as `read_image`.
    """
    label = name or str(source)
    with _checked(source, label, animated=False) as picture:
        try:
            picture.load()
            turned = ImageOps.exif_transpose(picture)
            if picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8) and "dpi" in turned.info:
                turned.info["dpi"] = tuple(turned.info["dpi"])[::-1]
        except _DAMAGE as error:
            raise SkippedImage(label, "unreadable", f"damaged or truncated ({error}).") from None
        # How coarsely it was written; Pillow drops that with the file.
        turned.format = picture.format
        turned.quantization = getattr(picture, "quantization", None)  # type: ignore[attr-defined]
        return turned


def to_bytes(picture: Image.Image, channels: int, name: str) -> Bytes:
    """Return a decoded Pillow image of any mode as uint8 (H, W, channels), by the rules of `read_image`."""
    array = np.asarray(_convert(picture, channels, name))
    return array[..., None] if array.ndim == 2 else array


@contextmanager
def _checked(source: Path | bytes, name: str, animated: bool) -> Iterator[Image.Image]:
    """Open a file without decoding it, and refuse what is too large or moves."""
    with _open(source, name) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width} x {picture.height} pixels"
            raise SkippedImage(name, "too large", f"{size}, which is 100 megapixels or more.")
        # A phone's MPO and a scanner's TIFF hold further pages, not an animation.
        if not animated and picture.format not in ("MPO", "TIFF") and _moves(picture, name):
            raise SkippedImage(name, "animated", "an animation; only still images are used.")
        yield picture


def is_gray(data: bytes) -> bool:
    """Whether an image file holds gray values alone; False for what is no image, which `read_image` says in words."""
    try:
        with _open(data, "") as picture:
            return picture.mode in ("1", "L", "I", "I;16", "F")
    except DataError:
        return False


def _moves(picture: Image.Image, name: str) -> bool:
    """Whether there is a second frame; Pillow looks for one in the file, and may find damage."""
    try:
        return bool(getattr(picture, "is_animated", False))
    except _DAMAGE as error:
        raise SkippedImage(name, "unreadable", f"damaged or truncated ({error}).") from None


def _decode(picture: Image.Image, channels: int, name: str) -> Bytes:
    """Decode an opened picture; Pillow reports damage under several exception types."""
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        array = np.asarray(_convert(upright, channels, name))
    except DataError:
        raise
    except _DAMAGE as error:
        raise SkippedImage(name, "unreadable", f"damaged or truncated ({error}).") from None
    return array[..., None] if array.ndim == 2 else array


def _resize(picture: Image.Image, size: tuple[int, int], rule: str) -> Image.Image:
    """Resize by one of the named filters; "adm" halves with a box filter while that stays at least twice too large."""
    if rule != "adm":
        return picture.resize(size, RESAMPLING[rule])
    while picture.width >= 2 * size[0] and picture.height >= 2 * size[1]:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _center(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _crop(picture: Image.Image, size: int, rule: str) -> Image.Image:
    """Square by cropping: ADM resizes first and crops then, EDM and the plain filters crop first."""
    side = min(picture.size)
    if rule != "adm" or side < size:
        return _resize(_center(picture, side, side), (size, size), rule)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    wide, high = round(picture.width * scale), round(picture.height * scale)
    return _center(picture.resize((wide, high), Image.Resampling.BICUBIC), size, size)


def _pad(picture: Image.Image, size: int, rule: str) -> Image.Image:
    """Square by a black border: the long side becomes `size`."""
    scale = size / max(picture.size)
    inner = _resize(picture, (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), rule)
    canvas = Image.new(picture.mode, (size, size))
    canvas.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return canvas


def fit_image(image: Bytes, size: int, fit: str = "crop", filter: str = "adm") -> Bytes:
    """Make an image of any shape a square of `size` pixels.

    Args:
        image: uint8 (H, W, C) with 1, 3 or 4 channels.
        size: side of the result in pixels.
        fit: "crop" keeps the middle, "pad" adds black borders, "stretch" ignores the aspect.
        filter: "adm" is guided-diffusion's rule (halve with BOX while at least twice too large, then BICUBIC, then
            crop), which is also EDM2's center-crop-dhariwal; "edm" is EDM's dataset tool (crop, then LANCZOS);
            "bicubic", "box" and "lanczos" are Pillow's filters after a crop.

    Returns:
        uint8 (size, size, C).
    """
    if image.shape[:2] == (size, size):
        return image
    picture: Any = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if fit == "stretch":
        square = _resize(picture, (size, size), filter)
    else:
        square = (_crop if fit == "crop" else _pad)(picture, size, filter)
    array = np.asarray(square)
    return array[..., None] if array.ndim == 2 else array
