"""The population recursion on the line by cubic splines: f_t(x) = E[f_{t-1}(X_{t-1}) | X_t = x], and its rival, CD."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from cmtool.theory.distances import absolute_mean, normal_nodes
from cmtool.theory.laws import LineMixture
from cmtool.theory.levels import Levels

Array = NDArray[np.float64]
Map = Callable[[Array], Array]


class Spline:
    """A cubic spline continued as a straight line; linear pieces would add numerical viscosity."""

    def __init__(self, x: Array, y: Array) -> None:
        self.curve = CubicSpline(x, y, bc_type="natural")
        self.ends = np.array([x[0], x[-1]])
        self.values, self.slopes = self.curve(self.ends), self.curve(self.ends, 1)

    def __call__(self, x: Array) -> Array:
        """The value at x, of any shape."""
        x = np.asarray(x, float)
        inside = np.clip(x, self.ends[0], self.ends[1])
        value = self.curve(inside)
        beyond = x - inside
        return value + np.where(beyond < 0, self.slopes[0], self.slopes[1]) * beyond


def hermite(nodes: int) -> tuple[Array, Array]:
    """Gauss-Hermite nodes and weights for E over N(0, 1), each (nodes,)."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return x, w / w.sum()


def identity(x: Array) -> Array:
    """f_1."""
    return x


def level_grid(law: LineMixture, a: float, b: float, size: int, reach: float = 9.0) -> Array:
    """X (size,) that covers a X_0 + b Z to `reach` standard deviations of every component.

    Evenly spaced on VP levels. Where the noise is far above the data (VE), the spacing is that of sinh, so that the
    data keep their resolution.
    """
    means, variances = law.components(a, b)
    low, high = np.min(means - reach * np.sqrt(variances)), np.max(means + reach * np.sqrt(variances))
    if b <= 4:
        return np.linspace(low, high, size)
    half = max(-low, high)
    return np.sinh(np.linspace(-1, 1, size) * np.arcsinh(half))


def conditional_mean(
    law: LineMixture, f: Map, x: Array, before: tuple[float, float], now: tuple[float, float], nodes: int = 16
) -> Array:
    """E[f(X_{t-1}) | X_t = x] for x (n,), exact in the components and by Gauss-Hermite inside each."""
    (a, b), (a2, b2) = before, now
    means, variances = law.components(a2, b2)
    means_before, variances_before = law.components(a, b)
    cov = a * a2 * law.stds**2 + b * b2
    center = means_before + cov / variances * (x[:, None] - means)
    spread = np.sqrt(np.maximum(variances_before - cov**2 / variances, 0.0))
    share = law.responsibilities(x, a2, b2)
    if not spread.any():
        return np.sum(share * f(center), axis=1)
    xi, weight = hermite(nodes)
    return np.sum(share * (f(center[:, :, None] + spread[None, :, None] * xi) @ weight), axis=1)


def ddim_step(law: LineMixture, x: Array, before: tuple[float, float], now: tuple[float, float]) -> Array:
    """E[X_{t-1} | X_t = x]: exactly one DDIM (VE: Euler) step with the exact score."""
    (a, b), (a2, b2) = before, now
    return b / b2 * x + (a - a2 * b / b2) * law.denoise(x, a2, b2)


def heun_step(law: LineMixture, x: Array, before: tuple[float, float], now: tuple[float, float]) -> Array:
    """One Heun step of the flow on VE levels (a = 1): two denoiser calls."""
    (_, r), (_, t) = before, now
    slope = (x - law.denoise(x, 1.0, t)) / t
    ahead = x + (r - t) * slope
    return x + (r - t) * (slope + (ahead - law.denoise(ahead, 1.0, r)) / r) / 2


def at(levels: Levels, index: int) -> tuple[float, float]:
    """(a, b) of the level with this index (0 = data end)."""
    return float(levels.signal[index]), float(levels.noise[index])


