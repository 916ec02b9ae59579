"""Exponents: straight lines through logarithms, with the standard error of the slope."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cmtool.errors import UserError


@dataclass(frozen=True)
class Fit:
    """y ~ factor x^exponent over `points` points; `error` is the exponent's standard error from the residuals.

    The points here are exact, so `error` measures curvature, not noise: how far the law is from a pure power.
    `theorem` is what the proof gives for the same exponent, None where it says nothing.
    """

    name: str
    exponent: float
    error: float
    factor: float
    points: int
    theorem: float | None = None


def power_law(name: str, x: ArrayLike, y: ArrayLike, theorem: float | None = None) -> Fit:
    """Least squares of log y on log x.

    Raises:
        UserError: with fewer than two different x, or values that have no logarithm.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(np.unique(x)) < 2 or (x <= 0).any() or (y <= 0).any():
        raise UserError(
            f"{name}: an exponent needs positive values at two or more different places, not at {x.tolist()}"
        )
    log_x, log_y = np.log(x), np.log(y)
    center = log_x - log_x.mean()
    slope = float(center @ log_y / (center @ center))
    residual = log_y - log_y.mean() - slope * center
    error = float(np.sqrt(residual @ residual / (len(x) - 2) / (center @ center))) if len(x) > 2 else float("nan")
    return Fit(name, slope, error, float(np.exp(log_y.mean() - slope * log_x.mean())), len(x), theorem)


def local_slopes(x: ArrayLike, y: ArrayLike) -> list[float]:
    """Slopes between neighbors on log-log axes, one fewer than there are points."""
    return [float(value) for value in np.diff(np.log(np.asarray(y, float))) / np.diff(np.log(np.asarray(x, float)))]


def log_ratio(counts: ArrayLike) -> np.ndarray:
    """T / log T: against it the theorem's schedule shows a clean exponent, its step being c1 log T / T."""
    counts = np.asarray(counts, float)
    return counts / np.log(counts)
