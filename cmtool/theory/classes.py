"""Restricted function classes on the line: what eps_F and a finite sample add to the population error, exactly.

Each class is linear in fixed features of the standardized x (polynomials, or one hidden ReLU layer with fixed knots),
so that the best function of the class is a weighted least-squares fit and nothing is left to an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import UserError, unknown
from cmtool.theory.distances import absolute_mean, normal_nodes
from cmtool.theory.levels import Levels
from cmtool.theory.line import LineMixture
from cmtool.theory.population import Map, at, conditional_mean, identity, rearranged

Array = NDArray[np.float64]
FAMILIES = ("poly", "relu", "mlp")


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
    """Least squares on pairs (x_t, f_{t-1}(x_{t-1})) that share X_0 and Z, as the training of the paper has it."""
    clean, noise = law.sample(samples, rng), rng.standard_normal(samples)
    (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
    return _least_squares(level.design(a_now * clean + b_now * noise), f(a * clean + b * noise))


def _output_w1(law: LineMixture, levels: Levels, f: Map, z: Array, weight: Array, start: str) -> float:
    x = law.quantile(z, *at(levels, -1)) if start == "exact" else z
    return float(weight @ np.abs(rearranged(f(x), weight) - law.quantile(z, *at(levels, 0))))


def affine_floor(law: LineMixture) -> float:
    """W1 of the law and the normal with its mean and variance: what no affine class can go below as T grows."""
    z, weight = normal_nodes(8.0, 40001)
    normal = law.mean + np.sqrt(law.variance) * z
    return absolute_mean(law.quantile(z, 1.0, 0.0) - normal, z, weight)


def population_w1(law: LineMixture, levels: Levels, f: Callable[[Array], Array], start: str = "exact") -> float:
    """W1 of an unrestricted f on the nodes of `run_class`, so that both errors are cut in the same way."""
    z, weight = normal_nodes(7.0, 4001)
    return _output_w1(law, levels, f, z, weight / weight.sum(), start)