def train(law: LineMixture, levels: Levels, size: int = 2001, nodes: int = 16) -> list[Map]:
    """f_1, ..., f_T of consistency training with no restriction of the function, infinite data and perfect fits."""
    functions: list[Map] = [identity]
    for index in range(1, levels.count):
        x = level_grid(law, *at(levels, index), size)
        y = conditional_mean(law, functions[-1], x, at(levels, index - 1), at(levels, index), nodes)
        functions.append(Spline(x, y))
    return functions


def distill(law: LineMixture, levels: Levels, step: Callable[..., Array] = ddim_step) -> Map:
    """f_T of consistency distillation: the composition of the solver's steps, with nothing to average."""

    def run(x: Array) -> Array:
        for index in range(levels.count - 1, 0, -1):
            x = step(law, x, at(levels, index - 1), at(levels, index))
        return x

    return run


def start_map(law: LineMixture, levels: Levels, start: str) -> Map:
    """Z ~ N(0, 1) -> X_T: itself for "normal", the quantile of p_T for "exact"; VE scales the normal by sigma_max."""
    a, b = at(levels, -1)
    if start == "exact":
        return lambda z: law.quantile(z, a, b)
    return lambda z: float(np.hypot(a, b) if a < 1 else b) * z


def gap_at_nodes(law: LineMixture, levels: Levels, f: Map, start: str, limit: float, count: int) -> tuple[Array, ...]:
    """Nodes z, their weights, and the output's quantile minus that of X_1 at them, each (count,)."""
    z, weight = normal_nodes(limit, count)
    output = f(start_map(law, levels, start)(z))
    if np.any(np.diff(output) < 0):
        output = rearranged(output, weight)
    return z, weight, output - law.quantile(z, *at(levels, 0))


def node_count(law: LineMixture) -> int:
    """A number of nodes that resolves the quantile of X_1: near-Diracs make it jump, and even numbers avoid z = 0."""
    return 8001 if law.stds.min() > 0.05 else 80_000


def errors(
    law: LineMixture, levels: Levels, f: Map, start: str = "normal", count: int | None = None
) -> tuple[float, float]:
    """W1 and W2 of f(X_T) against X_1, exact on the line by quadrature over z ~ N(0, 1) on `count` nodes.

    Both laws are given as functions of z; sorting the output makes this correct even where f is not increasing.
    """
    z, weight, gap = gap_at_nodes(law, levels, f, start, 9.0, count or node_count(law))
    return absolute_mean(gap, z, weight), float(np.sqrt(weight @ gap**2))


def rearranged(values: Array, weight: Array) -> Array:
    """The increasing function of z with the same law as `values`, both (n,) at nodes with `weight` (n,)."""
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weight[order]) - 0.5 * weight[order]
    return np.interp(np.cumsum(weight) - 0.5 * weight, mass, values[order])


def stage_losses(law: LineMixture, levels: Levels, functions: list[Map], count: int = 4001, nodes: int = 16) -> Array:
    """Optimal loss of each level, E Var(f_{t-1}(X_{t-1}) | X_t), (T-1,): what perfect training still reports."""
    z, weight = normal_nodes(8.0, count)
    losses = []
    for index in range(1, levels.count):
        x = law.quantile(z, *at(levels, index))
        before, now, f = at(levels, index - 1), at(levels, index), functions[index - 1]
        mean = conditional_mean(law, f, x, before, now, nodes)
        square = conditional_mean(law, _squared(f), x, before, now, nodes)
        losses.append(weight @ (square - mean**2))
    return np.array(losses)


def _squared(f: Map) -> Map:
    return lambda x: f(x) ** 2


def flow_lipschitz(law: LineMixture, levels: Levels, count: int = 4001) -> float:
    """Max |Phi_{T->1}'| on the central part of p_T: the L_f that the theorem raises to the third power."""
    z, _ = normal_nodes(5.0, count)
    x, y = law.quantile(z, *at(levels, -1)), law.quantile(z, *at(levels, 0))
    return float(np.max(np.diff(y) / np.diff(x)))
