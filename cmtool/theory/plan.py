"""How many levels are enough, according to the bound and according to the measured laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq

from cmtool.errors import UserError
from cmtool.theory import gaussian, population
from cmtool.theory.laws import GMM_A
from cmtool.theory.levels import li, smallest_count

LIMIT = 2**24
MIXTURE_LIMIT = 2048


def bound_value(dim: int, count: float, lipschitz: float = 1.0) -> float:
    """L_f^3 d^(5/2) log^5(T) / T: the theorem's right side with C1 = 1 and no eps."""
    return float(lipschitz**3 * dim**2.5 * np.log(count) ** 5 / count)


def bound_levels(dim: int, eps: float, lipschitz: float = 1.0) -> float:
    """The T beyond its maximum (T = e^5) from which `bound_value` stays below eps."""
    top = np.exp(5.0)
    if bound_value(dim, top, lipschitz) <= eps:
        return 3.0
    root = brentq(lambda u: 5 * np.log(u) - u + np.log(lipschitz**3 * dim**2.5 / eps), 5.0, 700.0)
    return float(np.exp(root))


def _smallest(error: Callable[[int], float], eps: float, first: int, limit: int) -> int | None:
    """The smallest T >= first with error(T) <= eps, for a falling error; None beyond `limit`."""
    low, high = first - 1, first
    while error(high) > eps:
        if high >= limit:
            return None
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(middle) > eps else (low, middle)
    return high


def levels_needed(dim: int, eps: float, std: float = 1.0, c1: float = 4.0) -> int | None:
    """The smallest T with exact W2 <= eps for data N(0, s^2 I_d) on the theorem's schedule; None above 2^24."""
    first = max(16, smallest_count(c1))
    return _smallest(lambda count: gaussian.distances(li(count, c1=c1), 0.0, std, dim)[1], eps, first, LIMIT)


@lru_cache(maxsize=256)
def _axis_errors(count: int) -> tuple[float, float]:
    levels = li(count)
    w2 = population.errors(GMM_A, levels, population.train(GMM_A, levels, 1001, 8)[-1])[1]
    return w2, gaussian.distances(levels, 0.0, 0.4, 1)[1]


def mixture_error(dim: int, count: int) -> float:
    """W2 (an upper bound of W1) for the mixture GMM-A on one axis and N(0, .4^2) on the others."""
    mixture, plain = _axis_errors(count)
    return float(np.hypot(mixture, np.sqrt(dim - 1) * plain))


def mixture_levels(dim: int, eps: float) -> tuple[int | None, bool]:
    """T for `mixture_error` <= eps, and whether it was measured (True) or extrapolated (False).

    Above T = 2048 the error is extrapolated with the slope between the last two doublings. The slope still steepens, so
    the extrapolated T errs on the high side.
    """
    found = _smallest(lambda count: mixture_error(dim, count), eps, 16, MIXTURE_LIMIT)
    if found is not None:
        return found, True
    half, last = mixture_error(dim, MIXTURE_LIMIT // 2), mixture_error(dim, MIXTURE_LIMIT)
    slope = np.log(half / last) / np.log(2)
    return int(np.ceil(MIXTURE_LIMIT * (last / eps) ** (1 / slope))), False


@dataclass(frozen=True)
class Plan:
    """Levels for one (d, eps): by the bound with C1 = 1, for Gaussian data, and for a two-mode mixture."""

    dim: int
    eps: float
    lipschitz: float
    bound: float
    gaussian: int | None
    mixture: int | None
    mixture_measured: bool


def make_plan(dim: int, eps: float, lipschitz: float = 1.0) -> Plan:
    """Plan T for W1 <= eps in `dim` dimensions.

    Raises:
        UserError: for d < 1, eps <= 0 or L_f < 1 (a flow that shrinks nothing still has L_f = 1).
    """
    if dim < 1:
        raise UserError(f"a dimension must be at least 1, not {dim}", "use --dim 2")
    if not 0 < eps < np.inf:
        raise UserError(f"eps must be a positive distance, not {eps:g}", "use --eps 0.05")
    if not 1 <= lipschitz < 1e6:
        raise UserError(f"L_f must be at least 1 (and below 1e6), not {lipschitz:g}", "leave --lipschitz out")
    mixture, measured = mixture_levels(dim, eps)
    return Plan(dim, eps, lipschitz, bound_levels(dim, eps, lipschitz), levels_needed(dim, eps), mixture, measured)
