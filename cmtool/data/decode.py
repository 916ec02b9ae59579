"""One image file to bytes, and bytes of any shape to a square: the decoding and resizing rules of the project.

Decoding never runs foreign programs (only raster formats that Pillow decodes itself are opened) and checks the size
before it allocates. Embedded color profiles are not applied: pixels are taken as they are stored.
"""

from __future__ import annotations

import io
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cmtool.errors import DataError

Bytes = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # a phone's MPO opens as JPEG
SUFFIXES: tuple[str, ...] = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib")
SUFFIXES += (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif")
FOREIGN: tuple[str, ...] = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".svg", ".psd")
FOREIGN += (".jp2", ".j2k", ".tga", ".exr", ".ico", ".xcf", ".eps")
# A PNG's transparent value is given in steps of the file's own depth; Pillow compares it with what it scaled to bytes.
_KEY_STEPS = {"L;2": 85, "L;4": 17}
MAX_PIXELS = 99_999_999  # larger than most cameras' single frames, small enough to decode in 0.5 GB
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "edm": Image.Resampling.LANCZOS,
}
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
    if picture.info.get("words") and 0 < values.max() <= 255:
        raise SkippedImage(name, "unreadable", "32-bit integers that end at 255: 8 bits, or nearly black?")
    return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))


def _is_gray(picture: Image.Image) -> bool:
    """Whether an opened, not yet loaded picture is stored as gray values (with or without alpha)."""
    raw = picture.tile[0][3] if getattr(picture, "tile", None) else ""  # type: ignore[attr-defined]
    deep = isinstance(raw, str) and raw.startswith("LA")  # gray and alpha of 16 bits, which Pillow opens as RGBA
    return deep or picture.mode in ("1", "L", "LA", "La", "F") or picture.mode.startswith("I")


def _note_scale(picture: Image.Image) -> None:
    """Put into `info` what the pixels alone do not say; called before they are loaded.

    A PNG's transparent value is brought to the scale of the pixels, and a TIFF says whether 0 is its white.
    """
    key = picture.info.get("transparency")
    raw = picture.tile[0][3] if picture.format == "PNG" and picture.tile else ""  # type: ignore[attr-defined]
    if isinstance(key, int) and raw in _KEY_STEPS:
        picture.info["transparency"] = key * _KEY_STEPS[raw]
    elif isinstance(key, tuple) and raw == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    if picture.format == "TIFF":
        # Pillow itself inverts such files of 1 and 8 bits, and not those of 16.
        picture.info["white_is_zero"] = picture.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        picture.info["words"] = picture.mode == "I"


def _deep(picture: Image.Image, name: str) -> Image.Image:
    """Bring gray of 16 bits or floats to L, or to LA where the file names a transparent value."""
    key = picture.info.get("transparency")
    gray = _deep_to_bytes(picture, name)
    if picture.info.get("white_is_zero"):
        gray = ImageOps.invert(gray)
    if not isinstance(key, int):
        return gray
    alpha = Image.fromarray(np.where(np.asarray(picture) == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (gray, alpha))


def _laid_on_white(rgba: Image.Image) -> Image.Image:
    ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, rgba).convert("RGB")


def on_white(image: Bytes) -> Bytes:
    """Lay (H, W, 4) bytes with alpha on white; returns (H, W, 3)."""
    return np.asarray(_laid_on_white(Image.fromarray(image, "RGBA")))


def _convert(picture: Image.Image, channels: int, name: str) -> Image.Image:
    """Bring any Pillow mode to L, RGB or RGBA; transparency is laid on white unless four channels are asked for."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _deep(picture, name)
    transparent = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
    if channels == 4:
        return picture.convert("RGBA")
    if transparent:
        picture = _laid_on_white(picture.convert("RGBA"))
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    return picture.convert("L" if channels == 1 else "RGB")


def read_image(
    source: str | Path | bytes, channels: int | None = 3, name: str | None = None, animated: bool = False
) -> Bytes:
    """Decode one image file into bytes, upright as the EXIF orientation says.

    CMYK, palette, gray, 16-bit and float images are converted; transparent ones are laid on white (with `channels=4`
    alpha is kept); embedded color profiles are ignored.

    Args:
        source: a path, or the bytes of a file.
        channels: 1 (gray), 3 (RGB), 4 (RGBA), or None: 1 where the file holds gray values, else 3.
        name: what messages call the image; None: its path.
        animated: take the first frame of an animation instead of refusing it.

    Returns:
        uint8 (H, W, channels).

    Raises:
        DataError: the file is missing, no image, damaged, animated or above `MAX_PIXELS`; the sentence names it.
    """
    if channels not in (None, 1, 3, 4):
        raise DataError(f"images have 1, 3 or 4 channels, not {channels}.")
    source = Path(source) if isinstance(source, str) else source
    label = name or ("an image" if isinstance(source, bytes) else str(source))
    with _open(source, label) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width} x {picture.height} pixels"
            raise SkippedImage(label, "too large", f"{size}, which is 100 megapixels or more.")
        # A phone's MPO and a scanner's TIFF hold further pages, not an animation.
        if not animated and picture.format not in ("MPO", "TIFF") and _moves(picture, label):
            raise SkippedImage(label, "animated", "an animation; only still images are used.")
        return _decode(picture, channels, label)


def _moves(picture: Image.Image, name: str) -> bool:
    """Whether there is a second frame; Pillow looks for one in the file, and may find damage."""
    try:
        return bool(getattr(picture, "is_animated", False))
    except _DAMAGE as error:
        raise SkippedImage(name, "unreadable", f"damaged or truncated ({error}).") from None


def _decode(picture: Image.Image, channels: int | None, name: str) -> Bytes:
    """Decode an opened picture; Pillow reports damage under several exception types."""
    try:
        channels = channels or (1 if _is_gray(picture) else 3)
        _note_scale(picture)
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
