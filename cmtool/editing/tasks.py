"""The edits, one row each: what an edit makes of a picture, and how its noise levels are chosen.

The table is read without torch; what prepares a picture imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from cmtool.editing.photos import Photo
    from cmtool.editing.regions import Mask, Region
    from cmtool.editing.subject import Subject

    Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of one picture.

    `fit` is "crop", "pad" or "stretch"; `paste` returns the edit inside the original; `mask` (H, W) is 1 where
    something is generated (None: what is transparent); `factor` is an enlargement (None: to the model's size) of a
    picture that a `kernel` reduced, "mean" or "bicubic"; `sigma` is the standard deviation of a blur in pixels; `noise`
    is that of the noise in the picture on the scale of [-1, 1] (None: what rounding to bytes makes).
    """

    name: str = "the picture"
    fit: str = "crop"
    paste: bool = False
    mask: Mask | None = None
    factor: int | None = None
    kernel: str = "mean"
    sigma: float = 0.0
    noise: float | None = None


Prepare = Callable[["Photo", int, Asked], "Subject"]


@dataclass(frozen=True)
class Task:
    """An edit.

    Attributes:
        name: as it is typed.
        prepare: makes a picture ready for a model of a given side in pixels.
        levels: its noise levels: "tuned" geometric ones with over-relaxation and candidates, a "list", or that of the
            "noise" in the picture, which takes one evaluation and adds none.
        channels: those that the model must have; None: any.
        takes: what it takes besides a picture. Without a mask it generates what is transparent; edits without a mask
            lay it on white.
        like: the edit whose levels it takes, where it has none of its own in [edit].
        not_in_latents: why a model of latents cannot do it; empty: it can.
    """

    name: str
    prepare: Prepare
    levels: Literal["tuned", "list", "noise"]
    channels: int | None = None
    takes: tuple[Literal["mask", "factor", "sigma", "blur"], ...] = ()
    like: str = ""
    not_in_latents: str = ""

    @property
    def setting(self) -> str:
        """The name of its levels in the table [edit] of presets and headers."""
        return self.like or self.name


def inpaint(photo: Photo, side: int, asked: Asked) -> Subject:
    """Generate where the mask is white; everything else keeps its bytes.

    With `paste` the model works on a square around the mask, and the picture keeps its size.

    Raises:
        UserError: there is nothing to generate, or nothing that is known.
    """
    import torch

    from cmtool.editing.loop import known_pixels
    from cmtool.editing.regions import open_hole
    from cmtool.editing.subject import Subject, clipped, picture, tensor

    erased = photo.holes is not None
    hole = open_hole(
        photo.pixels, _mask(photo, asked), side, fit=asked.fit, paste=asked.paste, name=asked.name, hidden=erased
    )
    inner = torch.from_numpy(hole.inner)[None, None].float()
    return Subject(
        photo=photo,
        y=tensor(photo.to_srgb(hole.small)),
        operator=lambda like: known_pixels(inner.to(like)),
        legal=clipped,
        back=lambda x: hole.closed(photo.from_srgb(picture(x))),
        shown=hole.shown,
        before=None if erased else hole.given,
        has_hole=True,
        notes=(*photo.notes, *hole.notes),
    )


def _mask(photo: Photo, asked: Asked) -> Mask:
    """The mask that was given, else what is transparent."""
    if asked.mask is not None:
        return asked.mask
    if photo.holes is not None:
        return photo.holes
    raise UsageError(
        f"{asked.name} has nothing transparent, and there is no --mask.",
        "--mask names a picture that is white where something is to be made; or erase that part of the picture",
    )


def colorize(photo: Photo, side: int, asked: Asked) -> Subject:
    """Keep the luma of each pixel and generate its color. With `paste` the luma stays at full size."""
    from cmtool.editing.loop import by_pixel, into_range, known_luma, luma_image
    from cmtool.editing.subject import Subject, colored, fitted, picture, tensor

    small, region, notes = fitted(photo, side, asked.fit)
    gray = luma_image(tensor(photo.to_srgb(small)))

    def back(x: Tensor) -> Bytes:
        return photo.from_srgb(colored(photo.to_srgb(photo.pixels), x, region) if asked.paste else picture(x))

    return Subject(
        photo=photo,
        y=gray,
        operator=lambda like: known_luma(),
        legal=lambda x: into_range(x, gray.to(x).expand_as(x), by_pixel),
        back=back,
        shown=photo.from_srgb(picture(gray)),
        before=lambda: back(gray),
        notes=notes,
    )


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


