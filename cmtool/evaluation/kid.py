"""Kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel (Binkowski et al. 2018).

k(x, y) = (x.y / D + 1)^3. The published number is the mean over 100 random subsets of 1,000 images from each side.
The subsets are drawn as torch-fidelity draws them (NumPy's legacy generator, seed 2020), so that both agree in every
digit. The estimator is unbiased, so it can be negative. A set is at distance 0 from itself, which needs no estimate.

The spread over subsets means something only if a subset is smaller than both sets: subsets that hold a whole set are
all equal, and their spread is rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from cmtool.errors import DataError
from cmtool.evaluation.frechet import ROUNDING
from cmtool.evaluation.statistics import Array, require_finite

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


# Rows that differ by less than this, in units of the features' root mean square, differ only by float32 rounding.
SAME = 1e-6


class KernelDistance(NamedTuple):
    """Mean over subsets, standard deviation over subsets (None where they hold a whole set), images in a subset."""

    mean: float
    std: float | None
    subset: int


def kernel_distance(
    generated: Array, reference: Array, draws: Iterable[tuple[Array, Array]] | None = None, subsets: int = SUBSETS
) -> KernelDistance:
    """Return the kernel distance of features (n, D) and (m, D), in float64.

    Args:
        generated: features of the samples.
        reference: features of the real images.
        draws: pairs of row indices (samples, reference), estimated from whatever they hold; None: `subset_draws` with
            the standard seed.
        subsets: number of subsets when `draws` is None.

    Raises:
        DataError: for fewer than two images on a side, other widths or values that are not finite.
    """
    if generated.shape[1] != reference.shape[1]:
        raise DataError(f"the two sides have {generated.shape[1]} and {reference.shape[1]} features.")
    if min(len(generated), len(reference)) < 2:
        raise DataError("the kernel distance needs at least 2 images on each side.")
    require_finite(generated)
    require_finite(reference)
    size, smaller = subset_size(len(generated), len(reference)), min(len(generated), len(reference))
    if draws is None and same_rows(generated, reference):
        return KernelDistance(0.0, None, size)
    if draws is None and len(generated) == len(reference) == size:
        subsets = 1  # all of them would hold the same two sets
    pairs = draws or subset_draws(len(generated), len(reference), subsets)
    # The distances are small differences of large sums: float64 keeps their digits.
    values = [mmd(generated[a].astype(np.float64), reference[b].astype(np.float64)) for a, b in pairs]
    return KernelDistance(float(np.mean(values)), float(np.std(values)) if size < smaller else None, size)


def same_rows(first: Array, second: Array) -> bool:
    """Whether two sets of features (n, D) hold the same rows, in any order and up to rounding of a feature network."""
    if first.shape != second.shape:
        return False
    near = SAME * float(np.sqrt(np.mean(np.square(second, dtype=np.float64))))
    if np.abs(first.mean(axis=0, dtype=np.float64) - second.mean(axis=0, dtype=np.float64)).max() > near:
        return False
    # Projected on a line, equal rows fall on the same place; a random line keeps different rows apart.
    line = np.random.default_rng(0).standard_normal(first.shape[1])
    rows, others = (features[np.argsort(features @ line, kind="stable")] for features in (first, second))
    return bool(np.abs(rows - others).max() <= near)


def subset_size(n: int, m: int) -> int:
    """Return the number of images in a subset: 1,000, or all of the smaller side."""
    return min(n, m, SUBSET_SIZE)


def subset_draws(n: int, m: int, subsets: int = SUBSETS, seed: int = SEED) -> Iterator[tuple[Array, Array]]:
    """Yield row indices of random subsets (samples, reference), without replacement inside a subset."""
    random, size = np.random.RandomState(seed), subset_size(n, m)
    for _ in range(subsets):
        yield random.choice(n, size, replace=False), random.choice(m, size, replace=False)


def mmd(x: Array, y: Array) -> float:
    """Return the unbiased squared MMD of rows x (n, D) and y (m, D) over all pairs; 0 if only rounding is left."""
    n, m = len(x), len(y)
    kxx, kyy, kxy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within_x = (kxx.sum() - np.trace(kxx)) / (n * (n - 1))
    within_y = (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    across = 2 * kxy.mean()
    value = float(within_x + within_y - across)
    rounding = ROUNDING * (abs(within_x) + abs(within_y) + abs(across))
    return value if abs(value) > rounding else 0.0


def _kernel(x: Array, y: Array) -> Array:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


ROWS = 1024
SIGMA, SCALE = 10.0, 1000.0  # CMMD's width, and the factor that figures are stated with


def gaussian_mmd(first: Array, second: Array, sigma: float = SIGMA, scale: float = SCALE) -> float:
    """Return CMMD (Jayasumana et al. 2024): the squared MMD of features (n, D) and (m, D) under a Gaussian kernel.

    All pairs count, each row with itself too, as in the authors' code: `scale` (mean k(x, x') + mean k(y, y') - 2 mean
    k(x, y)), k = exp(-|x - y|^2 / 2 sigma^2).
    """

    def mean(a: Array, b: Array) -> float:
        total = 0.0
        for start in range(0, len(a), ROWS):
            rows = a[start : start + ROWS].astype(np.float64)
            squares = (rows**2).sum(1)[:, None] + (b.astype(np.float64) ** 2).sum(1) - 2 * rows @ b.T.astype(np.float64)
            total += float(np.exp(-squares / (2 * sigma**2)).sum())
        return total / (len(a) * len(b))

    return scale * (mean(first, first) + mean(second, second) - 2 * mean(first, second))


def kid_notes(kid: KernelDistance, samples: int, reference: int) -> list[str]:
    """Say what the spread over subsets means if it is less than the error of the kernel distance."""
    smaller = min(samples, reference)
    if kid.mean == 0 and kid.std is None and samples == reference:
        return ["samples and reference have the same features: the kernel distance is 0 and no estimate."]
    if kid.std is None:
        return [
            f"every subset of the kernel distance holds all {smaller:,} images of a side, so it is given without an "
            f"error; more than {SUBSET_SIZE:,} images on both sides give one."
        ]
    if smaller < 2 * kid.subset:
        return [
            f"the subsets of the kernel distance share most of {smaller:,} images: the spread shown is less than "
            "its error."
        ]
    return []
