"""From a person's picture to an edit and back: what each task knows, how its result is made legal, where it goes.

A task prepares one picture as a `Subject`: the measurement at the model's size (or larger, for windows), and how the
edited tensor becomes bytes again. The loop itself is `editing.loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.data.images import MAX_PIXELS, from_uint8, to_nhwc, to_uint8
from cmtool.editing.loop import (
    Operator,
    by_patch,
    by_pixel,
    into_range,
    known_luma,
    known_patch_means,
    known_pixels,
    luma_image,
    nothing_known,
    repeat_patches,
)
from cmtool.editing.regions import (
    Mask,
    Region,
    blend,
    match_mask,
    put_resized,
    region_around,
    region_of_fit,
    resize,
    resize_floats,
    resize_mask,
    take_resized,
)
from cmtool.editing.windows import positions
from cmtool.errors import DataError, UserError

Bytes = NDArray[np.uint8]
Legal = Callable[[Tensor], Tensor]
Back = Callable[[Tensor], Bytes]


@dataclass(frozen=True)
class Options:
    """How pictures are fitted: `fit` is "crop", "pad" or "stretch"; `paste` returns the edit inside the original."""

    fit: str = "crop"
    paste: bool = False


@dataclass(frozen=True)
class Subject:
    """One picture made ready for a model.

    Attributes:
        y: the measurement (1, C, H, W) in [-1, 1].
        shown: what the model was given, as bytes (H, W, C), for the grid.
        mask: (1, 1, H, W), 1 where the model generates; inpainting only.
        factor: side of the patches whose means are known; super-resolution only.
        legal: brings an edit (B, C, H, W) into [-1, 1] without touching what is known.
        back: turns one legal edit (1, C, H, W) into the bytes that are written.
        notes: what was done to the picture, for the user.
    """

    y: Tensor
    shown: Bytes
    legal: Legal
    back: Back
    mask: Tensor | None = None
    factor: int = 1
    notes: tuple[str, ...] = field(default=())


def tensor(picture: Bytes) -> Tensor:
    """(H, W, C) bytes -> (1, C, H, W) float32 in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(picture))).permute(2, 0, 1)[None]


def picture(x: Tensor) -> Bytes:
    """(1, C, H, W) in [-1, 1] -> (H, W, C) bytes."""
    return to_nhwc(to_uint8(x))[0]


def clipped(x: Tensor) -> Tensor:
    """Cut to [-1, 1]: nothing that is known lies outside."""
    return x.clamp(-1, 1)


def operator_of(task: str, subject: Subject, like: Tensor) -> Operator:
    """Return what a task knows of a subject, on the device and in the dtype of `like`."""
    if task == "inpaint" and subject.mask is not None:
        return known_pixels(subject.mask.to(like))
    if task == "colorize":
        return known_luma()
    if task == "superres":
        return known_patch_means(subject.factor)
    return nothing_known()


def _describe(original: Bytes, region: Region, side: int, fit: str) -> tuple[str, ...]:
    height, width = original.shape[:2]
    if (height, width) == (side, side):
        return ()
    done = {"crop": "its middle square", "pad": "padded to a square,", "stretch": "stretched,"}[fit]
    if region.is_square and region.height == height == width:
        done = ""
    verb = "reduced" if region.height > side else "enlarged"
    return (" ".join(f"{width} x {height}: {done} {verb} to {side} x {side}".split()),)


def _fitted(original: Bytes, side: int, options: Options) -> tuple[Bytes, Region, tuple[str, ...]]:
    region = region_of_fit(original.shape[0], original.shape[1], options.fit)
    small = take_resized(original, region, side, side, resize)
    return small, region, _describe(original, region, side, options.fit)


def prepare_inpaint(original: Bytes, mask: Mask, side: int, options: Options, name: str) -> Subject:
    """Generate where the mask is white; everything else keeps its bytes.

    With `paste` the model works on a square around the mask, and the picture keeps its size.
    """
    mask, notice = match_mask(mask, original.shape[0], original.shape[1], name)
    if options.paste:
        region = region_around(mask, side)
        notes: tuple[str, ...] = (f"working on {region.width} x {region.height} pixels around the mask",)
    else:
        region = region_of_fit(original.shape[0], original.shape[1], options.fit)
        notes = _describe(original, region, side, options.fit)
    small = take_resized(original, region, side, side, resize)
    inner = take_resized(mask, region, side, side, resize_mask)
    if inner.max() == 0:
        raise UserError("the mask lies outside the part that is kept.", "use --fit pad, or --paste")
    if inner.min() >= 1 and not options.paste:
        raise UserError("the mask covers all of the part that is kept.", "use --fit pad, or --paste")
    holed = blend(small, np.full_like(small, 128), inner)

    def back(x: Tensor) -> Bytes:
        if not options.paste:
            return picture(x)
        return blend(original, put_resized(original, region, picture(x), resize), mask)

    chosen = torch.from_numpy(inner)[None, None].float()
    given = (notice,) if notice else ()
    return Subject(tensor(small), holed, clipped, back, chosen, notes=(*given, *notes))


