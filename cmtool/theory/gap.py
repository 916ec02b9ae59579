"""Consistency training against distillation: the discrepancy of the losses and, for l1, of the minimizers.

Issenhuth et al. 2024 (arXiv 2406.09570), Theorem 1: N^a (L_CT - L_CD) tends to a positive multiple of
R = int lambda E[||d_CT f||^a - ||d_CD f||^a] dt. Here everything is exact, for N(0, s^2) and for two Diracs at -1, +1.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from cmtool.theory.distances import normal_nodes
from cmtool.theory.population import Spline

Array = NDArray[np.float64]
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
ROOT = float(np.sqrt(2 / np.pi))


def l2_discrepancy(std: float, low: float = SIGMA_MIN, high: float = SIGMA_MAX) -> float:
    """R for a = 2 at the exact f, lambda = 1, per dimension; tends to s pi / 4 on a wide range of levels."""
    edge = high / (2 * (std**2 + high**2)) - low / (2 * (std**2 + low**2))
    return float((std**2 + low**2) * (edge + (np.arctan(high / std) - np.arctan(low / std)) / (2 * std)))


def l1_discrepancy(std: float, low: float = SIGMA_MIN, high: float = SIGMA_MAX) -> float:
    """R for a = 1 at the exact f."""
    return float(ROOT * np.hypot(std, low) * (np.arctan(high / std) - np.arctan(low / std)))


def exact_losses(std: float, count: int, low: float = SIGMA_MIN, high: float = SIGMA_MAX) -> tuple[float, float]:
    """N^2 L_CT (squared l2) and N L_CT (l1) at the exact f on a uniform grid of `count` steps; L_CD is 0 there."""
    angle = np.diff(np.arctan2(np.linspace(low, high, count + 1), std))
    chord = np.hypot(std, low) * 2 * np.sin(angle / 2)
    return float(count**2 * np.mean(chord**2)), float(count * ROOT * np.mean(chord))


def scaled_map(std: float, power: float, times: Array) -> tuple[Array, Array]:
    """A wrong f on purpose: a(t) = (v_min / v_t)^(power/2) (1 is exact), and its derivative in `power`."""
    ratio = (std**2 + SIGMA_MIN**2) / (std**2 + times**2)
    a = ratio ** (power / 2)
    return a, 0.5 * np.log(ratio) * a


def wrong_map_losses(std: float, power: float, count: int) -> dict[str, float]:
    """Losses and gradients in `power` of `scaled_map` on `count` uniform steps, scaled to their limits.

    Keys: l2_gap = N^2 (L_CT - L_CD), l1_ct, l1_cd (times N), and the gradients l2_ct_grad, l2_cd_grad (times N),
    l1_ct_grad, l1_cd_grad.
    """
    times = np.linspace(SIGMA_MIN, SIGMA_MAX, count + 1)
    r, t = times[:-1], times[1:]
    (a_r, _), (a_t, slope) = scaled_map(std, power, r), scaled_map(std, power, t)
    v_r, v_t, cross = std**2 + r**2, std**2 + t**2, std**2 + r * t
    ct = a_t**2 * v_t + a_r**2 * v_r - 2 * a_r * a_t * cross
    cd = (a_t * np.sqrt(v_t) - a_r * np.sqrt(v_r)) ** 2
    ct_grad, cd_grad = slope * (a_t * v_t - a_r * cross), slope * (a_t * v_t - a_r * np.sqrt(v_r * v_t))
    return {
        "l2_gap": float(count**2 * np.mean(ct - cd)),
        "l1_ct": float(count * ROOT * np.mean(np.sqrt(ct))),
        "l1_cd": float(count * ROOT * np.mean(np.sqrt(cd))),
        "l2_ct_grad": float(count * 2 * np.mean(ct_grad)),
        "l2_cd_grad": float(count * 2 * np.mean(cd_grad)),
        "l1_ct_grad": float(ROOT * np.mean(ct_grad / np.sqrt(ct))),
        "l1_cd_grad": float(ROOT * np.mean(cd_grad / np.sqrt(cd))),
    }


def minority_mass(majority: float, sigma_max: float | None = None) -> float:
    """Mass that l1 consistency training sends to the lighter of two Diracs: Phi(-sqrt(2L)), L = log(pi_+ / pi_-).

    `sigma_max` adds the correction 1 / sigma_max for a start from N(0, sigma_max^2); None is the limit.
    """
    tilt = -np.sqrt(2 * np.log(majority / (1 - majority)))
    return float(ndtr(tilt + (1 / sigma_max if sigma_max else 0.0)))


def heavier_share(x: Array, t: float, majority: float) -> Array:
    """P(X_0 = +1 | X_0 + t Z = x)."""
    logit = np.log(majority / (1 - majority)) + 2 * x / t**2
    return 1 / (1 + np.exp(-np.clip(logit, -700, 700)))


def l1_chain_mass(times: Array, majority: float, count: int = 201) -> float:
    """The same mass by walking the levels: the weighted median of two values is the likelier one's, at every step.

    The walk keeps the order, so the mass is ndtr of the start that ends between the modes, found by three rounds of
    `count` starts each.
    """
    low, high = -8.0, 8.0
    for _ in range(3):
        z = np.linspace(low, high, count)
        x = times[-1] * z
        for r, t in zip(times[-2::-1], times[:0:-1], strict=True):
            clean = np.where(heavier_share(x, t, majority) >= 0.5, 1.0, -1.0)
            x = clean + r / t * (x - clean)
        last = int((x < 0).sum()) - 1
        low, high = z[last], z[last + 1]
    return float(ndtr((low + high) / 2))


def huber_center(low: Array, high: Array, share: Array, c: float) -> Array:
    """argmin_y of share rho(high - y) + (1 - share) rho(y - low), rho(u) = sqrt(u^2 + c^2) - c, elementwise.

    c = inf is squared l2 (the mean). Bisection: the derivative is increasing.
    """
    if np.isinf(c):
        return share * high + (1 - share) * low
    left, right = np.minimum(low, high), np.maximum(low, high)
    for _ in range(46):
        y = 0.5 * (left + right)
        pull = (1 - share) * (y - low) / np.hypot(y - low, c) + share * (y - high) / np.hypot(y - high, c)
        left, right = np.where(pull < 0, y, left), np.where(pull < 0, right, y)
    return 0.5 * (left + right)


def huber_recursion(times: Array, majority: float, c: float, size: int = 4001) -> Callable[[Array], Array]:
    """f_T of consistency training with the pseudo-Huber loss on Diracs at -1 (1 - majority) and +1 (majority)."""
    f: Callable[[Array], Array] = lambda x: x  # noqa: E731
    for r, t in pairwise(times):
        x = 0.5 * np.sinh(np.linspace(-1, 1, size) * np.arcsinh((2 + 9 * t) / 0.5))
        ratio = r / t
        high, low = f(1 + ratio * (x - 1)), f(-1 + ratio * (x + 1))
        f = _monotone(x, huber_center(low, high, heavier_share(x, t, majority), c), np.isinf(c))
    return f


def _monotone(x: Array, y: Array, smooth: bool) -> Callable[[Array], Array]:
    """A spline; where the minimizer jumps (l1-like losses) one that keeps the order, since a cubic would overshoot."""
    if smooth:
        return Spline(x, y)
    from scipy.interpolate import PchipInterpolator

    curve = PchipInterpolator(x, y)
    return lambda q: curve(np.clip(q, x[0], x[-1]))


def huber_errors(times: Array, majority: float, c: float, size: int = 4001) -> tuple[float, float]:
    """Mass below 0 and W1 to the two Diracs of f(N(0, sigma_max^2))."""
    z, weight = normal_nodes(8.0, 20001)
    output = huber_recursion(times, majority, c, size)(times[-1] * z)
    cut = np.cumsum(weight) - 0.5 * weight
    target = np.where(cut < 1 - majority, -1.0, 1.0)
    return float(weight @ (output < 0)), float(weight @ np.abs(np.sort(output) - target))


def dirac_limit_li() -> float:
    """The limit of W1 / sqrt(h) for two equal Diracs on the theorem's schedule, 0.3627.

    W1 = (2/pi) delta with delta^2 = 1/2 int_0^inf kappa(w) e^-w dw, w = 1/sigma^2 and kappa = d log sigma per step:
    beta / (2 (1 - alpha)), where beta / h is -log alpha while the schedule grows (alpha > 1/e) and 1 after.
    """
    from scipy.integrate import quad

    def integrand(w: float) -> float:
        alpha = w / (1 + w)
        return min(-np.log(alpha), 1.0) / (2 * (1 - alpha)) * np.exp(-w)

    turn = np.exp(-1) / (1 - np.exp(-1))
    pieces = quad(integrand, 0, turn)[0] + quad(integrand, turn, 60, limit=200)[0]
    return float(2 / np.pi * np.sqrt(pieces / 2))
