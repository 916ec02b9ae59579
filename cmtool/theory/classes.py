"""Restricted function classes on the line: what eps_F and a finite sample add to the population error, exactly.

Each class is linear in fixed features of the standardized x (polynomials, or one hidden ReLU layer with fixed knots),
so that the best function of the class is a weighted least-squares fit and nothing is left to an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import UserError, unknown
from cmtool.theory import population
from cmtool.theory.distances import absolute_mean, normal_nodes
from cmtool.theory.laws import LineMixture, parse_law, product
from cmtool.theory.levels import Levels, build_levels, li
from cmtool.theory.population import Map, at, conditional_mean, identity, rearranged
from cmtool.theory.study import Curve, Panel, Study, Table

Array = NDArray[np.float64]
FAMILIES = ("poly", "relu", "mlp")
GMM = "gmm:0.3,0.7;-1,1;0.4"
COLUMNS = ["size", "W1", "population", "eps_F", "eps", "population + eps_F + eps", "holds"]


@dataclass(frozen=True)
class ClassResult:
    """W1 of the output, and the sums over the levels of E||f^F - f*|| (eps_class) and E||f - f^F|| (eps_fit)."""

    w1: float
    eps_class: float
    eps_fit: float


def features(u: Array, family: str, size: int) -> Array:
    """Features (n, k) of standardized points u (n,): Hermite polynomials to degree `size`, or 2 + `size` ReLU ramps.

    Raises:
        UserError: for another family.
    """
    if family == "poly":
        return np.asarray(np.polynomial.hermite_e.hermevander(u, size), float)
    if family == "relu":
        ramps = np.maximum(u[:, None] - np.linspace(-3, 3, size), 0)
        return np.concatenate([np.ones((len(u), 1)), u[:, None], ramps], axis=1)
    raise UserError(unknown("function class", family, FAMILIES))


@dataclass(frozen=True)
class _Level:
    """The class at one level: features of x standardized by the moments of X_t."""

    family: str
    size: int
    center: float
    scale: float

    def design(self, x: Array) -> Array:
        return features((np.ravel(x) - self.center) / self.scale, self.family, self.size)

    def function(self, weights: Array) -> Map:
        return lambda x: (self.design(x) @ weights).reshape(np.shape(x))


def _least_squares(design: Array, target: Array) -> Array:
    return np.asarray(np.linalg.lstsq(design, target, rcond=1e-12)[0], float)


def run_class(
    law: LineMixture,
    levels: Levels,
    family: str,
    size: int,
    samples: int | None = None,
    rng: np.random.Generator | None = None,
    start: str = "exact",
    nodes: int = 16,
) -> ClassResult:
    """Sequential training within a class: by exact projection, or on `samples` fresh pairs per level drawn from `rng`.

    Raises:
        UserError: for an unknown family or a size below 1.
    """
    if size < 1:
        raise UserError(f"a function class of size {size} is empty", "use --size 1,3,9")
    z, weight = normal_nodes(7.0, 4001)
    weight = weight / weight.sum()
    root = np.sqrt(weight)
    f: Map = identity
    eps_class = eps_fit = 0.0
    for index in range(1, levels.count):
        a, b = at(levels, index)
        level = _Level(family, size, a * law.mean, float(np.sqrt(a * a * law.variance + b * b)))
        x = law.quantile(z, a, b)
        best = conditional_mean(law, f, x, at(levels, index - 1), (a, b), nodes)
        design = level.design(x)
        weights = _least_squares(design * root[:, None], best * root)
        projected = design @ weights
        eps_class += float(weight @ np.abs(projected - best))
        if samples is not None and rng is not None:
            weights = _fit_on_pairs(law, levels, index, f, level, samples, rng)
            eps_fit += float(weight @ np.abs(design @ weights - projected))
        f = level.function(weights)
    return ClassResult(_output_w1(law, levels, f, z, weight, start), eps_class, eps_fit)


def _fit_on_pairs(
    law: LineMixture, levels: Levels, index: int, f: Map, level: _Level, samples: int, rng: np.random.Generator
) -> Array:
    """Least squares on pairs (x_t, f_{t-1}(x_{t-1})) that share X_0 and Z, as in the paper's training."""
    clean, noise = law.sample(samples, rng), rng.standard_normal(samples)
    (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
    return _least_squares(level.design(a_now * clean + b_now * noise), f(a * clean + b * noise))


def _output_w1(law: LineMixture, levels: Levels, f: Map, z: Array, weight: Array, start: str) -> float:
    x = law.quantile(z, *at(levels, -1)) if start == "exact" else z
    return float(weight @ np.abs(rearranged(f(x), weight) - law.quantile(z, *at(levels, 0))))


def affine_floor(law: LineMixture) -> float:
    """W1 of the law and the normal with its mean and variance: no affine class gets below it as T grows."""
    z, weight = normal_nodes(8.0, 40001)
    normal = law.mean + np.sqrt(law.variance) * z
    return absolute_mean(law.quantile(z, 1.0, 0.0) - normal, z, weight)


def population_w1(law: LineMixture, levels: Levels, f: Callable[[Array], Array], start: str = "exact") -> float:
    """W1 of an unrestricted f on the nodes of `run_class`, so that both errors are discretized in the same way."""
    z, weight = normal_nodes(7.0, 4001)
    return _output_w1(law, levels, f, z, weight / weight.sum(), start)


def _exact_rows(
    law: LineMixture, levels: Levels, family: str, sizes: list[int], samples: int | None, seed: int
) -> list[list[Any]]:
    base = population_w1(law, levels, population.train(law, levels, 2001)[-1])
    rows: list[list[Any]] = []
    for size in sizes:
        rng = np.random.default_rng(seed)
        found = run_class(law, levels, family, size, samples, rng)
        total = base + found.eps_class + found.eps_fit
        rows.append([size, found.w1, base, found.eps_class, found.eps_fit, total, bool(found.w1 <= total + 1e-9)])
    return rows


def _trained_rows(law: LineMixture, levels: Levels, widths: list[int], steps: int, seed: int) -> list[list[Any]]:
    """Networks of these widths on two copies of the law; eps_F and eps cannot be told apart and are given as one."""
    from cmtool.theory.trained import Budget, Member, coupled_errors, train_sequentially

    rows: list[list[Any]] = []
    for width in widths:
        members = [Member("ct", "restarted", seed + index) for index in range(2)]
        trained = train_sequentially(product(law, 2), levels, members, Budget(width=width, steps=steps))
        errors = coupled_errors(law, levels, trained, seed)
        eps = float(trained.eps.mean())
        total = errors.population["ct"] + eps
        rows.append(
            [
                width,
                float(errors.runs.mean()),
                errors.population["ct"],
                None,
                eps,
                total,
                bool(errors.runs.mean() <= total + 2 * errors.error["ct"]),
            ]
        )
    return rows


def _curves(rows: list[list[Any]], floor: float | None) -> list[Curve]:
    sizes = [row[0] for row in rows]
    curves = [
        Curve("measured", sizes, [row[1] for row in rows]),
        Curve("population, all functions", sizes, [row[2] for row in rows], "law"),
        Curve("population + eps_F + eps", sizes, [row[5] for row in rows], "bound"),
    ]
    return curves if floor is None else [*curves, Curve("affine floor", sizes, [floor] * len(rows), "law")]


def _findings(rows: list[list[Any]], floor: float | None) -> list[str]:
    first, last = rows[0], rows[-1]
    found = [
        f"The theorem's sum holds in {sum(row[-1] for row in rows)} of {len(rows)} cases; from size {first[0]} to "
        f"{last[0]} the error moves from {first[1]:.3f} to {last[1]:.3f} (population {first[2]:.3f})."
    ]
    if floor is not None:
        found.append(
            f"An affine class cannot go below {floor:.3f} on this law however large T is: it only sees two moments."
        )
    return found


def run(
    family: str = "relu",
    sizes: tuple[int, ...] = (1, 3, 9),
    data: str = GMM,
    count: int | None = None,
    samples: int | None = None,
    steps: int = 200,
    seed: int = 0,
) -> Study:
    """W1 and eps_F by class size: exact projections (poly, relu), or trained networks (mlp, on two axes).

    `samples` fits poly and relu on that many pairs per level; `steps` trains each level of an mlp.

    Raises:
        UserError: for an unknown family or sizes that are not positive.
    """
    if family not in FAMILIES:
        raise UserError(unknown("function class", family, FAMILIES))
    if not sizes or min(sizes) < 1 or (samples is not None and samples < 50) or steps < 1:
        raise UserError("sizes and steps must be at least 1, and --n at least 50", "use --size 1,3,9")
    law, size_list = parse_law(data), sorted(set(sizes))
    count = count or (8 if family == "mlp" else 32)
    if family == "mlp":
        if np.ptp(law.stds) > 0 or law.stds[0] == 0:
            raise UserError("trained networks need modes of one positive width", "use --data 'gmm:0.3,0.7;-1,1;0.4'")
        rows = _trained_rows(law, build_levels("angle", count), size_list, steps, seed)
        how = f"networks 2 -> width -> width -> 2, {steps} steps per level; coupled E||f - Phi||, eps holds eps_F too"
    else:
        rows = _exact_rows(law, li(count), family, size_list, samples, seed)
        how = "exact projection onto the class" if samples is None else f"{samples} fresh pairs per level"
    floor = None if family == "mlp" else affine_floor(law)
    return Study(
        "classes",
        "Function classes: what a small class costs",
        "How does the error grow when the class is too small?",
        [Table(f"Class {family}, data {data}, T = {count}: {how}", COLUMNS, rows)],
        (),
        [Panel(f"Class {family}, T = {count}", "size", "W1", _curves(rows, floor), log_y=False)],
        _findings(rows, floor),
        [how],
        {"family": family, "sizes": size_list, "data": data, "T": count, "n": samples, "seed": seed},
    )
