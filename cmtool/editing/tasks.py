"""From a person's picture to an edit and back: what each task knows, how its result is made legal, where it goes.

A task prepares one picture as a `Subject`: the measurement at the model's size (or larger, for windows), and how the
edited tensor becomes bytes again. The loop itself is `editing.loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

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
from cmtool.editing.masks import Mask, match_mask, resize_mask
from cmtool.editing.photos import Photo
from cmtool.editing.regions import (
    Region,
    blend,
    filled,
    put_resized,
    region_around,
    region_of_fit,
    resize,
    resize_floats,
    take_resized,
)
from cmtool.editing.windows import positions
from cmtool.errors import DataError, UsageError, UserError

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
        back: turns one legal edit (1, C, H, W) into the bytes that are written, in the color space of `photo`.
        photo: the picture as it was given.
        before: makes what `back` would return of an edit without effect; None: nothing like that was given.
        notes: what was done to the picture, for the user.
    """

    y: Tensor
    shown: Bytes
    legal: Legal
    back: Back
    photo: Photo
    mask: Tensor | None = None
    factor: int = 1
    before: Callable[[], Bytes] | None = None
    notes: tuple[str, ...] = field(default=())

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


def _fitted(photo: Photo, side: int, options: Options) -> tuple[Bytes, Region, tuple[str, ...]]:
    """The part of a picture that the model works on, in the picture's color space."""
    region = region_of_fit(photo.pixels.shape[0], photo.pixels.shape[1], options.fit)
    small = take_resized(photo.pixels, region, side, side, resize)
    return small, region, (*photo.notes, *_describe(photo.pixels, region, side, options.fit))


def prepare_inpaint(photo: Photo, mask: Mask | None, side: int, options: Options, name: str) -> Subject:
    """Generate where the mask is white; everything else keeps its bytes.

    With `paste` the model works on a square around the mask, and the picture keeps its size.

    Args:
        mask: (H, W) in [0, 1]; None: what is transparent in the picture is generated.

    Raises:
        UserError: there is nothing to generate, or nothing that is known.
    """
    original = photo.pixels
    if mask is None:
        mask = no_mask(name) if photo.holes is None else photo.holes
    mask, notice = match_mask(mask, original.shape[0], original.shape[1], name)
    if options.paste:
        region = region_around(mask, side)
        notes: tuple[str, ...] = (f"working on {region.width} x {region.height} pixels around the mask",)
    else:
        region = region_of_fit(original.shape[0], original.shape[1], options.fit)
        notes = _describe(original, region, side, options.fit)
    inner = take_resized(mask, region, side, side, resize_mask)
    if inner.max() == 0:
        raise UserError("the mask lies outside the part that is kept.", "use --fit pad, or --paste")
    if inner.min() >= 1 and not options.paste:
        raise UserError("the mask covers all of the part that is kept.", "use --fit pad, or --paste")
    small = _known_part(photo, mask, region, side)
    shown = blend(small, np.full_like(small, 128), inner)

    def back(x: Tensor) -> Bytes:
        made = photo.from_srgb(picture(x))
        if not options.paste:
            return np.where(inner[..., None] > 0, made, small)
        return blend(original, put_resized(original, region, made, resize), mask)

    def before() -> Bytes:
        return original if options.paste else take_resized(original, region, side, side, resize)

    given = (notice,) if notice else ()
    return Subject(
        tensor(photo.to_srgb(small)),
        shown,
        clipped,
        back,
        photo,
        torch.from_numpy(inner)[None, None].float(),
        before=None if photo.holes is not None else before,
        notes=(*photo.notes, *given, *notes),
    )


def no_mask(name: str) -> NoReturn:
    """Raise the UsageError of a picture without anything to say where to generate."""
    raise UsageError(
        f"{name} has nothing transparent, and there is no --mask.",
        "--mask names a picture that is white where something is to be made; or erase that part of the picture",
    )


def _known_part(photo: Photo, mask: Mask, region: Region, side: int) -> Bytes:
    """The region at the model's size, into whose known pixels nothing from under the mask was mixed."""
    original, resized = photo.pixels, (region.height, region.width) != (side, side)
    if resized:
        original = filled(original, mask > 0)
    elif photo.holes is not None:
        original = filled(original, mask >= 1)
    return take_resized(original, region, side, side, resize)


