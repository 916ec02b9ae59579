"""Noise levels: the theorem's schedule, its rivals, and the VE grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmtool.diffusion.grid import karras_grid
from cmtool.errors import UserError, unknown

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Levels:
    """Levels t = 1..T of X_t = signal_t X_0 + noise_t Z; both arrays (T,), the data end first."""

    name: str
    signal: Array
    noise: Array

    @property
    def count(self) -> int:
        """T, the number of levels."""
        return len(self.signal)

    @property
    def alpha(self) -> Array:
        """The cumulative product alpha_t = signal_t^2, (T,)."""
        return self.signal**2

    def angles(self, std: float | Array) -> Array:
        """theta_t = atan2(b_t, s a_t) in radians, (T,): consistency training on N(., s^2) is a walk in this angle."""
        return np.arctan2(self.noise, std * self.signal)


def from_log_alpha(name: str, log_alpha: Array) -> Levels:
    """VP levels from log alpha_t (T,), < 0 and decreasing; expm1 keeps 1 - alpha exact near the data."""
    return Levels(name, np.exp(log_alpha / 2), np.sqrt(-np.expm1(log_alpha)))


def li_betas(count: int, c0: float = 2.0, c1: float = 4.0) -> tuple[Array, float]:
    """beta_1 = T^-c0, beta_t = h min(beta_1 (1+h)^t, 1) and h = c1 log T / T (Li et al. 2024, Eq. 23).

    Returns:
        The noise variances beta (T,), called "learning rates" in the paper, and h.

    Raises:
        UserError: when T is too small for c1, so that h >= 1 and some beta is no variance.
    """
    if count < 2:
        raise UserError(f"T = {count} is no schedule: at least 2 levels are needed", "try --T 16,32,64")
    step = c1 * np.log(count) / count
    if c0 <= 0 or c1 <= 0:
        raise UserError(f"c0 and c1 must be positive, not {c0:g} and {c1:g}", "the defaults are --c0 2 --c1 4")
    if step >= 1:
        raise UserError(
            f"T = {count} is too small for c1 = {c1:g}: c1 log(T)/T = {step:.3g} must stay below 1 for beta_t < 1",
            f"use T >= {smallest_count(c1)} or a smaller --c1",
        )
    beta = step * np.minimum(count**-c0 * (1 + step) ** np.arange(1, count + 1), 1.0)
    beta[0] = count**-c0
    return beta, step


def smallest_count(c1: float) -> int:
    """The smallest T beyond which c1 log(T)/T < 1 always holds (log(T)/T falls beyond T = e)."""
    low, high = 2, 4
    while c1 * np.log(high) >= high:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if c1 * np.log(middle) >= middle else (low, middle)
    return high


def li(count: int, c0: float = 2.0, c1: float = 4.0) -> Levels:
    """The VP schedule of the theorem; see `li_betas`."""
    return from_log_alpha("li", np.cumsum(np.log1p(-li_betas(count, c0, c1)[0])))


def uniform_angle(count: int, first: float = 0.01, last: float = np.pi / 2 - 0.001) -> Levels:
    """Equal steps of arccos sqrt(alpha) from `first` to `last` (radians): the best schedule for N(0, 1)."""
    theta = np.linspace(first, last, count)
    return Levels("angle", np.cos(theta), np.sin(theta))


def cosine(count: int) -> Levels:
    """Nichol and Dhariwal 2021, Eq. 17: offset .008, beta clipped at .999."""
    edge = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return from_log_alpha("cosine", np.cumsum(np.log1p(-np.clip(1 - edge[1:] / edge[:-1], 0, 0.999))))


def linear(count: int) -> Levels:
    """Ho et al. 2020: beta from 1e-4 to .02 for T = 1000, scaled by 1000/T.

    Raises:
        UserError: for T < 21, where the largest beta reaches 1.
    """
    beta = np.linspace(1e-4, 0.02, count) * (1000.0 / count)
    if beta.max() >= 1:
        raise UserError(
            f"the linear schedule breaks at T = {count}: its largest beta is {beta.max():.3g}, not below 1",
            "use T >= 21 or --schedule li",
        )
    return from_log_alpha("linear", np.cumsum(np.log1p(-beta)))


def karras(count: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Levels:
    """The VE grid of Karras et al. 2022, data end first."""
    noise = np.array(karras_grid(count, sigma_min, sigma_max, rho))
    return Levels("karras", np.ones(count), noise)


def geometric(count: int, low: float, high: float) -> Levels:
    """A VE grid with a constant ratio between neighbors."""
    return Levels("geometric", np.ones(count), np.geomspace(low, high, count))


SCHEDULES: dict[str, Callable[[int], Levels]] = {"li": li, "angle": uniform_angle, "cosine": cosine, "linear": linear}


def build_levels(schedule: str, count: int, c0: float = 2.0, c1: float = 4.0) -> Levels:
    """VP levels by name; c0 and c1 apply only to `li`.

    Raises:
        UserError: for an unknown name, or a T for which the schedule does not exist.
    """
    if schedule not in SCHEDULES:
        raise UserError(unknown("schedule", schedule, SCHEDULES))
    if count < 2:
        raise UserError(f"T = {count} is no schedule: at least 2 levels are needed", "try --T 16,32,64")
    return li(count, c0, c1) if schedule == "li" else SCHEDULES[schedule](count)
