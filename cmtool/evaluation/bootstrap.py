"""How certain a metric is: intervals from resampled images, and two sample sets compared on the same resamples.

A resample holds fewer distinct images than the set it is drawn from, so its Frechet distance is larger, by the same
amount on both sides of a comparison. An interval is therefore the spread of the resampled values around their own mean,
centered on the measured value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cmtool.errors import UsageError
from cmtool.evaluation.frechet import covariance_factor, frechet_to_fit
from cmtool.evaluation.statistics import Array, Statistics

LEVEL = 0.95
Statistic = Callable[[Array], float]  # rows (int64) -> value


class Interval(NamedTuple):
    """A value and the two ends of its interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """The difference second - first of one figure with its interval; distinguishable if the interval excludes 0."""

    metric: str
    difference: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes a difference of zero."""
        return self.low > 0 or self.high < 0


def interval(
    statistic: Statistic,
    count: int,
    rounds: int,
    seed: int = 0,
    level: float = LEVEL,
    possible: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Return the interval of `statistic` over resamples of `count` rows with replacement, clipped to `possible` values.

    Raises:
        UsageError: for fewer than 20 rounds, too few for the ends of an interval.
    """
    if rounds < 20:
        raise UsageError(f"--bootstrap {rounds} is too few for an interval; use at least 20.")
    value = statistic(np.arange(count))
    draws = np.array([statistic(rows) for rows in resamples(count, rounds, seed)])
    low, high = np.quantile(draws - draws.mean(), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, max(value + float(low), possible[0]), min(value + float(high), possible[1]))


def resamples(count: int, rounds: int, seed: int) -> list[Array]:
    """Return the row indices of `rounds` resamples; the same seed gives every statistic the same resamples."""
    random = np.random.default_rng(seed)
    return [random.integers(count, size=count) for _ in range(rounds)]


def frechet_statistic(features: Array, fit: Statistics, factor: Array | None = None) -> Statistic:
    """Return a function from rows to the Frechet distance between those rows of `features` (N, D) and `fit`.

    `factor` is a factor of the covariance of `fit`, if the caller already has one.
    """
    fixed = covariance_factor(fit.covariance) if factor is None else factor

    def value(rows: Array) -> float:
        return frechet_to_fit(features[rows], fit, fixed)

    return value


def share_statistic(inside: Array) -> Statistic:
    """Return a function from rows to the share of them for which `inside` (N,) is true: precision, for example."""

    def value(rows: Array) -> float:
        return float(inside[rows].mean())

    return value


def compare(
    metric: str,
    first: Statistic,
    second: Statistic,
    counts: tuple[int, int],
    paired: bool,
    rounds: int = 200,
    seed: int = 0,
) -> Comparison:
    """Compare one metric of two sample sets.

    Args:
        metric: its name.
        first: statistic of the first set.
        second: statistic of the second set.
        counts: images in each.
        paired: whether sample i of both sets comes from the same seed; both are then resampled with the same rows.
        rounds: resamples.
        seed: of the resamples.
    """
    base = second(np.arange(counts[1])) - first(np.arange(counts[0]))
    rows = resamples(counts[0], rounds, seed)
    others = rows if paired and counts[0] == counts[1] else resamples(counts[1], rounds, seed + 1)
    draws = np.array([second(b) - first(a) for a, b in zip(rows, others, strict=True)])
    low, high = np.quantile(draws - draws.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Comparison(metric, float(base), float(base + low), float(base + high))
