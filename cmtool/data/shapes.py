"""Procedural RGB pictures: one shape on a two-color ground, exactly reproducible from an index at any resolution.

Every attribute is an integer hash of the index, and every pixel comes from additions, products, comparisons and one
square root, so an index gives the same picture on every machine. The label is the shape. The palette is small, and
shapes do not rotate and vary little in size, so that a network can learn them in minutes on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "plus")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 50, 50),
    "orange": (250, 145, 30),
    "yellow": (250, 225, 60),
    "green": (70, 200, 80),
    "cyan": (70, 215, 225),
    "blue": (80, 130, 250),
    "pink": (240, 110, 200),
    "white": (245, 245, 245),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "navy": (20, 25, 75),
    "forest": (15, 65, 35),
    "maroon": (80, 15, 30),
    "slate": (65, 70, 80),
}
HELD_OUT = 1 << 40  # first index of the held-out pictures; training uses 0, 1, 2, ...
_COLUMNS = 8  # hashed numbers per picture
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 512


def hashed_uniforms(start: int, count: int, columns: int, salt: int = 0) -> NDArray[np.float64]:
    """Return (count, columns) numbers in [0, 1), row i a function only of index start + i and `salt`.

    Uses SplitMix64 (Steele, Lea, Flood 2014): integer arithmetic, the same on every machine.
    """
    place = np.arange(start * columns + 1, (start + count) * columns + 1, dtype=np.uint64).reshape(count, columns)
    with np.errstate(over="ignore"):
        z = place * _GOLDEN
        z = z ^ (np.uint64(salt) * np.uint64(0xD1342543DE82EF95))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class ShapeAttributes:
    """What a picture shows. Lengths are fractions of the side, and y points down."""

    shape: str
    color: str
    upper: str
    lower: str
    x: float
    y: float
    radius: float
    horizon: float


def _choices(u: NDArray[np.float64]) -> dict[str, NDArray[np.int64]]:
    """Turn hashed numbers into attribute indices. The two halves of the ground always differ in color."""
    upper = (u[:, 2] * len(GROUNDS)).astype(np.int64)
    lower = (upper + 1 + (u[:, 3] * (len(GROUNDS) - 1)).astype(np.int64)) % len(GROUNDS)
    shape = (u[:, 0] * len(SHAPES)).astype(np.int64)
    return {"shape": shape, "color": (u[:, 1] * len(COLORS)).astype(np.int64), "upper": upper, "lower": lower}


def _places(u: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {
        "x": 0.42 + 0.16 * u[:, 4],
        "y": 0.42 + 0.16 * u[:, 5],
        "radius": 0.28 + 0.05 * u[:, 6],
        "horizon": 0.42 + 0.16 * u[:, 7],
    }


def shapes_attributes(index: int) -> ShapeAttributes:
    """Return what picture `index` shows."""
    u = hashed_uniforms(index, 1, _COLUMNS)
    chosen, placed = _choices(u), _places(u)
    return ShapeAttributes(
        SHAPES[int(chosen["shape"][0])],
        list(COLORS)[int(chosen["color"][0])],
        list(GROUNDS)[int(chosen["upper"][0])],
        list(GROUNDS)[int(chosen["lower"][0])],
        **{key: float(value[0]) for key, value in placed.items()},
    )


def _distance(
    shape: int, x: NDArray[np.float64], y: NDArray[np.float64], r: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return something like a signed distance to a shape at the origin: negative inside, in fractions of the side."""
    if shape == 0:
        return np.sqrt(x * x + y * y) - r
    if shape == 1:
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r
    if shape == 2:  # an upright triangle: its base, and two flanks of slope 2
        flank = (2.0 * np.abs(x) - (y + 1.05 * r)) * 0.4472135954999579
        return np.maximum(y - 0.85 * r, flank)
    arm = 0.36 * r
    bar = np.maximum(np.abs(x) - r, np.abs(y) - arm)
    post = np.maximum(np.abs(x) - arm, np.abs(y) - r)
    return np.minimum(bar, post)


def _draw(start: int, count: int, resolution: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    u = hashed_uniforms(start, count, _COLUMNS)
    chosen = _choices(u)
    place = {key: value[:, None, None] for key, value in _places(u).items()}
    centers = (np.arange(resolution, dtype=np.float64) + 0.5) / resolution
    y, x = np.broadcast_to(centers[:, None], (resolution, resolution)), np.broadcast_to(centers, (resolution,) * 2)
    inside = np.empty((count, resolution, resolution))
    for shape in range(len(SHAPES)):
        rows = chosen["shape"] == shape
        field = _distance(shape, x - place["x"][rows], y - place["y"][rows], place["radius"][rows])
        inside[rows] = np.clip(0.5 - field * resolution, 0.0, 1.0)
    below = np.clip(0.5 + (y - place["horizon"]) * resolution, 0.0, 1.0)[:, None]
    colors, grounds = np.array(list(COLORS.values()), float), np.array(list(GROUNDS.values()), float)
    upper, lower = grounds[chosen["upper"]][:, :, None, None], grounds[chosen["lower"]][:, :, None, None]
    ground = upper + (lower - upper) * below
    pixels = ground + (colors[chosen["color"]][:, :, None, None] - ground) * inside[:, None]
    return np.floor(pixels + 0.5).astype(np.uint8), chosen["shape"]


def shapes_images(start: int, count: int, resolution: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw pictures start .. start + count - 1.

    Returns:
        uint8 (count, 3, resolution, resolution) and int64 labels (count,), indices into `SHAPES`.
    """
    images = np.empty((count, 3, resolution, resolution), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for first in range(0, count, _BLOCK):
        size = min(_BLOCK, count - first)
        images[first : first + size], labels[first : first + size] = _draw(start + first, size, resolution)
    return images, labels
