"""Means and covariances of features in one pass, in float64 and bounded memory.

All sums are taken relative to the first row (a shift), so that features far from zero lose no digits. Accumulators can
be merged, so that a set can be measured in parts and on several machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import dsyrk

from cmtool.errors import DataError

Array = np.ndarray
CHUNK = 1024


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features: `mean` (D,), unbiased `covariance` (D, D), both float64, and the `count` of rows.

    `count` is 0 if a published file does not say how many images it describes.
    """

    count: int
    mean: Array
    covariance: Array

    @property
    def dim(self) -> int:
        """Number of features D."""
        return int(self.mean.shape[0])


class Moments:
    """Streaming sums of feature rows: `add` batches, `merge` others, `finish` into `Statistics`."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self.shift: Array | None = None
        self.total = np.zeros(dim)
        self.outer = np.zeros((dim, dim), order="F")

    def add(self, features: Array) -> None:
        """Add `features` (n, D) of any float type; raises `DataError` for another width."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise DataError(f"features of shape {features.shape} do not fit statistics of {self.dim} features.")
        for start in range(0, len(features), CHUNK):
            rows = np.asarray(features[start : start + CHUNK], dtype=np.float64)
            if self.shift is None:
                self.shift = rows[0].copy()
            rows = rows - self.shift
            self.total += rows.sum(axis=0)
            # The transposed C-ordered block is already Fortran-ordered, so BLAS updates one triangle without a copy.
            self.outer = dsyrk(1.0, rows.T, beta=1.0, c=self.outer, overwrite_c=1)
            self.count += len(rows)

    def merge(self, other: Moments) -> None:
        """Add the rows that `other` has seen."""
        if other.shift is None:
            return
        if self.shift is None:
            self.shift = other.shift.copy()
        move = other.shift - self.shift
        cross = np.outer(other.total, move)
        self.outer = self.outer + np.triu(other.outer + cross + cross.T + other.count * np.outer(move, move))
        self.total = self.total + other.total + other.count * move
        self.count += other.count

    def finish(self) -> Statistics:
        """Return mean and unbiased covariance (divisor n - 1); raises `DataError` for fewer than two rows."""
        if self.count < 2 or self.shift is None:
            raise DataError(f"a covariance needs at least 2 images; there are {self.count}.")
        upper = np.triu(self.outer)
        full = upper + np.triu(upper, 1).T
        mean = self.total / self.count
        covariance = (full - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Statistics(self.count, mean + self.shift, covariance)


def statistics(features: Array | Iterable[Array]) -> Statistics:
    """Fit `Statistics` to features (n, D) or to an iterable of such batches; refuses values that are not finite."""
    batches = [features] if isinstance(features, np.ndarray) else features
    moments: Moments | None = None
    for batch in batches:
        moments = moments or Moments(batch.shape[1])
        moments.add(batch)
    if moments is None:
        raise DataError("there are no features to take statistics of.")
    result = moments.finish()
    require_finite(result.mean)
    return result


def require_finite(features: Array) -> None:
    """Raise `DataError` if `features` hold NaN or infinity; the sum over all of them shows it."""
    if not np.isfinite(features.sum(dtype=np.float64)):
        raise DataError(
            "the features hold values that are not finite (NaN or infinity).",
            "Look at the images: a diverged model writes NaN, and a feature network in float16 can overflow.",
        )