def prepare_colorize(photo: Photo, side: int, options: Options) -> Subject:
    """Keep the luma of each pixel and generate its color. With `paste` the luma stays at full size."""
    small, region, notes = _fitted(photo, side, options)
    gray = luma_image(tensor(photo.to_srgb(small)))

    def legal(x: Tensor) -> Tensor:
        return into_range(x, gray.to(x).expand_as(x), by_pixel)

    def back(x: Tensor) -> Bytes:
        return photo.from_srgb(_colored(photo.to_srgb(photo.pixels), x, region) if options.paste else picture(x))

    return Subject(gray, photo.from_srgb(picture(gray)), legal, back, photo, before=lambda: back(gray), notes=notes)


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


def prepare_superres(photo: Photo, factor: int, side: int, options: Options) -> Subject:
    """Enlarge by `factor`: each small pixel is the known mean of a patch. With `paste` the picture keeps its shape.

    Raises:
        DataError: the whole would be larger than any picture may be.
    """
    small_side = side // factor
    height, width = photo.pixels.shape[:2]
    if options.paste and height * width * factor**2 > MAX_PIXELS:
        raise DataError(
            f"{width} x {height} becomes {width * factor} x {height * factor}, which is 100 megapixels or more.",
            "enlarge a part of it, or less",
        )
    if options.paste:
        region = Region(0, 0, max(height, small_side), max(width, small_side))
        small = region.take(photo.pixels)
        notes: tuple[str, ...] = (
            *photo.notes,
            f"{width} x {height} becomes {width * factor} x {height * factor}, "
            f"in {_windows(region.height * factor, region.width * factor, side)}",
        )
    else:
        small, region, notes = _fitted(photo, small_side, options)
    y = repeat_patches(tensor(photo.to_srgb(small)), factor)

    def legal(x: Tensor) -> Tensor:
        return into_range(x, y.to(x).expand_as(x), by_patch(factor))

    def back(x: Tensor) -> Bytes:
        whole = photo.from_srgb(picture(x))
        return whole[: height * factor, : width * factor] if options.paste else whole

    return Subject(y, photo.from_srgb(picture(y)), legal, back, photo, factor=factor, notes=notes)


def _windows(height: int, width: int, side: int) -> str:
    """Say how many windows of the model's side cover a picture: what its edit costs. Levels differ by a row at most."""
    count = len(positions(height, side, offset=1)) * len(positions(width, side, offset=1))
    return f"about {count} overlapping windows of {side}"


def prepare_stroke(photo: Photo, side: int, options: Options) -> Subject:
    """Turn a rough drawing into a picture: it says where to start, and nothing of it is kept."""
    return _whole(photo, *_fitted(photo, side, options), options)


def prepare_denoise(photo: Photo, side: int, options: Options) -> Subject:
    """Remove noise. With `paste` overlapping windows cover the picture at its own size."""
    height, width = photo.pixels.shape[:2]
    if options.paste and (height > side or width > side):
        region = Region(0, 0, max(height, side), max(width, side))
        said = f"{width} x {height} in {_windows(region.height, region.width, side)}"

        def back(x: Tensor) -> Bytes:
            return photo.from_srgb(picture(x))[:height, :width]

        y = tensor(photo.to_srgb(region.take(photo.pixels)))
        return Subject(y, photo.pixels, clipped, back, photo, before=lambda: photo.pixels, notes=(*photo.notes, said))
    small, region, notes = _fitted(photo, side, options)
    resized = (region.height, region.width) != (side, side)
    warned = ("resizing changes the noise: --sigma is meant after it (--paste keeps the size)",) if resized else ()
    return _whole(photo, small, region, (*notes, *warned), options)


def _whole(photo: Photo, small: Bytes, region: Region, notes: tuple[str, ...], options: Options) -> Subject:
    """An edit of all that the model is given, of which nothing is kept."""

    def back(x: Tensor) -> Bytes:
        made = photo.from_srgb(picture(x))
        return put_resized(photo.pixels, region, made, resize) if options.paste else made

    y = tensor(photo.to_srgb(small))
    return Subject(y, small, clipped, back, photo, before=lambda: back(y), notes=notes)


def uncertainty_map(variations: Tensor) -> Bytes:
    """Standard deviation over variations (N, C, H, W), mean over channels, as gray (H, W, 1): white is 1.0 and above.

    The scale is fixed, so that maps of different pictures can be compared.
    """
    spread = variations.double().std(dim=0, unbiased=True).mean(dim=0)
    return (spread.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()[..., None]
