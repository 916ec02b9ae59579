"""Do samples copy training images? Nearest neighbors in features and in pixels.

Where images were held out of training, the share of samples that are nearer to a training image than to any of equally
many held-out ones answers it: a model that has memorized no image gets one half (`nearer_to_training`).

Without held-out images, a sample counts as a copy if it is closer to its nearest training image than that image is to
any other training image (the authenticity test of Alaa et al. 2022). Real images, each left out in turn and judged the
same way, show what share to expect without any copying: compare with that, not with zero (`copies`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array

ROWS = 1024
SIGNIFICANT = 3.0  # standard deviations of chance


class Copies(NamedTuple):
    """The share of copies among samples and among real images (each left out in turn), and the nearest pairs.

    `nearest` (N,) is the nearest training image of each sample and `distance` (N,) how far it is; `ratio` is the
    median of these distances over the median between real images.
    """

    share: float
    expected: float
    ratio: float
    distance: Array
    nearest: Array

    def closest(self, count: int) -> list[tuple[int, int]]:
        """Return (sample, training image) of the closest pairs, the closest first."""
        order = np.argsort(self.distance, kind="stable")[:count]
        return [(int(index), int(self.nearest[index])) for index in order]


class Nearer(NamedTuple):
    """The share of samples nearer to a training image than to a held-out one, and how far chance strays from 1/2."""

    share: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether the share exceeds one half by more than three standard deviations of chance."""
        return self.share > 0.5 + SIGNIFICANT * self.error


def nearer_to_training(samples: Array, training: Array, held_out: Array) -> Nearer:
    """Compare the distances of `samples` (N, D) to the nearest row of `training` and of `held_out`, M each.

    Of the larger set the first M rows count. If the model treats both sets alike, it is a matter of chance which of the
    2 M rows are called training. Over all ways to choose those M, the share has the mean 1/2 and the variance
    (sum c^2 - N^2 / 2M) / 4N^2 * 2M / (2M - 1), where c counts the samples that are nearest to a row: rows that attract
    many samples make it larger than N draws of a coin.

    Raises:
        DataError: a set of fewer than two rows.
    """
    half = min(len(training), len(held_out))
    if half < 2:
        raise DataError(f"copies cannot be judged by {len(training)} training and {len(held_out)} held-out images.")
    rows = torch.from_numpy(np.concatenate([training[:half], held_out[:half]])).double()
    center = rows.mean(dim=0)
    rows -= center
    square = rows.square().sum(dim=1)
    counts, nearer = torch.zeros(len(rows)), 0
    for block in torch.from_numpy(samples).split(ROWS):
        distance = torch.addmm(square[None], block.double() - center, rows.T, alpha=-2.0)  # less |block|^2
        nearer += int((distance[:, :half].amin(dim=1) < distance[:, half:].amin(dim=1)).sum())
        counts += torch.bincount(distance.argmin(dim=1), minlength=len(rows))
    count, total = len(samples), len(rows)
    variance = (float(counts.double().square().sum()) - count**2 / total) / (4 * count**2) * total / (total - 1)
    return Nearer(nearer / count, max(variance, 0.0) ** 0.5)


def copies(samples: Array, real: Array) -> Copies:
    """Judge rows of `samples` (N, D) against training rows `real` (M, D), in features or flat pixels.

    Raises:
        DataError: fewer than three training rows, or rows of different widths.
    """
    if len(real) < 3 or samples.shape[1] != real.shape[1]:
        raise DataError(f"copies cannot be judged: {samples.shape} samples against {real.shape} training images.")
    center = real.mean(axis=0, dtype=np.float64)
    fake_rows = torch.from_numpy((samples - center).astype(np.float32))
    real_rows = torch.from_numpy((real - center).astype(np.float32))
    own, own_index = _nearest(real_rows, real_rows, 2, skip_self=True)
    distance, index = _nearest(fake_rows, real_rows, 1)
    share = (distance[:, 0] < own[index[:, 0], 0]).double().mean()
    expected = _expected(own, own_index)
    ratio = distance[:, 0].median() / own[:, 0].median().clamp_min(1e-12)
    return Copies(float(share), expected, float(ratio), distance[:, 0].numpy(), index[:, 0].numpy())


def _expected(own: Tensor, own_index: Tensor) -> float:
    """Return the share of real images that are closer to their nearest one than that one is to any third."""
    nearest = own_index[:, 0]
    # Of the nearest image's own two neighbors, take the first that is not the image left out.
    back = own_index[nearest] == torch.arange(len(own))[:, None]
    third = torch.where(back[:, 0], own[nearest, 1], own[nearest, 0])
    return float((own[:, 0] < third).double().mean())


def _nearest(rows: Tensor, others: Tensor, count: int, skip_self: bool = False) -> tuple[Tensor, Tensor]:
    """Return distances (n, count) and indices of the nearest `others`, without the row itself if `skip_self`."""
    distances, indices = [], []
    for start in range(0, len(rows), ROWS):
        block = torch.cdist(rows[start : start + ROWS], others)
        if skip_self:
            block[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        value, index = block.topk(count, dim=1, largest=False)
        distances.append(value)
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)
