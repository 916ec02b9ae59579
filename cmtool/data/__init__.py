"""Data: index -> (image in [-1, 1], label), every reader of data files, image files in and out.

Each name is imported when it is first used: what only asks for the cache's place, or names a model that comes along,
does without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmtool.data.dataset import Dataset as Dataset
    from cmtool.data.dataset import Summary as Summary
    from cmtool.data.dataset import describe as describe
    from cmtool.data.dataset import fingerprint as fingerprint
    from cmtool.data.dataset import from_tensors as from_tensors
    from cmtool.data.images import fit_image as fit_image
    from cmtool.data.images import from_uint8 as from_uint8
    from cmtool.data.images import npz_writer as npz_writer
    from cmtool.data.images import read_image as read_image
    from cmtool.data.images import read_png_text as read_png_text
    from cmtool.data.images import save_folder as save_folder
    from cmtool.data.images import save_grid as save_grid
    from cmtool.data.images import save_npz as save_npz
    from cmtool.data.images import save_png as save_png
    from cmtool.data.images import save_points as save_points
    from cmtool.data.images import to_nhwc as to_nhwc
    from cmtool.data.images import to_uint8 as to_uint8
    from cmtool.data.load import load_dataset as load_dataset
    from cmtool.data.order import batch_indices as batch_indices
    from cmtool.data.order import flip_mask as flip_mask
    from cmtool.data.order import split_indices as split_indices
    from cmtool.data.scatter import save_scatter as save_scatter

_HOME = {
    "dataset": ("Dataset", "Summary", "describe", "fingerprint", "from_tensors"),
    "images": (
        "fit_image",
        "from_uint8",
        "npz_writer",
        "read_image",
        "read_png_text",
        "save_folder",
        "save_grid",
        "save_npz",
        "save_png",
        "save_points",
        "to_nhwc",
        "to_uint8",
    ),
    "load": ("load_dataset",),
    "order": ("batch_indices", "flip_mask", "split_indices"),
    "scatter": ("save_scatter",),
}
__all__ = [
    "Dataset",
    "Summary",
    "batch_indices",
    "describe",
    "fingerprint",
    "fit_image",
    "flip_mask",
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


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"cmtool.data.{module}"), name)
    raise AttributeError(f"module 'cmtool.data' has no attribute '{name}'")
