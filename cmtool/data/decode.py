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

from cmtool.data.profiles import other_profile, to_srgb
from cmtool.errors import DataError

Bytes = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")  # a phone's MPO opens as JPEG
SUFFIXES: tuple[str, ...] = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib")
SUFFIXES += (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif")
FOREIGN: tuple[str, ...] = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".svg", ".psd")
FOREIGN += (".jp2", ".j2k", ".tga", ".exr", ".ico", ".xcf", ".eps")
# A PNG states its transparent value at the file's own depth, but Pillow compares it with values scaled to bytes.
_KEY_STEPS = {"L;2": 85, "L;4": 17}
MAX_PIXELS = 99_999_999  # larger than most cameras' single frames, small enough to decode in 0.5 GB
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "edm": Image.Resampling.LANCZOS,
}
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on a quarter turn
# What Pillow raises over damaged files. MemoryError: a small file may claim a huge block.
_DAMAGE = (OSError, ValueError, SyntaxError, LookupError, EOFError, TypeError, MemoryError, OverflowError, struct.error)
# Pillow warns at a limit of its own, which is lower. `read_image` refuses at ours, so the warning is only noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


HINTS = {
    "unreadable": "save it again as PNG or JPEG",
    "too large": "make it smaller first",
    "animated": "save one frame of it as PNG",
}


class SkippedImage(DataError):
    """An image file that cannot be used; files are counted by the short `reason`."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}", HINTS.get(reason))
        self.reason = reason


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return the formats in `FORMATS` that this build of Pillow can read."""
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
    """Whether a picture that is opened but not loaded stores gray values, with or without alpha."""
    raw = picture.tile[0][3] if getattr(picture, "tile", None) else ""  # type: ignore[attr-defined]
    deep = isinstance(raw, str) and raw.startswith("LA")  # 16-bit gray with alpha, which Pillow opens as RGBA
    return deep or picture.mode in ("1", "L", "LA", "La", "F") or picture.mode.startswith("I")


def _note_scale(picture: Image.Image) -> None:
    """Record in `info` what the pixels do not show. Call this before they are loaded.

    The transparent value of a PNG is scaled as the pixels will be; for a TIFF, note whether 0 means white.
    """
    key = picture.info.get("transparency")
    raw = picture.tile[0][3] if picture.format == "PNG" and picture.tile else ""  # type: ignore[attr-defined]
    if isinstance(key, int) and raw in _KEY_STEPS:
        picture.info["transparency"] = key * _KEY_STEPS[raw]
    elif isinstance(key, tuple) and raw == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    if picture.format == "TIFF":
        # Pillow inverts such files of 1 and 8 bits itself, but not those of 16.
        picture.info["white_is_zero"] = picture.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        picture.info["words"] = picture.mode == "I"


def _deep(picture: Image.Image, name: str) -> Image.Image:
    """Convert 16-bit or float gray to L, or to LA if the file names a transparent value."""
    key = picture.info.get("transparency")
    made = _deep_to_bytes(picture, name)
    if picture.info.get("white_is_zero"):
        made = ImageOps.invert(made)
    if isinstance(key, int):
        alpha = Image.fromarray(np.where(np.asarray(picture) == key, 0, 255).astype(np.uint8))
        made = Image.merge("LA", (made, alpha))
    made.info["icc_profile"] = picture.info.get("icc_profile")
    return made


def _laid_on_white(rgba: Image.Image) -> Image.Image:
    ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, rgba).convert("RGB")


def on_white(image: Bytes) -> Bytes:
    """Composite (H, W, 4) bytes over white; returns (H, W, 3)."""
    return np.asarray(_laid_on_white(Image.fromarray(image, "RGBA")))