def superres(photo: Photo, side: int, asked: Asked) -> Subject:
    """Enlarge: each small pixel is the known mean of a patch, or the known result of a bicubic reduction.

    With `paste` the picture keeps its shape.

    Raises:
        DataError: the factor does not fit, or the whole would be larger than any picture may be.
    """
    from cmtool.data.decode import MAX_PIXELS
    from cmtool.editing.loop import by_patch, into_range, known_patch_means, repeat_patches
    from cmtool.editing.regions import Region
    from cmtool.editing.subject import Subject, fitted, picture, tensor, windows_note

    factor = choose_factor(asked.factor, photo.pixels, side)
    height, width = (length * factor for length in photo.pixels.shape[:2])
    grown = f"{width // factor} x {height // factor} becomes {width} x {height}"
    if asked.paste and height * width > MAX_PIXELS:
        raise DataError(f"{grown}, which is 100 megapixels or more.", "enlarge a part of it, or less")
    if asked.paste:
        region = Region(0, 0, max(height, side) // factor, max(width, side) // factor)
        small = region.take(photo.pixels)
        said = f"{grown}, in {windows_note(region.height * factor, region.width * factor, side)}"
        notes: tuple[str, ...] = (*photo.notes, said)
    else:
        small, _, notes = fitted(photo, side // factor, asked.fit)
    y = repeat_patches(tensor(photo.to_srgb(small)), factor)

    def back(x: Tensor) -> Bytes:
        made = photo.from_srgb(picture(x))
        return made[:height, :width] if asked.paste else made

    made = Subject(
        photo=photo,
        y=y,
        operator=lambda like: known_patch_means(factor),
        legal=lambda x: into_range(x, y.to(x).expand_as(x), by_patch(factor)),
        back=back,
        shown=photo.from_srgb(picture(y)),
        notes=notes,
    )
    if asked.kernel == "mean" and not asked.noise:
        return made
    from cmtool.editing.operators import measured, reduction

    way = reduction(y.shape[-2], y.shape[-1], factor, asked.kernel)
    return measured(made, way, tensor(photo.to_srgb(small)), asked.noise or 0.0)


def stroke(photo: Photo, side: int, asked: Asked) -> Subject:
    """Turn a rough drawing into a picture: the drawing says where to start, and nothing of it is kept."""
    from cmtool.editing.subject import fitted, nothing_kept

    small, region, notes = fitted(photo, side, asked.fit)
    return nothing_kept(photo, small, region, asked.paste, notes)


def _free(photo: Photo, side: int, asked: Asked) -> tuple[Subject, Region]:
    """An edit that may change everything, and the region that the model gets: with `paste` the whole picture."""
    from cmtool.editing.regions import Region
    from cmtool.editing.subject import fitted, nothing_kept, picture, windows_note

    height, width = photo.pixels.shape[:2]
    if asked.paste and (height > side or width > side):
        region = Region(0, 0, max(height, side), max(width, side))
        said = f"{width} x {height} in {windows_note(region.height, region.width, side)}"
        made = nothing_kept(photo, region.take(photo.pixels), region, False, (*photo.notes, said))
        made = replace(
            made,
            back=lambda x: photo.from_srgb(picture(x))[:height, :width],
            shown=photo.pixels,
            before=lambda: photo.pixels,
        )
        return made, region
    small, region, notes = fitted(photo, side, asked.fit)
    return nothing_kept(photo, small, region, asked.paste, notes), region


def denoise(photo: Photo, side: int, asked: Asked) -> Subject:
    """Remove noise. With `paste` overlapping windows cover the picture at its own size."""
    made, region = _free(photo, side, asked)
    if made.y.shape[-2:] == (region.height, region.width):
        return made
    note = "resizing changes the noise: --sigma is meant after it (--paste keeps the size)"
    return replace(made, notes=(*made.notes, note))


def deblur(photo: Photo, side: int, asked: Asked) -> Subject:
    """Undo a Gaussian blur. With `paste` overlapping windows cover the picture at its own size.

    Raises:
        UsageError: the width is not one of a blur.
    """
    from cmtool.editing.operators import BYTES, blur, measured

    if not 0 < asked.sigma <= side:
        raise UsageError(
            f"--sigma {asked.sigma:g} is no blur of {side} pixels.",
            "it is the standard deviation of the blur in pixels of the picture, e.g. --sigma 1.5",
        )
    made, region = _free(photo, side, asked)
    height, width = made.y.shape[-2:]
    rows, columns = asked.sigma * height / region.height, asked.sigma * width / region.width
    if (rows, columns) != (asked.sigma, asked.sigma):
        made = replace(made, notes=(*made.notes, f"at the model's size the blur is {rows:.2g} pixels"))
    noise = BYTES if asked.noise is None else asked.noise
    return measured(made, blur(height, width, rows, columns), made.y, noise)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("inpaint", inpaint, "tuned", takes=("mask",)),
        Task("colorize", colorize, "tuned", channels=3, not_in_latents="no part of a latent is the luma of its pixels"),
        Task(
            "superres", superres, "tuned", takes=("factor",), not_in_latents="no part of a latent is a mean of pixels"
        ),
        Task("deblur", deblur, "tuned", takes=("blur",), not_in_latents="a blur of pixels is no linear map of latents"),
        Task("stroke", stroke, "list"),
        Task(
            "denoise",
            denoise,
            "noise",
            takes=("sigma",),
            not_in_latents="noise in pixels is no Gaussian noise in latents",
        ),
    )
}
