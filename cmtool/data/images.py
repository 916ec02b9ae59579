"""Images in and out: the one quantizer of the project, and everything that writes pictures and sample files.

The type determines the layout: a torch tensor is (B, C, H, W), a NumPy array is (B, H, W, C). Floats are in [-1, 1],
bytes are uint8. Every file is written atomically: to a temporary file, then fsync (unless turned off) and rename.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cmtool.data.decode import MAX_PIXELS, fit_image, read_image
from cmtool.errors import DataError
from cmtool.files.atomic import atomic_write

__all__ = [
    "MAX_PIXELS",
    "NpzWriter",
    "compose_grid",
    "fit_image",
    "from_uint8",
    "npz_writer",
    "png_info",
    "read_image",
    "read_png_text",
    "save_folder",
    "save_gif",
    "save_grid",
    "save_npz",
    "save_pictures",
    "save_png",
    "save_points",
    "save_scatter",
    "to_nhwc",
    "to_uint8",
]

Bytes = NDArray[np.uint8]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SMALLEST_SIDE = 64  # a picture in a grid is enlarged by whole factors until its side reaches this many pixels
GUTTER = 2  # pixels between the pictures of a grid
GROUND = 48  # gray level of the gutter, which sets it apart from black and white pictures
LONGEST_SIDE = 32_000  # pixels of a grid
SMALLEST_FRAME = 128  # the same for animations, which viewers show at their own size


def to_uint8(x: Tensor, mode: Literal["round", "truncate"] = "round") -> Tensor:
    """Quantize float images in [-1, 1] to bytes; values outside are clipped.

    "round" computes floor(127.5 x + 128), as EDM, diffusers and torchvision do, and inverts `from_uint8` exactly.
    "truncate" computes floor(127.5 (x + 1)), as OpenAI's and the JAX release do, and loses 63 of the 256 levels.

    Args:
        x: any shape, floating point, in [-1, 1].
        mode: which of the two rules.

    Returns:
        A uint8 tensor of the same shape.

    Raises:
        DataError: `x` holds NaN, or `mode` is neither rule.
        TypeError: `x` is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"to_uint8 takes floats in [-1, 1], not {x.dtype}")
    x = x if x.dtype == torch.float64 else x.float()
    if torch.isnan(x).any():
        raise DataError(f"{int(torch.isnan(x).sum())} of {x.numel()} pixel values are not numbers (NaN).")
    if mode == "round":
        scaled = x * 127.5 + 128
    elif mode == "truncate":
        scaled = (x + 1) * 127.5
    else:
        raise DataError(f"unknown quantization '{mode}'; choose round or truncate.")
    return scaled.clamp(0, 255).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """Return bytes (any shape) as float32 in [-1, 1]: x / 127.5 - 1.

    Raises:
        TypeError: `x` is not uint8.
    """
    if x.dtype != torch.uint8:
        raise TypeError(f"from_uint8 takes uint8, not {x.dtype}")
    return x.to(torch.float32).div_(127.5).sub_(1)


def to_nhwc(images: Tensor | Bytes) -> Bytes:
    """Return images as uint8 (B, H, W, C); float tensors are quantized by rounding.

    Raises:
        DataError: the array is not a batch of images with 1, 3 or 4 channels.
    """
    if isinstance(images, Tensor):
        data = images.detach().cpu()
        data = to_uint8(data) if data.is_floating_point() else data
        array = data.permute(0, 2, 3, 1).numpy() if data.ndim == 4 else data.numpy()
    else:
        array = images
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[-1] not in MODES:
        raise DataError(
            f"an array of {array.dtype} {tuple(array.shape)} is no batch of uint8 images with 1, 3 or 4 channels."
        )
    return np.ascontiguousarray(array)


def _picture(image: Bytes) -> Image.Image:
    """Wrap one (H, W, C) uint8 array as a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image, MODES[image.shape[-1]])


def png_info(text: Mapping[str, Any] | None) -> PngInfo | None:
    """Turn a dictionary into PNG text entries; values other than strings are written as JSON."""
    if not text:
        return None
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    return info


def _write_png(
    picture: Image.Image, path: str | Path, text: Mapping[str, Any] | None, synced: bool = True, **said: Any
) -> Path:
    """Write a PNG; `said` are further options of Pillow's writer, those that are None left out."""
    target, options = Path(path), {key: value for key, value in said.items() if value is not None}
    with atomic_write(target, synced) as temporary:
        picture.save(temporary, format="PNG", pnginfo=png_info(text), **options)
    return target


