"""Pictures in the forms that a Python program has them in, and writing them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cmtool.data import save_folder, save_npz, save_points, save_scatter, to_uint8
from cmtool.data.decode import upright
from cmtool.data.images import save_pictures
from cmtool.editing.masks import Mask, Painted, mask_from_image, mask_from_levels
from cmtool.editing.photos import Photo, photo_of, read_photo
from cmtool.errors import DataError

Bytes: TypeAlias = NDArray[np.uint8]
# A file, a Pillow image, bytes (H, W, C) or (H, W), or a float tensor (C, H, W) in [-1, 1].
Picture: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8] | Tensor"


def photo(picture: Picture, channels: int, see_through: bool = False) -> Photo:
    """Return a picture as an edit takes it.

    Args:
        picture: a path, a Pillow image, uint8 (H, W) or (H, W, C), or a float tensor (C, H, W) in [-1, 1].
        channels: 1 (gray), 3 (color) or 4; what has others is converted as `cmtool.data.read_image` converts files.
        see_through: what is transparent is a hole, not white.

    Raises:
        DataError: there is no such file, or the array is no picture.
    """
    if isinstance(picture, (str, Path)):
        return read_photo(Path(picture), channels, see_through)
    return photo_of(_pillow(picture), channels, "the picture", see_through)


def _pillow(picture: Image.Image | NDArray[np.uint8] | Tensor) -> Image.Image:
    """Return a picture in memory as an upright Pillow image."""
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture)
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or not picture.is_floating_point():
            raise DataError(f"a tensor {tuple(picture.shape)} of {picture.dtype} is no picture (C, H, W) in [-1, 1].")
        picture = to_uint8(picture.detach().cpu()).permute(1, 2, 0).numpy()
    flat = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
    if flat.dtype != np.uint8 or not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[-1] in (3, 4))):
        kind = f"{picture.dtype} {picture.shape}"
        raise DataError(f"an array of {kind} is no picture: uint8 (H, W) or (H, W, 1, 3 or 4).")
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
        return save_pictures(images, path)
    if path.suffix == ".npz":
        return save_npz(path, images)
    if path.suffix == "":
        return save_folder(images, path)
    raise DataError(f"{path}: images are written as .png, .npz or into a folder.")


def stacked(pictures: list[Bytes]) -> Bytes:
    """Return pictures of one size as (N, H, W, C)."""
    return np.stack(pictures)


def mask_of(mask: Picture | NDArray[Any]) -> Mask:
    """Return a mask (H, W) in [0, 1], 1 (white, True) where the model generates; warns of what is odd about it.

    Args:
        mask: a picture whose white is to be generated, as `cmtool edit inpaint --mask` reads it (what is transparent is
            not white), or an array (H, W) of booleans, or of numbers of which two occur: the lower one is kept.
    """
    painted = _painted(mask)
    for notice in painted.notices:
        warnings.warn(notice, stacklevel=4)
    return painted.mask


def _painted(mask: Picture | NDArray[Any]) -> Painted:
    if isinstance(mask, (str, Path)):
        return mask_from_image(upright(Path(mask)), str(mask))
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) and mask.ndim == 2 else mask
    if isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype != np.uint8:
        white = 1.0 if array.dtype == np.bool_ or array.dtype.kind == "f" else float(np.iinfo(array.dtype).max)
        return mask_from_levels(array.astype(np.float64), white, "the mask")
    return mask_from_image(_pillow(array), "the mask")
