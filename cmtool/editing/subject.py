"""One picture made ready for a model: the measurement at the model's size (or larger, for windows), and the way back.

What each edit makes of a picture stands in `tasks`; the loop is `editing.loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.data.images import from_uint8, to_nhwc, to_uint8
from cmtool.editing.loop import Operator, by_pixel, into_range, luma_image, nothing_known
from cmtool.editing.photos import Photo
from cmtool.editing.regions import Region, describe, put_resized, region_of_fit, resize, resize_floats, take_resized
from cmtool.editing.windows import positions

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One picture made ready for a model.

    Attributes:
        photo: the picture as it was given.
        y: the measurement (1, C, H, W) in [-1, 1].
        operator: what is known of it, for tensors of a device and dtype.
        legal: brings an edit (B, C, H, W) into [-1, 1] without touching what is known.
        back: turns one legal edit (1, C, H, W) into the bytes that are written, in the color space of `photo`.
        shown: what the model was given, as bytes (H, W, C), for the grid.
        before: makes what `back` would return of an edit without effect; None: nothing like that was given.
        has_hole: the part that changes is a hole with a rim.
        notes: what was done to the picture, for the user.
    """

    photo: Photo
    y: Tensor
    operator: Callable[[Tensor], Operator]
    legal: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Bytes]
    shown: Bytes
    before: Callable[[], Bytes] | None = None
    has_hole: bool = False
    notes: tuple[str, ...] = ()

    def unchanged(self, edited: Bytes) -> bool:
        """Whether the bytes (H, W, C) of an edit are those that were given."""
        return self.before is not None and np.array_equal(edited, self.before())


def tensor(picture: Bytes) -> Tensor:
    """(H, W, C) bytes -> (1, C, H, W) float32 in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(picture))).permute(2, 0, 1)[None]


def picture(x: Tensor) -> Bytes:
    """(1, C, H, W) in [-1, 1] -> (H, W, C) bytes."""
    return to_nhwc(to_uint8(x))[0]


def clipped(x: Tensor) -> Tensor:
    """Cut to [-1, 1]: nothing that is known lies outside."""
    return x.clamp(-1, 1)


def fitted(photo: Photo, side: int, fit: str) -> tuple[Bytes, Region, tuple[str, ...]]:
    """The part of a picture that the model works on, brought to its size in the picture's color space, and notes."""
    region = region_of_fit(photo.pixels.shape[0], photo.pixels.shape[1], fit)
    small = take_resized(photo.pixels, region, side, side, resize)
    return small, region, (*photo.notes, *describe(photo.pixels, region, side, fit))


def colored(original: Bytes, x: Tensor, region: Region) -> Bytes:
    """The full-size luma of `original` with the chroma of the small edit, enlarged smoothly."""
    full = luma_image(tensor(original))
    chroma = (x - luma_image(x))[0].permute(1, 2, 0).double().cpu().numpy()
    placed = put_resized(np.zeros((*original.shape[:2], 3)), region, chroma, resize_floats)
    away = torch.from_numpy(placed).permute(2, 0, 1)[None].float()
    # The resized chroma carries a trace of luma, which belongs to the original alone.
    away = away - luma_image(away)
    return picture(into_range(full + away, full, by_pixel))


def windows_note(height: int, width: int, side: int) -> str:
    """Say how many windows of the model's side cover a picture: what its edit costs. Levels differ by a row at most."""
    count = len(positions(height, side, offset=1)) * len(positions(width, side, offset=1))
    return f"about {count} overlapping windows of {side}"


def nothing_kept(photo: Photo, small: Bytes, region: Region, paste: bool, notes: tuple[str, ...]) -> Subject:
    """An edit that may change all that the model is given: the small picture of a region."""

    def back(x: Tensor) -> Bytes:
        made = photo.from_srgb(picture(x))
        return put_resized(photo.pixels, region, made, resize) if paste else made

    y = tensor(photo.to_srgb(small))
    return Subject(
        photo=photo,
        y=y,
        operator=lambda like: nothing_known(),
        legal=clipped,
        back=back,
        shown=small,
        before=lambda: back(y),
        notes=notes,
    )


def uncertainty_map(variations: Tensor) -> Bytes:
    """Standard deviation over variations (N, C, H, W), mean over channels, as gray (H, W, 1): white is 1.0 and above.

    The scale is fixed, so that maps of different pictures can be compared.
    """
    spread = variations.double().std(dim=0, unbiased=True).mean(dim=0)
    return (spread.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()[..., None]
