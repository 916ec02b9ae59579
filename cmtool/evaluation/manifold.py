"""Precision, recall, density and coverage from nearest neighbors, in bounded memory.

Improved precision and recall (Kynkaanniemi et al. 2019): a ball around every point of a set reaches to its k-th nearest
neighbor in that set; precision is the share of generated points inside some reference ball, recall the share of
reference points inside some generated ball (both with <=). Density and coverage (Naeem et al. 2020) use < instead.

Distances come from float32 matrix products in blocks. Wherever such a distance is too close to a radius to tell, the
pair is measured again in float64 from the difference of the two points: the answers are those of the exact definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array, require_finite

ROWS, COLUMNS = 2048, 8192
SLACK = 4e-6  # bound of the float32 product's error, in units of |a|^2 + |b|^2 (measured: below 1e-6 at 2,048 features)
SPARE = 8  # neighbors kept beyond k, so that rounding cannot push out a true one


@dataclass(frozen=True)
class Points:
    """Features in two precisions around a common origin: `exact` (n, D) float64 or float32 and `fast` float32."""

    exact: Tensor
    fast: Tensor = field(repr=False)
    square: Tensor = field(repr=False)

    @classmethod
    def around(cls, features: Array, origin: Array) -> Points:
        """Move `features` (n, D) by -`origin`: float32 products lose digits to a large common offset."""
        exact = torch.from_numpy(np.ascontiguousarray(features))
        fast = torch.empty(exact.shape, dtype=torch.float32)
        shift = torch.from_numpy(origin)
        for start in range(0, len(exact), ROWS):
            fast[start : start + ROWS] = exact[start : start + ROWS].double() - shift
        return cls(exact, fast, fast.square().sum(dim=1))


class Manifold(NamedTuple):
    """The four figures, and which generated points lie inside the reference (m,), whose mean is the precision."""

    precision: float
    recall: float
    density: float
    coverage: float
    inside: Array

    def figures(self) -> dict[str, float]:
        """The four figures by name."""
        return {name: getattr(self, name) for name in ("precision", "recall", "density", "coverage")}


def manifold(reference: Array, generated: Array, k: int = 3, k_density: int = 5) -> Manifold:
    """Precision, recall (neighborhood `k`), density and coverage (`k_density`) of features (n, D) against (m, D).

    Raises `DataError` where a set has no more points than the neighborhood needs, or holds non-finite values.
    """
    largest = max(k, k_density)
    for holder, features in (("the reference holds", reference), ("the samples hold", generated)):
        require_finite(features)
        if len(features) <= largest:
            raise DataError(
                f"precision and recall with neighborhoods of {largest} need more than {largest} images a side; "
                f"{holder} {len(features)}."
            )
    origin = reference.mean(axis=0, dtype=np.float64)
    real, fake = Points.around(reference, origin), Points.around(generated, origin)
    real_radii, fake_radii = radii(real, (k, k_density)), radii(fake, (k,))
    return _membership(real, fake, real_radii[0], real_radii[1], fake_radii[0], k_density)


def radii(points: Points, ks: tuple[int, ...]) -> list[Tensor]:
    """Squared distance (n,) float64 of every point to its k-th nearest neighbor in its own set, for each of `ks`."""
    nearest = _nearest_indices(points, min(max(ks) + 1 + SPARE, len(points.exact)))
    found = [torch.empty(len(points.exact), dtype=torch.float64) for _ in ks]
    for start in range(0, len(points.exact), ROWS):
        rows = slice(start, start + ROWS)
        ranked = _exact_squares(points.exact[rows], points.exact, nearest[rows]).sort(dim=1).values
        for k, out in zip(ks, found, strict=True):
            out[rows] = ranked[:, k]
    return found


def _nearest_indices(points: Points, keep: int) -> Tensor:
    """Indices (n, keep) of the nearest points of the same set by fast distances; every pair is multiplied once."""
    count = len(points.fast)
    value = torch.full((count, keep), torch.inf)
    index = torch.zeros((count, keep), dtype=torch.int64)
    for start in range(0, count, ROWS):
        end = min(start + ROWS, count)
        for column, block in _blocks(points, slice(start, end), points, start):
            _keep_nearest(value[start:end], index[start:end], block, column)
            # The columns below the diagonal block see these rows from their own side.
            past = max(end - column, 0)
            below = slice(column + past, column + block.shape[1])
            if below.stop > below.start:
                _keep_nearest(value[below], index[below], block[:, past:].T.contiguous(), start)
    return index


def _keep_nearest(value: Tensor, index: Tensor, block: Tensor, first: int) -> None:
    """Merge a block (b, c) of distances to the points from `first` on into the best so far, in place."""
    keep = value.shape[1]
    near, place = block.topk(min(keep, block.shape[1]), dim=1, largest=False)
    both, where = torch.cat((value, near), 1), torch.cat((index, place + first), 1)
    best, chosen = both.topk(keep, dim=1, largest=False)
    value.copy_(best)
    index.copy_(where.gather(1, chosen))


def _blocks(left: Points, rows: slice, right: Points, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yield (column, fast squared distances (b, c)) for the rows of `left` against `right` from `first` on."""
    a, a_square = left.fast[rows], left.square[rows, None]
    for start in range(first, len(right.fast), COLUMNS):
        b = right.fast[start : start + COLUMNS]
        distance = torch.addmm(right.square[None, start : start + COLUMNS], a, b.T, alpha=-2.0)
        yield start, distance.add_(a_square)


