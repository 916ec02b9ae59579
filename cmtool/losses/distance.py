"""Distances between two batches of images, (B, C, H, W) twice -> (B,), and their limits for nearly equal images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmtool.config.parts import DistancePart

Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Distance:
    """A distance and its local forms for continuous time.

    `between(a, b)` (B,) is the distance d itself. `form(f, v)` (B,) is the leading term of d(f, f + h v) in h, without
    the power of h. `pull(f, v)` (B, C, H, W) is the gradient of d(y, f - h v) in y at y = f, to first order in h; for a
    smooth distance with Hessian H that is H(f) v.
    """

    between: Measure
    form: Measure
    pull: Measure


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean of squared differences over the values of an image (the released code's reduction)."""
    return ((a - b) ** 2).flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean of absolute differences over the values of an image."""
    return (a - b).abs().flatten(1).mean(1)


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences over the values of an image."""
    return ((a - b) ** 2).flatten(1).sum(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c with the norm of a whole image (iCT, Eq. 7).

    With c = 0 it is the Euclidean norm, whose gradient at zero is taken as zero.
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


def mean_square(f: Tensor, v: Tensor) -> Tensor:
    """Mean of v^2 over the values of an image (B,): the local form of `l2`."""
    return (v**2).flatten(1).mean(1)


def _build_huber(part: DistancePart, values: int) -> Distance:
    c = huber_constant(part, values)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return pseudo_huber(a, b, c)

    if c > 0:  # a parabola of curvature 1 / c once the difference is far below c
        return Distance(between, lambda f, v: (v**2).flatten(1).sum(1) / (2 * c), lambda f, v: v / c)
    norm = torch.linalg.vector_norm
    return Distance(
        between,
        lambda f, v: norm(v.flatten(1), dim=1),
        lambda f, v: v / norm(v, dim=(1, 2, 3), keepdim=True).clamp_min(1e-12),
    )


def cauchy(a: Tensor, b: Tensor, c: float) -> Tensor:
    """log(1 + |a - b|^2 / (2 c^2)) with the norm of a whole image: outliers pull ever less (Dao et al. 2025)."""
    return torch.log1p(squared_norm(a, b) / (2 * c * c))


def _build_cauchy(part: DistancePart, values: int) -> Distance:
    c = huber_constant(part, values)
    return Distance(
        lambda a, b: cauchy(a, b, c), lambda f, v: squared_norm(v, 0 * v) / (2 * c * c), lambda f, v: v / (c * c)
    )


def haar(x: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the Haar coefficients (B, C * H * W, 1, 1) of images (B, C, H, W), those of each level times its weight.

    The orthonormal transform: differences within 2 x 2 pixels, then within 2 x 2 sums of four, and so on; the sums that
    are left at the end have weight 1. Sides are multiples of 2^levels.
    """
    found = []
    for weight in weights:
        upper, lower = x[..., ::2, :], x[..., 1::2, :]
        both, apart = (upper + lower) / 2, (upper - lower) / 2
        left, right = both[..., ::2], both[..., 1::2]
        x, rest = left + right, [left - right, apart[..., ::2] + apart[..., 1::2], apart[..., ::2] - apart[..., 1::2]]
        found += [weight * part.flatten(1) for part in rest]
    return torch.cat([*found, x.flatten(1)], 1)[..., None, None]


def in_details(distance: Distance, weights: Sequence[float]) -> Distance:
    """Measure a distance of differences in weighted Haar coefficients in place of pixels.

    With weights of 1 nothing changes. Larger ones see grain on flat grounds, which is a small part of the norm of an
    image. The transform is linear: what two images agree on is the same, so consistency means the same.
    """

    def seen(x: Tensor) -> Tensor:
        return haar(x, weights)

    def between(a: Tensor, b: Tensor) -> Tensor:
        apart = seen(a - b)
        return distance.between(apart, torch.zeros_like(apart))

    def pull(f: Tensor, v: Tensor) -> Tensor:
        adjoint = torch.func.vjp(seen, f)[1]
        pulled: Tensor = adjoint(distance.pull(seen(f), seen(v)))[0]
        return pulled

    return Distance(between, lambda f, v: distance.form(seen(f), seen(v)), pull)


# A distance of (part, values of an image); LPIPS joins them in `assemble`.
BUILDERS: dict[str, Callable[[DistancePart, int], Distance]] = {
    "l2": lambda part, values: Distance(l2, mean_square, lambda f, v: 2 * v / values),
    "l1": lambda part, values: Distance(l1, lambda f, v: v.abs().flatten(1).mean(1), lambda f, v: v.sign() / values),
    "squared_norm": lambda part, values: Distance(
        squared_norm, lambda f, v: squared_norm(v, 0 * v), lambda f, v: 2 * v
    ),
    "pseudo_huber": _build_huber,
    "cauchy": _build_cauchy,
}
