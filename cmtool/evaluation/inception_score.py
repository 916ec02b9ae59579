"""Inception Score: exp of the mean divergence between each image's class distribution and their average.

Salimans et al. 2016. The published figures cut the samples into blocks and average the blocks' scores: ADM's evaluator
takes consecutive blocks of 5,000 (a short last one counts as a block), others ten equal ones.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array, require_finite

BLOCK = 5000


class Score(NamedTuple):
    """Mean and standard deviation over blocks (None of a single block, which has no spread), and the blocks' scores."""

    mean: float
    std: float | None
    blocks: tuple[float, ...]


def inception_score(probabilities: Array, block: int = BLOCK, splits: int | None = None) -> Score:
    """Inception Score of class probabilities (N, classes), rows summing to 1, in float64.

    Args:
        probabilities: p(class | image).
        block: images in a block, in order; the last may be shorter.
        splits: a number of equal blocks instead.

    Raises:
        DataError: for no images, or values that are not finite.
    """
    count = len(probabilities)
    if not count:
        raise DataError("the Inception Score of no images does not exist.")
    require_finite(probabilities)
    edges = [i * count // splits for i in range(splits + 1)] if splits else [*range(0, count, block), count]
    scores = [_block_score(probabilities[a:b]) for a, b in pairwise(edges) if b > a]
    return Score(float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None, tuple(scores))


def _block_score(block: Array) -> float:
    p = block.astype(np.float64)
    average = p.mean(axis=0)
    # p log p -> 0 where p is 0, which a float32 softmax does reach.
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    average_log = np.log(average, where=average > 0, out=np.zeros_like(average))
    return float(np.exp((p * (logs - average_log)).sum(axis=1).mean()))
