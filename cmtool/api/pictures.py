"""Pictures in the forms that a Python program has them in, and writing them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmtool.data import read_image, save_folder, save_grid, save_npz, save_png, save_points, save_scatter, to_uint8
from cmtool.editing.regions import mask_from_bytes, on_black
from cmtool.errors import DataError

Bytes: TypeAlias = NDArray[np.uint8]
# A file, a Pillow image, bytes (H, W, C) or (H, W), or a float tensor (C, H, W) in [-1, 1].
Picture: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8] | Tensor"


def as_bytes(picture: Picture, channels: int) -> Bytes:
    """Return a picture as uint8 (H, W, channels).

    Args:
        picture: a path, a Pillow image, uint8 (H, W) or (H, W, C), or a float tensor (C, H, W) in [-1, 1].
        channels: 1 (gray), 3 (color) or 4; other pictures are converted as `cmtool.data.read_image` converts files.

    Raises:
        DataError: there is no such file, or the array is no picture.
    """
    if isinstance(picture, (str, Path)):
        return read_image(Path(picture), channels)
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or not picture.is_floating_point():
            raise DataError(f"a tensor {tuple(picture.shape)} of {picture.dtype} is no picture (C, H, W) in [-1, 1].")
        picture = to_uint8(picture.detach().cpu()).permute(1, 2, 0).numpy()
    if isinstance(picture, np.ndarray):
        picture = _pillow(picture)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    array = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return np.ascontiguousarray(array[..., None] if array.ndim == 2 else array)


def _pillow(array: NDArray[np.uint8]) -> Image.Image:
    flat = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if flat.dtype != np.uint8 or not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[-1] in (3, 4))):
        raise DataError(f"an array of {array.dtype} {array.shape} is no picture: uint8 (H, W) or (H, W, 1, 3 or 4).")
    return Image.fromarray(np.ascontiguousarray(flat))


def save(images: Tensor | Bytes, path: str | Path) -> Path:
    """Write images and return where.

    Args:
        images: float tensor (N, C, H, W) in [-1, 1] or uint8 array (N, H, W, C); points are a tensor (N, 2, 1, 1).
        path: `.png` is a grid (of one image: just that image), `.npz` the form that evaluators read, a path without
            an ending a folder of PNGs.

    Raises:
        DataError: the images are not images, or the ending is none of these.
        UserError: the place cannot be written.
    """
    path = Path(path)
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[2:] == (1, 1) and images.shape[1] == 2:
        if path.suffix == ".npz":
            return save_points(path, images)
        return save_scatter(images, path)
    if path.suffix == ".png":
        return save_png(images[0], path) if len(images) == 1 else save_grid(images, path)
    if path.suffix == ".npz":
        return save_npz(path, images)
    if path.suffix == "":
        return save_folder(images, path)
    raise DataError(f"{path}: images are written as .png, .npz or into a folder.")


def stacked(pictures: list[Bytes]) -> Bytes:
    """Return pictures of one size as (N, H, W, C)."""
    return np.stack(pictures)


def mask_of(mask: Picture | NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return a mask (H, W) in [0, 1], 1 (white, True) where the model generates.

    Args:
        mask: a picture whose white pixels are generated, or a boolean array (H, W). Transparent pixels are not white.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        return mask.astype(np.float64)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return mask.cpu().numpy().astype(np.float64)
    return mask_from_bytes(on_black(as_bytes(mask, 4)), invert=False)  # type: ignore[arg-type]
