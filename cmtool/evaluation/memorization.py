"""Do samples copy training images? Nearest neighbors in features and in pixels.

A sample counts as a copy if it is closer to its nearest training image than that image is to any other training image
(the authenticity test of Alaa et al. 2022). Real images, each left out in turn and judged the same way, show what share
to expect without any copying: compare with that, not with zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array

ROWS = 1024


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
