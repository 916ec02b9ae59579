"""Twenty odd image files of one size, as cameras, scanners, editors and phones write them, and what stands beside them."""

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin

SIDE = 8


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(depth, color, row, key=None, side=SIDE):
    """A PNG of a depth and kind that Pillow does not write; every row has the bytes `row`."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0))
    keyed = b"" if key is None else chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * side))
    return b"\x89PNG\r\n\x1a\n" + head + keyed + pixels + chunk(b"IEND", b"")


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def ramp(channels=3, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, channels), dtype=np.uint8)
    return array[..., 0] if channels == 1 else array


def _palette(**options):
    picture = Image.fromarray(ramp(seed=5)).quantize(16)
    return encoded(picture, "PNG", **options)


def _turned(kind, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(ramp(seed=6)), kind, exif=exif, **options)


def _white_is_zero():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    deep = (ramp(1, 8).astype(np.uint16) << 8) + 77
    return encoded(Image.fromarray(deep), "TIFF", tiffinfo=tags)


def usable():
    """Name -> bytes of files that every reader takes."""
    gray, color, clear = Image.fromarray(ramp(1)), Image.fromarray(ramp()), Image.fromarray(ramp(4))
    deep = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 1000
    return {
        "rgb.png": encoded(color, "PNG"),
        "gray.PNG": encoded(gray, "PNG"),
        "alpha.png": encoded(clear, "PNG"),
        "gray-alpha.png": encoded(Image.fromarray(ramp(2)[..., :2], "LA"), "PNG"),
        "one-bit.png": encoded(gray.convert("1"), "PNG"),
        "palette.png": _palette(),
        "palette-key.png": _palette(transparency=3),
        "palette-alpha.png": _palette(transparency=bytes(range(0, 256, 16))),
        "gray16.png": encoded(Image.fromarray(deep), "PNG"),
        "gray16-key.png": raw_png(16, 0, struct.pack(">8H", 0, 1, 256, 1000, 30000, 0, 65535, 4660), (0,)),
        "rgb16-key.png": raw_png(16, 2, struct.pack(">24H", *range(2000, 50_000, 2000)), (2000, 4000, 6000)),
        "gray2-key.png": raw_png(2, 0, b"\x1b\x1b", (1,)),
        "gray4-key.png": raw_png(4, 0, b"\x01\x23\x45\x67", (3,)),
        "gray-alpha16.png": raw_png(16, 4, struct.pack(">16H", *range(0, 64_000, 4000))),
        "cmyk.jpg": encoded(color.convert("CMYK"), "JPEG", quality=95),
        "turned.jpeg": _turned("JPEG", 6),
        "turned.webp": _turned("WEBP", 8, lossless=True),
        "scan.tif": encoded(color.convert("CMYK"), "TIFF"),
        "white-is-zero.tiff": _white_is_zero(),
        "float.tif": encoded(Image.fromarray(ramp(1, 9).astype(np.float32) / 255), "TIFF"),
        "phone.avif": encoded(color, "AVIF", quality=100),
        "small.gif": encoded(color, "GIF"),
        "old.bmp": encoded(color, "BMP"),
        "net.pgm": b"P5 8 8 1000\n" + struct.pack(">64H", *range(0, 960, 15)),
        "net.ppm": encoded(color, "PPM"),
        "camera.jfif": encoded(gray, "JPEG"),
    }


def spoiled():
    """Name -> bytes of files that are counted as skipped, with the reason."""
    frames = [Image.fromarray(ramp(seed=seed)) for seed in (1, 2)]
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "PNG")
    return {
        "moving.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated"),
        "moving.png": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated"),
        "cut.png": (whole[:2000], "unreadable"),
        "text.jpg": (b"not found", "unreadable"),
        "empty.webp": (b"", "unreadable"),
        "notes.txt": (b"x", "not an image"),
        "photo.HEIC": (b"x", "in a format to be converted first (HEIC, raw, ...)"),
    }


HIDDEN = (
    ".hidden.png",
    "._rgb.png",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "__MACOSX/._rgb.png",
    "__MACOSX/rgb.png",
    ".ipynb_checkpoints/rgb-checkpoint.png",
    "@eaDir/rgb.png/thumb.png",
)


def write_all(root, links=True):
    """Write a flat folder of all of them; returns names of the usable ones, sorted, and counts of skipped reasons."""
    rgb = usable()["rgb.png"]
    for name in HIDDEN:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(rgb)
    reasons = {}
    for name, (data, reason) in spoiled().items():
        (root / name).write_bytes(data)
        reasons[reason] = reasons.get(reason, 0) + 1
    for name, data in usable().items():
        (root / name).write_bytes(data)
    names = list(usable())
    if links:
        os.symlink(root / "nowhere.png", root / "broken.png")
        os.symlink(root / "rgb.png", root / "linked.png")
        os.symlink(root, root / "around")
        names.append("linked.png")
        reasons |= {"a broken link": 1, "a link to a folder around it": 1}
    return sorted(names), reasons
