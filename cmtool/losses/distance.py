"""Distances between two batches of images: (B, C, H, W) twice -> (B,)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmtool.config.parts import DistancePart

Distance = Callable[[Tensor, Tensor], Tensor]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean of squared differences over the values of an image (the released code's reduction)."""
    return ((a - b) ** 2).flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean of absolute differences over the values of an image."""
    return (a - b).abs().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c with the norm of a whole image (iCT, Eq. 7).

    With c = 0 it is the Euclidean norm; its gradient at zero, infinite otherwise, is taken as zero.
    """
    square = ((a - b) ** 2).flatten(1).sum(1)
    if c > 0:
        # Not sqrt(s + c^2) - c: for residuals far below c that difference loses every digit in float32.
        return square / ((square + c * c).sqrt() + c)
    inside = torch.where(square > 0, square, torch.ones_like(square))
    return torch.where(square > 0, inside.sqrt(), torch.zeros_like(square))


def huber_constant(part: DistancePart, values: int) -> float:
    """Return c: as set, or c_scale * sqrt(values an image) (iCT, section 3.3)."""
    return part.c if part.c is not None else part.c_scale * math.sqrt(values)


def _build_huber(part: DistancePart, values: int) -> Distance:
    c = huber_constant(part, values)
    return lambda a, b: pseudo_huber(a, b, c)


def _build_lpips(part: DistancePart, values: int) -> Distance:
    from cmtool.losses.perceptual import build_lpips

    return build_lpips(part)


BUILDERS: dict[str, Callable[[DistancePart, int], Distance]] = {
    "l2": lambda part, values: l2,
    "l1": lambda part, values: l1,
    "pseudo_huber": _build_huber,
    "lpips": _build_lpips,
}


def build_distance(part: DistancePart, values: int) -> Distance:
    """Return the distance that `part` names, for images of `values` = C * H * W numbers."""
    return BUILDERS[part.kind](part, values)