def prepare_colorize(original: Bytes, side: int, options: Options) -> Subject:
    """Keep the luma of each pixel and generate its color. With `paste` the luma stays at full size."""
    small, region, notes = _fitted(original, side, options)
    gray = luma_image(tensor(small))

    def legal(x: Tensor) -> Tensor:
        return into_range(x, gray.to(x).expand_as(x), by_pixel)

    def back(x: Tensor) -> Bytes:
        if not options.paste:
            return picture(x)
        return _colored(original, x, region)

    return Subject(gray, picture(gray), legal, back, notes=notes)


def _colored(original: Bytes, x: Tensor, region: Region) -> Bytes:
    """The full-size luma of `original` with the chroma of the small edit, enlarged smoothly."""
    full = luma_image(tensor(original))
    chroma = (x - luma_image(x))[0].permute(1, 2, 0).double().cpu().numpy()
    placed = put_resized(np.zeros((*original.shape[:2], 3)), region, chroma, resize_floats)
    away = torch.from_numpy(placed).permute(2, 0, 1)[None].float()
    # The resized chroma carries a trace of luma, which belongs to the original alone.
    away = away - luma_image(away)
    return picture(into_range(full + away, full, by_pixel))


def choose_factor(factor: int | None, original: Bytes, side: int) -> int:
    """Return the enlargement: as given, else what makes the picture as large as the model.

    Raises:
        DataError: if no whole factor fits.
    """
    if factor is None:
        short = min(original.shape[:2])
        if short >= side or side % short:
            raise DataError(
                f"{original.shape[1]} x {original.shape[0]} is no whole part of the model's {side} x {side} pixels.",
                "say how much to enlarge with --factor",
            )
        return side // short
    if factor < 2 or side % factor:
        divisors = ", ".join(str(value) for value in range(2, side + 1) if side % value == 0)
        raise DataError(f"--factor {factor} does not divide the model's {side} pixels; choose from {divisors}.")
    return factor


def prepare_superres(original: Bytes, factor: int, side: int, options: Options) -> Subject:
    """Enlarge by `factor`: each small pixel is the known mean of a patch. With `paste` the picture keeps its shape.

    Raises:
        DataError: the whole would be larger than any picture may be.
    """
    small_side = side // factor
    height, width = original.shape[:2]
    if options.paste and height * width * factor**2 > MAX_PIXELS:
        raise DataError(
            f"{width} x {height} becomes {width * factor} x {height * factor}, which is 100 megapixels or more.",
            "enlarge a part of it, or less",
        )
    if options.paste:
        region = Region(0, 0, max(height, small_side), max(width, small_side))
        small = region.take(original)
        notes: tuple[str, ...] = (
            f"{width} x {height} becomes {width * factor} x {height * factor}, "
            f"in {_windows(region.height * factor, region.width * factor, side)}",
        )
    else:
        small, region, notes = _fitted(original, small_side, options)
    y = repeat_patches(tensor(small), factor)

    def legal(x: Tensor) -> Tensor:
        return into_range(x, y.to(x).expand_as(x), by_patch(factor))

    def back(x: Tensor) -> Bytes:
        whole = picture(x)
        return whole[: height * factor, : width * factor] if options.paste else whole

    return Subject(y, picture(y), legal, back, factor=factor, notes=notes)


def _windows(height: int, width: int, side: int) -> str:
    """Say how many windows of the model's side cover a picture: what its edit costs. Levels differ by a row at most."""
    count = len(positions(height, side, offset=1)) * len(positions(width, side, offset=1))
    return f"about {count} overlapping windows of {side}"


def prepare_stroke(original: Bytes, side: int, options: Options) -> Subject:
    """Turn a rough drawing into a picture: it says where to start, and nothing of it is kept."""
    small, region, notes = _fitted(original, side, options)
    return Subject(tensor(small), small, clipped, _pasting(original, region, options), notes=notes)


def prepare_denoise(original: Bytes, side: int, options: Options) -> Subject:
    """Remove noise. With `paste` overlapping windows cover the picture at its own size."""
    height, width = original.shape[:2]
    if options.paste and (height > side or width > side):
        region = Region(0, 0, max(height, side), max(width, side))
        notes = (f"{width} x {height} in {_windows(region.height, region.width, side)}",)

        def back(x: Tensor) -> Bytes:
            return picture(x)[:height, :width]

        return Subject(tensor(region.take(original)), original, clipped, back, notes=notes)
    small, region, fitted = _fitted(original, side, options)
    warned = ("resizing changes the noise: --sigma is meant after it (--paste keeps the size)",) if fitted else ()
    return Subject(tensor(small), small, clipped, _pasting(original, region, options), notes=(*fitted, *warned))


def _pasting(original: Bytes, region: Region, options: Options) -> Back:
    def back(x: Tensor) -> Bytes:
        edited = picture(x)
        if not options.paste:
            return edited
        return put_resized(original, region, edited, resize)

    return back


def uncertainty_map(variations: Tensor) -> Bytes:
    """Standard deviation over variations (N, C, H, W), mean over channels, as gray (H, W, 1): white is 1.0 and above.

    The scale is fixed, so that maps of different pictures can be compared.
    """
    spread = variations.double().std(dim=0, unbiased=True).mean(dim=0)
    return (spread.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()[..., None]