def _exact_squares(rows: Tensor, others: Tensor, index: Tensor) -> Tensor:
    """Squared distances (b, m) float64 between each of `rows` (b, D) and the `others` named by `index` (b, m)."""
    result = torch.empty(index.shape, dtype=torch.float64)
    for column in range(index.shape[1]):
        result[:, column] = (rows.double() - others[index[:, column]].double()).square().sum(dim=1)
    return result


def _membership(
    real: Points, fake: Points, real_radius: Tensor, wide_radius: Tensor, fake_radius: Tensor, k_density: int
) -> Manifold:
    n, m = len(real.exact), len(fake.exact)
    fake_inside, real_inside, covered = (torch.zeros(size, dtype=torch.bool) for size in (m, n, n))
    density = 0
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        for column, block in _blocks(real, rows, fake):
            columns = slice(column, column + COLUMNS)
            slack = SLACK * (real.square[rows, None] + fake.square[columns].max())
            test = _Test(real.exact[rows], fake.exact[columns], block, slack)
            fake_inside[columns] |= test.within(real_radius[rows, None]).any(dim=0)
            real_inside[rows] |= test.within(fake_radius[None, columns]).any(dim=1)
            strict = test.within(wide_radius[rows, None], strict=True)
            density += int(strict.sum())
            covered[rows] |= strict.any(dim=1)
    shares = (float(mask.double().mean()) for mask in (fake_inside, real_inside, covered))
    precision, recall, coverage = shares
    return Manifold(precision, recall, density / (k_density * m), coverage, fake_inside.numpy())


@dataclass
class _Test:
    """One block of fast distances that can say, exactly, which pairs lie within given radii."""

    left: Tensor
    right: Tensor
    block: Tensor
    slack: Tensor

    def within(self, radius: Tensor, strict: bool = False) -> Tensor:
        """Mask (b, c) of pairs with squared distance <= `radius` (or < it), a float64 that broadcasts."""
        gap = self.block - radius.float()
        inside = gap < 0
        # float32 rounding of the radius itself is covered by its share of the slack.
        near = gap.abs() <= self.slack + 1e-6 * radius.float()
        row, column = near.nonzero(as_tuple=True)
        full = radius.expand(self.block.shape)
        for start in range(0, len(row), ROWS):
            r, c = row[start : start + ROWS], column[start : start + ROWS]
            exact = (self.left[r].double() - self.right[c].double()).square().sum(dim=1)
            inside[r, c] = exact < full[r, c] if strict else exact <= full[r, c]
        return inside
