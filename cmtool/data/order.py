"""Which images a step sees: a function of (seed, step) alone, so that nothing has to be saved to resume."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cmtool.errors import DataError
from cmtool.rng import batch_uniform, derive, generator


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Order of the whole data set in one epoch; a batch may span two epochs, hence the small cache."""
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> Tensor:
    """Return the indices of the global batch of `step`, shape (batch_size,), int64 in [0, size).

    Position p = step * batch_size + i of an endless sequence of shuffled epochs: every image is seen once per epoch,
    batches run across the border of two epochs, and a batch may be larger than the data set.

    Raises:
        DataError: the data set is empty.
    """
    if size < 1:
        raise DataError("the data set is empty: there is nothing to draw batches from.")
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // size, (last - 1) // size + 1):
        begin, end = max(first - epoch * size, 0), min(last - epoch * size, size)
        parts.append(_permutation(seed, epoch, size)[begin:end])
    return torch.cat(parts)


def flip_mask(seed: int, step: int, batch_size: int) -> Tensor:
    """Return which images of the global batch of `step` are mirrored: (batch_size,) bool, each with probability 1/2."""
    return batch_uniform((batch_size,), seed, "flip", step) < 0.5


def split_indices(size: int, fraction: float = 0.8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split range(size) at random into two sorted, disjoint parts, the first with `fraction` of it.

    Used to train on one part and to ask whether samples are nearer to it than to the other (copying).
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(derive(seed, "split", size)))
    cut = round(size * fraction)
    return order[:cut].sort().values, order[cut:].sort().values
