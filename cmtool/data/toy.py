"""Two-dimensional mixtures as (2, 1, 1) "images": float data for theory and for runs that take a minute.

Point i of a kind depends only on i. All kinds have mean 0 and a standard deviation of about 0.5 per coordinate (EDM's
sigma_data), and stay inside [-1, 1] except for the tails of Gaussians. The label is the mode or branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cmtool.data.shapes import HELD_OUT, hashed_uniforms
from cmtool.errors import DataError, unknown

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

__all__ = ["HELD_OUT", "KINDS", "RING_NOISE", "RING_RADIUS", "toy2d_classes", "toy2d_points"]

RING_RADIUS = 0.7  # of the eight modes of "gaussians8": variance 0.7^2 / 2 + 0.06^2 = 0.2486 per coordinate
RING_NOISE = 0.06  # standard deviation of each of its modes
_SPIRAL_TURNS = 1.5
_SALT = 2  # makes the points independent of the procedural pictures, which hash with salt 0


def _normals(u: Floats) -> Floats:
    """Two standard normals per row from two uniforms (Box and Muller 1958)."""
    radius = np.sqrt(-2.0 * np.log1p(-u[:, 0]))
    return np.stack([radius * np.cos(2 * math.pi * u[:, 1]), radius * np.sin(2 * math.pi * u[:, 1])], axis=1)


def _pick(u: Floats, count: int) -> Labels:
    return (u * count).astype(np.int64)


def _gaussians8(u: Floats) -> tuple[Floats, Labels]:
    label = _pick(u[:, 0], 8)
    angle = label * (math.pi / 4)
    centers = RING_RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centers + RING_NOISE * _normals(u[:, 1:3]), label


def _gaussians25(u: Floats) -> tuple[Floats, Labels]:
    label = _pick(u[:, 0], 25)
    centers = 0.35 * (np.stack([label % 5, label // 5], axis=1) - 2.0)
    return centers + 0.04 * _normals(u[:, 1:3]), label


def _gaussian(u: Floats) -> tuple[Floats, Labels]:
    return 0.5 * _normals(u[:, 1:3]), np.zeros(len(u), dtype=np.int64)


def _two_moons(u: Floats) -> tuple[Floats, Labels]:
    label = _pick(u[:, 0], 2)
    angle = math.pi * u[:, 3]
    sign = 1.0 - 2.0 * label
    moons = np.stack([sign * (np.cos(angle) - 0.5), sign * (np.sin(angle) - 0.25)], axis=1)
    return 0.6 * moons + 0.03 * _normals(u[:, 1:3]), label


def _checkerboard(u: Floats) -> tuple[Floats, Labels]:
    label = _pick(u[:, 0], 8)
    row, half = label // 2, label % 2
    column = 2 * half + row % 2
    corner = np.stack([column, row], axis=1) * 0.43 - 0.86
    return corner + 0.43 * u[:, 1:3], label


def _spiral(u: Floats) -> tuple[Floats, Labels]:
    label = _pick(u[:, 0], 2)
    radius = 0.25 + 0.7 * u[:, 3]
    angle = 2 * math.pi * _SPIRAL_TURNS * u[:, 3] + math.pi * label
    arms = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return arms + 0.02 * _normals(u[:, 1:3]), label


def _rings(u: Floats) -> tuple[Floats, Labels]:
    label = _pick(u[:, 0], 2)
    radius, angle = np.where(label == 0, 0.4, 0.9), 2 * math.pi * u[:, 3]
    circles = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return circles + 0.03 * _normals(u[:, 1:3]), label


def _dirac2(u: Floats) -> tuple[Floats, Labels]:
    label = _pick(u[:, 0], 2)
    return np.repeat((label - 0.5)[:, None], 2, axis=1), label


KINDS: dict[str, tuple[Callable[[Floats], tuple[Floats, Labels]], int]] = {
    "gaussians8": (_gaussians8, 8),
    "gaussians25": (_gaussians25, 25),
    "gaussian": (_gaussian, 1),
    "two_moons": (_two_moons, 2),
    "checkerboard": (_checkerboard, 8),
    "spiral": (_spiral, 2),
    "rings": (_rings, 2),
    "dirac2": (_dirac2, 2),
}


def _kind(kind: str) -> tuple[Callable[[Floats], tuple[Floats, Labels]], int]:
    if kind not in KINDS:
        raise DataError(unknown("mixture of toy2d", kind, KINDS))
    return KINDS[kind]


def toy2d_classes(kind: str) -> int:
    """Return how many modes or branches (labels) a mixture has."""
    return _kind(kind)[1]


def toy2d_points(kind: str, start: int, count: int) -> tuple[NDArray[np.float32], Labels]:
    """Return points start .. start + count - 1 of a mixture: float32 (count, 2, 1, 1), int64 labels (count,).

    Training uses indices 0, 1, 2, ...; `HELD_OUT` and above are for evaluation.

    Raises:
        DataError: no such mixture.
    """
    points, labels = _kind(kind)[0](hashed_uniforms(start, count, 4, salt=_SALT))
    return points.astype(np.float32).reshape(count, 2, 1, 1), labels