def read_png_text(path: str | Path) -> dict[str, str]:
    """Return the text entries of a PNG (what `save_png` and `save_grid` put there)."""
    with Image.open(path, formats=["PNG"]) as picture:
        picture.load()
        return {key: str(value) for key, value in getattr(picture, "text", {}).items()}


def save_png(
    image: Tensor | Bytes,
    path: str | Path,
    text: Mapping[str, Any] | None = None,
    synced: bool = True,
    *,
    profile: bytes | None = None,
    dpi: tuple[float, float] | None = None,
) -> Path:
    """Write one image, (C, H, W) tensor or (H, W, C) bytes, at its own size; `text` becomes PNG text entries.

    Args:
        synced: False: without waiting for the disk, see `atomic_write`.
        profile: the ICC profile of the bytes; None: nothing is said, which means sRGB.
        dpi: pixels per inch, across and down.
    """
    return _write_png(_picture(to_nhwc(image[None])[0]), path, text, synced, icc_profile=profile, dpi=dpi)


def save_pictures(
    images: Tensor | Bytes,
    path: str | Path,
    columns: int | None = None,
    text: Mapping[str, Any] | None = None,
    grid: bool = False,
) -> Path:
    """Write images as one PNG: one image is that picture at its own size, several (or one, as a `grid`) are a grid."""
    return save_grid(images, path, columns, text) if grid or len(images) > 1 else save_png(images[0], path, text)


def _enlargement(side: int) -> int:
    """Return the whole factor that enlarges a side to `SMALLEST_SIDE` pixels (8 -> 8, 16 -> 4, 64 and more -> 1)."""
    return max(1, math.ceil(SMALLEST_SIDE / side))


def _tiles(count: int, columns: int | None) -> tuple[int, int]:
    """Return rows and columns of a grid, as close to a square as possible unless the columns are given."""
    width = min(columns or math.ceil(math.sqrt(count)), count)
    return math.ceil(count / width), width