def _convert(picture: Image.Image, channels: int, name: str) -> Image.Image:
    """Convert any Pillow mode to L, RGB or RGBA; unless four channels are wanted, transparency is put over white."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _deep(picture, name)
    picture = to_srgb(picture)
    if channels == 4:
        return picture.convert("RGBA")
    if is_transparent(picture):
        picture = _laid_on_white(picture.convert("RGBA"))
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    return picture.convert("L" if channels == 1 else "RGB")


def is_transparent(picture: Image.Image) -> bool:
    """Whether an image may have transparent pixels: by an alpha channel, or a transparent color."""
    return picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info


def peek(source: Path | bytes | Bytes, name: str) -> tuple[tuple[int, int], int, bool]:
    """Return (width, height) as shown, channels as stored (1 or 3), and whether there is transparency, undecoded.

    Raises:
        SkippedImage: it cannot be read.
    """
    if isinstance(source, np.ndarray):
        channels = source.shape[2]
        return (source.shape[1], source.shape[0]), 1 if channels == 1 else 3, channels == 4
    with _open(source, name) as picture:
        try:
            turned = picture.getexif().get(_ORIENTATION, 1) >= 5
        except _DAMAGE:
            turned = False
        size = (picture.height, picture.width) if turned else (picture.width, picture.height)
        return size, 1 if _is_gray(picture) else 3, is_transparent(picture)


def channels_of(image: Bytes, channels: int) -> Bytes:
    """Convert pixels (H, W, C) to another number of channels, exactly as `read_image` does for files."""
    if image.shape[-1] == channels:
        return image
    if channels == 4:
        return np.concatenate([channels_of(image, 3), np.full_like(image[..., :1], 255)], axis=2)
    if image.shape[-1] == 4:
        return channels_of(on_white(image), channels)
    if image.shape[-1] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[-1] == 3 and channels == 1:
        gray = image.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000
        return (gray >> 16).astype(np.uint8)[..., None]
    raise DataError(f"images with {image.shape[-1]} channels cannot become {channels}.", "set data.channels")


def read_image(
    source: str | Path | bytes,
    channels: int | None = 3,
    name: str | None = None,
    animated: bool = False,
    converted: list[str] | None = None,
) -> Bytes:
    """Decode one image file into bytes, upright as the EXIF orientation says.

    CMYK, palette, gray, 16-bit and float images are converted; transparent ones are put over white (with `channels=4`
    alpha is kept); colors of another profile than sRGB are converted to it.

    Args:
        source: a path, or the bytes of a file.
        channels: 1 (gray), 3 (RGB), 4 (RGBA), or None: 1 if the file stores gray values, else 3.
        name: the image's name in messages; None: its path.
        animated: take the first frame of an animation instead of refusing it.
        converted: takes the name of the image's color profile if it is not sRGB (see `profiles.converted_note`).

    Returns:
        uint8 (H, W, channels).

    Raises:
        DataError: the file is missing, not an image, damaged, animated or larger than `MAX_PIXELS`.
    """
    if channels not in (None, 1, 3, 4):
        raise DataError(f"images have 1, 3 or 4 channels, not {channels}.")
    source = Path(source) if isinstance(source, str) else source
    label = name or ("an image" if isinstance(source, bytes) else str(source))
    with _checked(source, label, animated) as picture:
        return _decode(picture, channels, label, converted)


def upright(source: Path) -> Image.Image:
    """Decode one image file, turned as its EXIF orientation says, and keep mode, transparency and profile.

    `to_bytes` makes of it what `read_image` returns.

    Raises:
        DataError: as `read_image`.
    """
    with _checked(source, str(source), animated=False) as picture:
        return _loaded(picture, str(source))


def to_bytes(picture: Image.Image, channels: int, name: str) -> Bytes:
    """Return a decoded Pillow image of any mode as uint8 (H, W, channels), by the rules of `read_image`."""
    array = np.asarray(_convert(picture, channels, name))
    return array[..., None] if array.ndim == 2 else array


@contextmanager
def _checked(source: Path | bytes, name: str, animated: bool) -> Iterator[Image.Image]:
    """Open a file without decoding it; refuse images that are too large, and animations."""
    with _open(source, name) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width} x {picture.height} pixels"
            raise SkippedImage(name, "too large", f"{size}, which is 100 megapixels or more.")
        # A phone's MPO and a scanner's TIFF hold further pages, not an animation.
        if not animated and picture.format not in ("MPO", "TIFF") and _moves(picture, name):
            raise SkippedImage(name, "animated", "an animation; only still images are used.")
        yield picture


def _moves(picture: Image.Image, name: str) -> bool:
    """Whether there is a second frame; Pillow has to look for it in the file and may find damage there."""
    try:
        return bool(getattr(picture, "is_animated", False))
    except _DAMAGE as error:
        raise SkippedImage(name, "unreadable", f"damaged or truncated ({error}).") from None


def _loaded(picture: Image.Image, name: str) -> Image.Image:
    """Decode an opened picture and turn it upright; Pillow reports damage under several exception types."""
    try:
        _note_scale(picture)
        picture.load()
        turned = ImageOps.exif_transpose(picture)
        if picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8) and "dpi" in turned.info:
            turned.info["dpi"] = tuple(turned.info["dpi"])[::-1]
        # How coarsely a JPEG was written: Pillow drops it with the file.
        turned.format, turned.quantization = picture.format, getattr(picture, "quantization", None)  # type: ignore[attr-defined]
        return turned
    except _DAMAGE as error:
        raise SkippedImage(name, "unreadable", f"damaged or truncated ({error}).") from None


def _decode(picture: Image.Image, channels: int | None, name: str, converted: list[str] | None) -> Bytes:
    channels = channels or (1 if _is_gray(picture) else 3)
    turned = _loaded(picture, name)
    other = other_profile(turned) if converted is not None else None
    if converted is not None and other is not None:
        converted.append(other)
    try:
        return to_bytes(turned, channels, name)
    except DataError:
        raise
    except _DAMAGE as error:
        raise SkippedImage(name, "unreadable", f"damaged or truncated ({error}).") from None


def _resize(picture: Image.Image, size: tuple[int, int], rule: str) -> Image.Image:
    """Resize with a named filter; "adm" first halves with a box filter while the image is at least twice too large."""
    if rule != "adm":
        return picture.resize(size, RESAMPLING[rule])
    while picture.width >= 2 * size[0] and picture.height >= 2 * size[1]:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _center(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _crop(picture: Image.Image, size: int, rule: str) -> Image.Image:
    """Make a square by cropping: ADM resizes and then crops, EDM and the plain filters crop first."""
    side = min(picture.size)
    if rule != "adm" or side < size:
        return _resize(_center(picture, side, side), (size, size), rule)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    wide, high = round(picture.width * scale), round(picture.height * scale)
    return _center(picture.resize((wide, high), Image.Resampling.BICUBIC), size, size)


def _pad(picture: Image.Image, size: int, rule: str) -> Image.Image:
    """Make a square by adding a black border: the long side becomes `size`."""
    scale = size / max(picture.size)
    inner = _resize(picture, (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), rule)
    canvas = Image.new(picture.mode, (size, size))
    canvas.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return canvas


def fit_image(image: Bytes, size: int, fit: str = "crop", filter: str = "adm") -> Bytes:
    """Turn an image of any shape into a square of `size` pixels.

    Args:
        image: uint8 (H, W, C) with 1, 3 or 4 channels.
        size: side of the result in pixels.
        fit: "crop" keeps the middle, "pad" adds black borders, "stretch" ignores the aspect ratio.
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
