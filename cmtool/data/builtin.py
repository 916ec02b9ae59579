"""Data sets that come along: scikit-learn's digits, pixel-art faces, drawn shapes, and mixtures in the plane."""

from __future__ import annotations

import lzma
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmtool.config.schema import DataConfig
from cmtool.data.dataset import Dataset, from_tensors
from cmtool.data.shapes import HELD_OUT, SHAPES, shapes_images
from cmtool.data.toy import toy2d_classes, toy2d_points
from cmtool.errors import DataError, unknown
from cmtool.rng import derive

PARTS = ("train", "heldout")
SHAPES_SIZE = 5000
TOY_SIZE = 10_000
# 12,000 faces, uint8 (N, 16, 16, 3): the design "Pixel Art" by DiceBear (dicebear.com), CC0 1.0. Drawn by
# benchmarks/make_avatars.mjs from the seeds s0, s1, ...; packed by benchmarks/pack_avatars.py.
AVATARS = Path(__file__).with_name("avatars16.npy.xz")
AVATARS_SIDE, AVATARS_TRAIN = 16, 8000


@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the 1,797 scans; a value v in 0..16 becomes round(v * 255 / 16), where only v = 8 is a tie (to 128)."""
    from sklearn.datasets import load_digits

    table = load_digits()
    pixels = np.floor(table.images * (255 / 16) + 0.5).astype(np.uint8)
    return pixels, table.target.astype(np.int64)


def _enlarged(pixels: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """Enlarge (N, 8, 8) bytes with Pillow's bicubic filter, whose integer arithmetic is the same everywhere."""
    side = (resolution, resolution)
    rows = [np.asarray(Image.fromarray(row).resize(side, Image.Resampling.BICUBIC)) for row in pixels]
    return np.stack(rows)


def _channels(images: Tensor, channels: int, source: str) -> Tensor:
    """Repeat a gray plane three times if RGB is wanted."""
    if channels not in (1, 3):
        raise DataError(f"{source} has 1 or 3 channels, not {channels}.", "set data.channels to 1 or 3")
    return images.expand(-1, channels, -1, -1).contiguous() if channels == 3 else images


def _part(kind: str | None, source: str) -> str | None:
    if kind not in (None, *PARTS):
        raise DataError(unknown(f"part of {source}", str(kind), PARTS))
    return kind


def _finish(
    images: Tensor, labels: Tensor | None, cfg: DataConfig, names: tuple[str, ...] | None, classes: int
) -> Dataset:
    kept = labels if cfg.labels else None
    return from_tensors(images, kept, cfg.source, names if cfg.labels else None, classes if cfg.labels else None)


def split_indices(size: int, fraction: float = 0.8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split range(size) at random into two sorted, disjoint parts, the first with `fraction` of it.

    Train on one part, then ask whether samples lie nearer to it than to the other: that would be copying.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(derive(seed, "split", size)))
    cut = round(size * fraction)
    return order[:cut].sort().values, order[cut:].sort().values


def load_digits(cfg: DataConfig) -> Dataset:
    """Load scikit-learn's 1,797 real 8 x 8 digits, enlarged if a larger resolution is requested.

    The kinds "train" and "heldout" take 80 % and 20 % of them (see `split_indices`), to test for copying.
    """
    if cfg.resolution < 8:
        raise DataError(
            f"digits are 8 pixels wide and are not shrunk to {cfg.resolution}.", "use --set data.resolution=8"
        )
    pixels, target = _digits()
    grown = pixels if cfg.resolution == 8 else _enlarged(pixels, cfg.resolution)
    images, labels = torch.from_numpy(grown)[:, None].clone(), torch.from_numpy(target)
    part = _part(cfg.kind, "digits")
    if part:
        rows = split_indices(len(images))[PARTS.index(part)]
        images, labels = images[rows], labels[rows]
    images, labels = images[: cfg.size], labels[: cfg.size]
    return _finish(_channels(images, cfg.channels, "digits"), labels, cfg, tuple("0123456789"), 10)


def load_shapes(cfg: DataConfig) -> Dataset:
    """Draw `size` procedural pictures (5,000 unless told); `kind` "heldout" draws from a disjoint range of indices."""
    if cfg.channels != 3:
        raise DataError(f"shapes are RGB: data.channels must be 3, not {cfg.channels}.")
    start = HELD_OUT if _part(cfg.kind, "shapes") == "heldout" else 0
    images, labels = shapes_images(start, cfg.size or SHAPES_SIZE, cfg.resolution)
    return _finish(torch.from_numpy(images), torch.from_numpy(labels), cfg, SHAPES, len(SHAPES))


@lru_cache(maxsize=1)
def _avatars() -> NDArray[np.uint8]:
    """Return all faces, (N, 16, 16, 3)."""
    with lzma.open(AVATARS) as stream:
        pixels: NDArray[np.uint8] = np.load(stream, allow_pickle=False)
    return pixels


def load_avatars(cfg: DataConfig) -> Dataset:
    """Load pixel-art faces: the first 8,000, or with the kind "heldout" the other 4,000; they have no labels.

    A pixel becomes a square of pixels where a multiple of 16 is asked for.
    """
    if cfg.channels != 3:
        raise DataError(f"avatars are RGB: data.channels must be 3, not {cfg.channels}.")
    if cfg.resolution % AVATARS_SIDE:
        raise DataError(
            f"avatars are {AVATARS_SIDE} pixels wide or a multiple of it, not {cfg.resolution}.",
            f"use --set data.resolution={AVATARS_SIDE}",
        )
    held_out = _part(cfg.kind, "avatars") == "heldout"
    rows = _avatars()[AVATARS_TRAIN:] if held_out else _avatars()[:AVATARS_TRAIN]
    images = torch.from_numpy(rows[: cfg.size]).permute(0, 3, 1, 2)
    factor = cfg.resolution // AVATARS_SIDE
    grown = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return _finish(grown.contiguous(), None, cfg, None, 0)


def load_toy2d(cfg: DataConfig) -> Dataset:
    """Draw `size` points (10,000 unless told) of the mixture `kind` ("gaussians8" unless told) as (2, 1, 1) floats."""
    if cfg.channels != 2 or cfg.resolution != 1:
        raise DataError(
            f"toy2d points have 2 channels and resolution 1, not {cfg.channels} and {cfg.resolution}.",
            "set data.channels = 2 and data.resolution = 1",
        )
    kind = cfg.kind or "gaussians8"
    points, labels = toy2d_points(kind, 0, cfg.size or TOY_SIZE)
    return _finish(torch.from_numpy(points), torch.from_numpy(labels), cfg, None, toy2d_classes(kind))


BUILTIN = {"digits": load_digits, "avatars": load_avatars, "shapes": load_shapes, "toy2d": load_toy2d}
