"""Gaussian data on VE levels: consistency training, Euler and Heun distillation as products of factors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cmtool.theory.levels import Levels

Array = NDArray[np.float64]


def euler_factors(times: Array, std: float) -> Array:
    """Factor of one Euler step t_{n+1} -> t_n on N(0, s^2), (N-1,); consistency training has the very same one."""
    r, t = times[:-1], times[1:]
    return (std**2 + r * t) / (std**2 + t**2)


def heun_factors(times: Array, std: float) -> Array:
    """Factor of one Heun step, (N-1,)."""
    r, t = times[:-1], times[1:]
    slope = t / (std**2 + t**2) + euler_factors(times, std) * r / (std**2 + r**2)
    return 1 + (r - t) / 2 * slope


def exact_ratio(times: Array, std: float) -> float:
    """The factor of the flow itself, sqrt((s^2 + sigma_min^2) / (s^2 + sigma_max^2))."""
    return float(np.hypot(std, times[0]) / np.hypot(std, times[-1]))


def deficits(levels: Levels, std: float) -> tuple[float, float]:
    """How far Euler (= consistency training) falls short of the flow, and by how much Heun exceeds it, relative."""
    exact = exact_ratio(levels.noise, std)
    euler, heun = np.prod(euler_factors(levels.noise, std)), np.prod(heun_factors(levels.noise, std))
    return float(1 - euler / exact), float(heun / exact - 1)


def consistency(x: float, t: float, mean: float, std: float, sigma_min: float = 0.002) -> float:
    """The exact consistency function of N(mean, std^2): mean + sqrt((s^2 + sigma_min^2) / (s^2 + t^2)) (x - mean)."""
    return mean + float(np.hypot(std, sigma_min) / np.hypot(std, t)) * (x - mean)


def denoise(x: float, t: float, mean: float, std: float) -> float:
    """E[X_0 | X_0 + t Z = x] for N(mean, std^2)."""
    return mean + std**2 / (std**2 + t**2) * (x - mean)


def stage_losses(levels: Levels, std: float) -> Array:
    """Optimal loss of every level, (N-1,): v_1 prod cos^2 before it, times sin^2 of its angle step."""
    steps = np.diff(levels.angles(std))
    before = np.concatenate([[1.0], np.cumprod(np.cos(steps))[:-1]])
    v = (levels.signal[0] * std) ** 2 + levels.noise[0] ** 2
    return v * before**2 * np.sin(steps) ** 2


def joint_gain(angles: Array) -> float:
    """Output sd relative to the flow's when all levels are minimized *together*, without a stop-gradient.

    Minimizes sum_n E|f_{n+1} - f_n|^2 over linear maps with f_1 fixed: a tridiagonal system. On equal angle steps the
    limit is 1 / cosh(Theta), whatever N; with the stop-gradient it is 1.
    """
    from scipy.linalg import solveh_banded

    cos = np.cos(np.diff(angles))
    bands = np.vstack([np.concatenate([[0.0], -cos[1:]]), np.concatenate([np.full(len(cos) - 1, 2.0), [1.0]])])
    right = np.zeros(len(cos))
    right[0] = cos[0]
    return float(solveh_banded(bands, right)[-1])
