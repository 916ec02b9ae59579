"""Augmentation that does not leak (Karras et al. 2022, Appendix F.2): images are changed, and the network is told how.

A network that knows what was done to each image learns the law of changed images from few originals, and samples the
originals' own law when told that nothing was done. Flips and whole-pixel moves copy pixels. All other changes are one
affine map, taken on an image enlarged twice by an orthogonal wavelet (sym6) so that it stays sharp and free of aliases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmtool.config.parts import AugmentPart
from cmtool.rng import batch_normal, batch_uniform, moved

# Powers of two of a scaling at one standard deviation; moves as shares of the side.
SCALE_STD, MOVE_STD, MOVE_MOST = 0.2, 0.125, 0.125
# Low-pass filter of the wavelet sym6 (Daubechies' least asymmetric, 12 taps), of sum sqrt(2).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
RIM = len(SYM6) // 4  # pixels around the image that the way down needs
UNIFORMS = ("xflip", "yflip", "move_x", "move_y", "angle", "axis")
GATES = ("xflip", "yflip", "translate_int", "scale", "rotate_frac", "aniso", "translate_frac", "any_axis")
NORMALS = ("scale", "aniso", "move_x", "move_y")
# Values of the enlarged images that are held at once.
AT_ONCE = 2**24


@dataclass(frozen=True)
class Numbers:
    """The random numbers of B images: `uniform` and `gate` in [0, 1) and `normal`, float64 (B,) by name."""

    uniform: dict[str, Tensor]
    gate: dict[str, Tensor]
    normal: dict[str, Tensor]


def drawn(seed: int, step: int, total: int, start: int, count: int) -> Numbers:
    """Draw the numbers for rows `start` .. `start + count` of the global batch of `step`, which has `total` images.

    All are drawn, whatever is switched on, so that no change depends on the others.
    """
    shape, bells = (total, len(UNIFORMS) + len(GATES)), (total, len(NORMALS))
    flat = batch_uniform(shape, seed, "augment", step, start=start, count=count).unbind(1)
    normal = batch_normal(bells, seed, "augment-normal", step, start=start, count=count, dtype=torch.float64)
    uniform, gate = flat[: len(UNIFORMS)], flat[len(UNIFORMS) :]
    return Numbers(
        dict(zip(UNIFORMS, uniform, strict=True)),
        dict(zip(GATES, gate, strict=True)),
        dict(zip(NORMALS, normal.unbind(1), strict=True)),
    )


@dataclass(frozen=True)
class Changes:
    """What is done to B images, zero where nothing is: float64 (B,) each; whole moves in pixels, angles in radians."""

    xflip: Tensor
    yflip: Tensor
    whole_x: Tensor
    whole_y: Tensor
    scale: Tensor
    turn: Tensor
    aniso: Tensor
    axis: Tensor
    move_x: Tensor
    move_y: Tensor

    def labels(self, part: AugmentPart, side: int) -> Tensor:
        """Return what the network is told, float32 (B, part.labels), in the order of EDM's files."""
        most = side * MOVE_MOST
        told = {
            "xflip": (self.xflip,),
            "yflip": (self.yflip,),
            "translate_int": (self.whole_x / most, self.whole_y / most),
            "scale": (self.scale,),
            "rotate_frac": (self.turn.cos() - 1, self.turn.sin()),
            "aniso": (self.aniso * self.axis.cos(), self.aniso * self.axis.sin()),
            "translate_frac": (self.move_x, self.move_y),
        }
        columns = [column for name, columns in told.items() if getattr(part, name) > 0 for column in columns]
        return torch.stack(columns, 1).float()

    @property
    def maps(self) -> Tensor:
        """Which images (B,) need the affine map."""
        return torch.stack([self.scale, self.turn, self.aniso, self.move_x, self.move_y]).ne(0).any(0)

    def inverse(self, side: int) -> Tensor:
        """Return the map from places in the changed image to places in the original, (B, 3, 3) float64.

        Both are in pixels from the middle, x to the right and y downwards.
        """
        scale, stretch = torch.exp2(-SCALE_STD * self.scale), torch.exp2(-SCALE_STD * self.aniso)
        made = _scaled(scale, scale) @ _turned(self.turn)
        made = made @ _turned(-self.axis) @ _scaled(stretch, 1 / stretch) @ _turned(self.axis)
        return made @ _moved(-self.move_x * side * MOVE_STD, -self.move_y * side * MOVE_STD)


def settle(part: AugmentPart, numbers: Numbers, side: int) -> Changes:
    """Return what random numbers do to images of `side` pixels."""
    uniform, normal = numbers.uniform, numbers.normal

    def where(name: str, value: Tensor) -> Tensor:
        return torch.where(numbers.gate[name] < getattr(part, name) * part.p, value, 0.0)

    most = side * MOVE_MOST
    axis = torch.where(numbers.gate["any_axis"] < 0.5, (2 * uniform["axis"] - 1) * math.pi, 0.0)
    return Changes(
        xflip=where("xflip", (uniform["xflip"] >= 0.5).double()),
        yflip=where("yflip", (uniform["yflip"] >= 0.5).double()),
        whole_x=where("translate_int", ((2 * uniform["move_x"] - 1) * most).round()),
        whole_y=where("translate_int", ((2 * uniform["move_y"] - 1) * most).round()),
        scale=where("scale", normal["scale"]),
        turn=where("rotate_frac", (2 * uniform["angle"] - 1) * math.pi),
        aniso=where("aniso", normal["aniso"]),
        axis=axis,
        move_x=where("translate_frac", normal["move_x"]),
        move_y=where("translate_frac", normal["move_y"]),
    )