def compose_grid(images: Tensor | Bytes, columns: int | None = None, scale: int | None = None) -> Bytes:
    """Lay images out row by row with a thin gutter.

    Args:
        images: (B, C, H, W) tensor (float in [-1, 1] or uint8) or (B, H, W, C) bytes.
        columns: pictures per row; None: a grid as square as possible.
        scale: whole factor of nearest-neighbor enlargement; None: enough to make small pictures visible.

    Returns:
        uint8 (height, width, C).
    """
    array = to_nhwc(images)
    if not len(array):
        raise DataError("a grid needs at least one image.")
    factor = scale or _enlargement(min(array.shape[1:3]))
    rows, cols = _tiles(len(array), columns)
    height, width = array.shape[1] * factor + GUTTER, array.shape[2] * factor + GUTTER
    if max(rows * height, cols * width) > LONGEST_SIDE:
        raise DataError(
            f"{len(array)} images make a grid of {cols * width} x {rows * height} pixels, which few programs open.",
            "write a folder or a .npz file instead",
        )
    grid = np.full((rows * height + GUTTER, cols * width + GUTTER, array.shape[3]), GROUND, dtype=np.uint8)
    if array.shape[3] == 4:
        grid[..., 3] = 255
    for index, image in enumerate(array):
        top, left = GUTTER + index // cols * height, GUTTER + index % cols * width
        tile = image.repeat(factor, axis=0).repeat(factor, axis=1)
        grid[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return grid


def save_grid(
    images: Tensor | Bytes, path: str | Path, columns: int | None = None, text: Mapping[str, Any] | None = None
) -> Path:
    """Write images as one PNG grid (see `compose_grid`); `text` holds the model's hash, seed, times and command."""
    return _write_png(_picture(compose_grid(images, columns)), path, text)


def save_folder(
    images: Tensor | Bytes, folder: str | Path, start: int = 0, text: Mapping[str, Any] | None = None
) -> Path:
    """Write each image as `folder/000000.png` and so on, counted from `start`."""
    array, target = to_nhwc(images), Path(folder)
    for index, image in enumerate(array, start):
        _write_png(_picture(image), target / f"{index:06d}.png", text)
    return target


class NpzWriter:
    """Appends batches to `arr_0` of an open .npz archive, so that 50,000 large images never sit in memory together."""

    def __init__(self, archive: zipfile.ZipFile, stream: IO[bytes], shape: tuple[int, ...], dtype: str) -> None:
        self._archive, self._stream, self.shape, self.dtype = archive, stream, shape, np.dtype(dtype)
        self.count = 0

    def append(self, batch: NDArray[Any]) -> None:
        """Append a (B, ...) batch; raises ValueError if its shape or type differs, or the file is full."""
        if batch.dtype != self.dtype or batch.shape[1:] != self.shape[1:] or self.count + len(batch) > self.shape[0]:
            raise ValueError(f"a {batch.dtype} batch {batch.shape} does not fit {self.dtype} {self.shape}")
        self._stream.write(np.ascontiguousarray(batch).tobytes())
        self.count += len(batch)


def _add_array(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)


@contextmanager
def npz_writer(
    path: str | Path,
    shape: tuple[int, ...],
    dtype: str = "uint8",
    labels: NDArray[Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Iterator[NpzWriter]:
    """Open a sample file for batches: `arr_0` of `shape`, `arr_1` = labels (int64), `meta` = a JSON string.

    The form is that of `np.savez` (stored, .npy version 1, C order), which every published evaluator can read.

    Raises:
        ValueError: at the end, if fewer samples were appended than `shape` says; no file is left behind.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    with atomic_write(Path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            writer = NpzWriter(archive, stream, tuple(shape), dtype)
            yield writer
        if writer.count != shape[0]:
            raise ValueError(f"{writer.count} of {shape[0]} samples were written")
        if labels is not None:
            _add_array(archive, "arr_1", np.asarray(labels, dtype=np.int64))
        if meta is not None:
            _add_array(archive, "meta", np.array(json.dumps(dict(meta))))


def save_npz(
    path: str | Path,
    images: Tensor | Bytes,
    labels: Tensor | NDArray[Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole sample file: uint8 NHWC `arr_0`, int64 `arr_1` when labeled, JSON `meta`."""
    array = to_nhwc(images)
    with npz_writer(path, array.shape, labels=None if labels is None else np.asarray(labels), meta=meta) as writer:
        writer.append(array)
    return Path(path)


def save_points(
    path: str | Path, points: Tensor, labels: Tensor | None = None, meta: Mapping[str, Any] | None = None
) -> Path:
    """Write float samples (toy data, any shape (B, ...)) as float32 `arr_0`, not quantized."""
    array = points.detach().cpu().float().numpy()
    given = None if labels is None else labels.cpu().numpy()
    with npz_writer(path, array.shape, "float32", given, meta) as writer:
        writer.append(array)
    return Path(path)


def save_scatter(
    points: Tensor,
    path: str | Path,
    labels: Tensor | None = None,
    reference: Tensor | None = None,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Draw 2-D samples (B, 2, 1, 1) or (B, 2) as a scatter plot, over gray `reference` points if there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if reference is not None:
        ground = reference.detach().cpu().reshape(len(reference), 2).numpy()
        axes.scatter(ground[:, 0], ground[:, 1], s=3, c="0.8", linewidths=0)
    data = points.detach().cpu().reshape(len(points), 2).float().numpy()
    colors = "tab:blue" if labels is None else labels.cpu().numpy()
    axes.scatter(data[:, 0], data[:, 1], s=4, c=colors, cmap=None if labels is None else "tab10", linewidths=0)
    axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    target = Path(path)
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"pnginfo": png_info(text)} if text else None)
    return target


def save_gif(frames: Tensor | Bytes, path: str | Path, seconds_per_frame: float = 1 / 12) -> Path:
    """Write frames (B, C, H, W) in [-1, 1], or bytes (B, H, W, C), as a GIF that repeats forever.

    Every frame has its own palette of 256 colors.
    """
    array = to_nhwc(frames)
    factor = max(1, -(-SMALLEST_FRAME // array.shape[1]))
    pictures = []
    for frame in array:
        image = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        pictures.append(image if image.mode == "L" else image.convert("RGB").quantize(256))
    target = Path(path)
    with atomic_write(target) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 * seconds_per_frame),
            disposal=2,
            loop=0,
        )
    return target
