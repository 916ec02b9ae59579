"""Generator-augmented flows (Issenhuth et al. 2024): pairs made from the model's own guess instead of the data.

x_n = x_0 + t_n z, xhat = f(x_n, t_n), and the pair is (xhat + t_n z, xhat + t_{n+1} z) with the same z, used for a
share `mix` of the batch. Exact for N(0, s^2): vectors below hold coordinates on x_0 / s and z.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad

Array = NDArray[np.float64]


def residual_independent(std: float, t: float) -> float:
    """E||z - E[z|x_t]||^2 per dimension for independent pairs: s^2 / (s^2 + t^2)."""
    return std**2 / (std**2 + t**2)


def residual_generator(std: float, t: float, sigma_min: float = 0.002) -> float:
    """The same for generator-augmented pairs with the exact f: falls as s^4 / t^4, not s^2 / t^2."""
    a = np.hypot(std, sigma_min) / np.hypot(std, t)
    variance = (a * std) ** 2 + ((1 + a) * t) ** 2
    return float(residual_independent(std, t) * (std**2 + sigma_min**2) / variance)


def transport_cost(std: float, t: float, sigma_min: float = 0.002) -> float:
    """E(f(x_t) - z)^2: how much straighter the pairs (f, z) are than (x_0, z)."""
    a = np.hypot(std, sigma_min) / np.hypot(std, t)
    return float(std**2 + sigma_min**2 + 1 - 2 * a * t)


def spread_ratio(times: Array, std: float, mix: float, predictor: str = "ideal") -> float:
    """Output sd over the flow's after training with a share `mix` of generator pairs, among linear maps.

    `times` ascending (N,); `predictor` "ideal" takes xhat from the exact f, "own" from the function just trained.
    """
    gain, least = 1.0, np.hypot(std, times[0])
    for r, t in pairwise(times):
        a = least / np.hypot(std, r) if predictor == "ideal" else gain
        before, now = np.array([a * std, (a + 1) * r]), np.array([a * std, a * r + t])
        plain_before, plain_now = np.array([std, r]), np.array([std, t])
        top = mix * before @ now + (1 - mix) * plain_before @ plain_now
        gain *= top / (mix * now @ now + (1 - mix) * plain_now @ plain_now)
    return float(gain * times[-1] / least)


def spread_limit() -> float:
    """The limit of `spread_ratio` for mix 1 and the ideal predictor: exp int_0^1 (1 - 2c^2) / (1 + 2c - 2c^3) dc."""
    return float(np.exp(quad(lambda c: (1 - 2 * c * c) / (1 + 2 * c - 2 * c**3), 0, 1)[0]))
