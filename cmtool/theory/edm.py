"""Consistency training and distillation on the VE grid of practice: products of factors, and orders of convergence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import UserError
from cmtool.theory import population
from cmtool.theory.laws import LineMixture, parse_law
from cmtool.theory.levels import Levels, karras
from cmtool.theory.study import Curve, Fit, Panel, Study, Table, local_slopes, power_law

Array = NDArray[np.float64]
GMM = "gmm:0.3,0.7;-0.5,0.5;0.2"


def euler_factors(times: Array, std: float) -> Array:
    """Factor of one Euler step t_{n+1} -> t_n on N(0, s^2), (N-1,); consistency training has the same one."""
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


def _w1(law: LineMixture, levels: Levels) -> tuple[float, float, float]:
    f = population.train(law, levels, 1501, 10)[-1]
    maps = (f, population.distill(law, levels), population.distill(law, levels, population.heun_step))
    ct, euler, heun = (population.errors(law, levels, item, "exact")[0] for item in maps)
    return ct, euler, heun


def _fits(counts: list[int], columns: dict[str, list[float]]) -> list[Fit]:
    steps = np.array(counts) - 1.0
    orders = {"CT": -1.0, "CD Euler": -1.0, "CD Heun": -2.0, "Gaussian Euler = CT": -1.0, "Gaussian Heun": -2.0}
    return [
        power_law(f"{name} in N-1, last {min(3, len(counts))}", steps[-3:], values[-3:], orders[name])
        for name, values in columns.items()
    ]


def run(counts: tuple[int, ...] = (10, 18, 36, 72, 144, 288), data: str = GMM, std: float = 0.5) -> Study:
    """Deficits for N(0, s^2) in closed form and W1 for a mixture by splines, start p_T, sigma from .002 to 80.

    Raises:
        UserError: for fewer than two different N, N below 2, or a width that is not positive.
    """
    if len(set(counts)) < 2 or min(counts) < 2:
        raise UserError("an order of convergence needs two or more different N of at least 2", "use --N 18,36,72,144")
    if not std > 0:
        raise UserError(f"the width must be positive, not {std:g}")
    law, count_list = parse_law(data), sorted(set(counts))
    columns: dict[str, list[float]] = {
        name: [] for name in ("CT", "CD Euler", "CD Heun", "Gaussian Euler = CT", "Gaussian Heun")
    }
    for count in count_list:
        levels = karras(count)
        for name, value in zip(columns, (*_w1(law, levels), *deficits(levels, std)), strict=True):
            columns[name].append(value)
    rows = [[count, *[values[i] for values in columns.values()]] for i, count in enumerate(count_list)]
    fits = _fits(count_list, columns)
    slopes = [local_slopes(np.array(count_list) - 1.0, values)[-1] for values in columns.values()]
    findings = [
        f"Exponents between the last two N: distillation Euler {slopes[1]:.2f}, Heun {slopes[2]:.2f}, its solvers' "
        "orders being -1 and -2.",
        f"Training is at {slopes[0]:.2f} there"
        + (
            ": on separated modes it pays a transient that distillation does not."
            if slopes[0] > slopes[1] + 0.03
            else ", as distillation is: these data have no separated modes."
        ),
        "On Gaussian data the two are the same function at every N; the difference needs a curved f.",
    ]
    curves = [Curve(name, count_list, columns[name]) for name in ("CT", "CD Euler", "CD Heun")]
    first = columns["CD Euler"][0]
    law_curve = Curve("1/(N-1)", count_list, [first * (count_list[0] - 1) / (count - 1) for count in count_list], "law")
    return Study(
        "edm",
        "EDM grid: orders of convergence",
        "Do training and distillation converge at the order of their solver?",
        [Table(f"W1 for {data} and relative deficit for N(0, {std:g}^2)", ["N", *columns], rows)],
        fits,
        [Panel("W1 on the Karras grid", "grid points N", "W1", [*curves, law_curve])],
        findings,
        ["Splines and closed forms; start p_T, so that the prior's mismatch does not hide the order."],
        {"data": data, "N": count_list, "s": std},
    )
