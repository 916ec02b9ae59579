"""Where the images of a Python program go."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cmtool.data import save_folder, save_npz, save_points, save_scatter
from cmtool.data.images import save_pictures
from cmtool.errors import DataError

Bytes: TypeAlias = NDArray[np.uint8]


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
