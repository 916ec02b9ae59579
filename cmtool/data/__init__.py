"""Data sets as index -> (image in [-1, 1], label), every reader of data files, and reading and writing of images.

Each name is imported on first use, so that code which only needs the cache folder does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmtool.data.builtin import split_indices
    from cmtool.data.dataset import Dataset, Summary, describe, fingerprint, from_tensors
    from cmtool.data.images import (
        fit_image,
        from_uint8,
        npz_writer,
        read_image,
        read_png_text,
        save_folder,
        save_grid,
        save_npz,
        save_png,
        save_points,
        save_scatter,
        to_nhwc,
        to_uint8,
    )
    from cmtool.data.load import load_dataset

__all__ = [
    "Dataset",
    "Summary",
    "describe",
    "fingerprint",
    "fit_image",
    "from_tensors",
    "from_uint8",
    "load_dataset",
    "npz_writer",
    "read_image",
    "read_png_text",
    "save_folder",
    "save_grid",
    "save_npz",
    "save_png",
    "save_points",
    "save_scatter",
    "split_indices",
    "to_nhwc",
    "to_uint8",
]
# The module each name comes from; names that are not listed live in cmtool.data.images.
_HOMES = {
    **dict.fromkeys(("Dataset", "Summary", "describe", "fingerprint", "from_tensors"), "dataset"),
    "load_dataset": "load",
    "split_indices": "builtin",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cmtool.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cmtool.data.{_HOMES.get(name, 'images')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
