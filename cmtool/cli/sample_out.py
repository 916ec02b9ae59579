"""What an output path of `cmtool sample` asks for; without torch, so that a wrong one is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cmtool.errors import UserError

OutKind = Literal["picture", "npz", "folder"]
# A grid of more pictures than this is larger than programs open and eyes take in.
LARGEST_GRID = 10_000


def out_kind(path: Path, num: int, points: bool = False) -> OutKind:
    """Return what an output path asks for, by its suffix.

    Args:
        path: as given.
        num: number of samples.
        points: whether samples are points, which no folder of pictures can hold.

    Raises:
        UserError: for a suffix that is not written, a file where a folder is meant, a folder for points, or a grid too
            large to open.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == "":
        if path.is_file():
            raise UserError(f"{path} is a file; an output without .png or .npz is a folder.", "choose another --out")
        if points:
            raise UserError(
                "points are no pictures: a folder of PNGs cannot hold them.", "use --out points.npz or points.png"
            )
        return "folder"
    if suffix == ".png":
        if num > LARGEST_GRID and not points:
            raise UserError(f"{num:,} images are too many for one grid.", "use --out samples.npz or a folder")
        return "picture"
    if suffix == ".npz":
        return "npz"
    raise UserError(
        f"--out {path}: '{suffix}' is not written here.", "use .png (a grid), .npz (arrays), or a name without a dot"
    )