def changed(images: Tensor, changes: Changes) -> Tensor:
    """Change square images (B, C, H, H); what lies outside is mirrored in. Unchanged images keep every bit."""

    def here(mask: Tensor) -> Tensor:
        return mask.to(images.device)[:, None, None, None]

    images = torch.where(here(changes.xflip == 1), images.flip(3), images)
    images = torch.where(here(changes.yflip == 1), images.flip(2), images)
    if changes.whole_x.any() or changes.whole_y.any():
        images = _moved_whole(images, changes.whole_x.long(), changes.whole_y.long())
    rows = changes.maps.nonzero().squeeze(1)
    if not len(rows):
        return images
    side = images.shape[-1]
    inverse, images = changes.inverse(side)[rows], images.clone()
    few = max(1, AT_ONCE // (images.shape[1] * (6 * side) ** 2))
    for own, maps in zip(rows.split(few), inverse.split(few), strict=True):
        index = own.to(images.device)
        images[index] = resampled(images[index], maps)
    return images


def augmented(
    part: AugmentPart, images: Tensor, seed: int, step: int, total: int, start: int
) -> tuple[Tensor, Tensor | None]:
    """Change the rows from `start` on of the global batch of `step`, and return them and what the network is told.

    Args:
        part: which changes, and how often.
        images: (B, C, H, H) in [-1, 1], on any device.
        seed, step, total: of the run; together with a row's place they decide everything.
        start: the place of the first image in the global batch of `total` images.

    Returns:
        Images of the same shape, and labels (B, L) float32; the images as they are and None without augmentation.
    """
    if not part.labels:
        return images, None
    side = images.shape[-1]
    changes = settle(part, drawn(seed, step, total, start, len(images)), side)
    return changed(images, changes), moved(changes.labels(part, side), images.device, images.dtype)


# --- pixels ----------------------------------------------------------------------------------------------------------


def _reflected(places: Tensor, side: int) -> Tensor:
    """Fold places outside 0 .. side - 1 back by mirrors that pass through the outermost pixels."""
    last = side - 1
    return last - (last - places % (2 * last)).abs()


def _moved_whole(images: Tensor, right: Tensor, up: Tensor) -> Tensor:
    """Move each image by whole pixels."""
    side = images.shape[-1]
    along = torch.arange(side)
    columns = _reflected(along - right[:, None], side).to(images.device)[:, None, None, :]
    rows = _reflected(along + up[:, None], side).to(images.device)[:, None, :, None]
    return images.gather(3, columns.expand_as(images)).gather(2, rows.expand_as(images))


@lru_cache(maxsize=8)
def _ladder(side: int) -> tuple[Tensor, Tensor]:
    """The ways up and down as matrices, float64.

    Up (2 (3 side - 2), side): mirrors at both ends, zeros in between, and the filter. Down (side, 2 (side + 2 RIM)):
    the filter at every second place.
    """
    taps, half, reach = np.array(SYM6), len(SYM6) // 2, side - 1
    padded = _reflected(torch.arange(-reach, side + reach), side).numpy()
    up = np.zeros((2 * len(padded), side))
    for place, pixel in enumerate(padded):
        for tap, height in enumerate(taps):
            if 0 <= (row := 2 * place + tap - half + 1) < len(up):
                up[row, pixel] += height
    down = np.zeros((side, 2 * (side + 2 * RIM)))
    for pixel in range(side):
        first = 2 * (pixel + RIM) - half + 1
        down[pixel, first : first + len(taps)] = taps
    return torch.from_numpy(up), torch.from_numpy(down)


def resampled(images: Tensor, inverse: Tensor) -> Tensor:
    """Return images (B, C, H, H) whose pixel at p is the original at `inverse` (B, 3, 3) p; see `Changes.inverse`."""
    count, channels, side = images.shape[:3]
    up, down = (matrix.to(images) for matrix in _ladder(side))
    fine = up @ images @ up.T
    # Pixel i of the original is pixel 2i of the enlarged image, whose middle is half a pixel further on.
    maps = _moved(*_both(-0.5)) @ _scaled(*_both(2)) @ inverse @ _scaled(*_both(0.5)) @ _moved(*_both(0.5))
    width, wanted = fine.shape[-1], down.shape[1]
    # Torch counts places from -1 to 1 over either image.
    theta = (_scaled(*_both(2 / width)) @ maps @ _scaled(*_both(wanted / 2)))[:, :2]
    grid = F.affine_grid(theta.to(images), [count, channels, wanted, wanted], align_corners=False)
    taken = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return down @ taken @ down.T


# --- maps of the plane -----------------------------------------------------------------------------------------------


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    """Return (..., 3, 3) from two rows; the third is (0, 0, 1)."""
    zero, one = torch.zeros_like(rows[0][0]), torch.ones_like(rows[0][0])
    return torch.stack([torch.stack(row, -1) for row in [*rows, [zero, zero, one]]], -2)


def _both(value: float) -> tuple[Tensor, Tensor]:
    return (torch.tensor(value, dtype=torch.float64),) * 2


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    zero = torch.zeros_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero]])


def _turned(angle: Tensor) -> Tensor:
    zero = torch.zeros_like(angle)
    return _matrix([[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


def _moved(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[one, zero, x], [zero, one, y]])
