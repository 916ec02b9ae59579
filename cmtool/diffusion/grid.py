"""The Karras grid, in float64 and without torch."""

from __future__ import annotations


def karras_grid(
    num_scales: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """Return the N = `num_scales` noise levels of the grid in ascending order, with exact ends.

    t_i = (sigma_min^(1/rho) + (i-1)/(N-1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho for i = 1..N
    (Karras et al. 2022, Eq. 5; Song et al. 2023, section 4). N counts points, not intervals.

    Raises:
        ValueError: for fewer than two points or levels that are not 0 < sigma_min < sigma_max.
    """
    if num_scales < 2:
        raise ValueError(f"a grid needs at least 2 points, not {num_scales}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"0 < sigma_min < sigma_max does not hold for {sigma_min} and {sigma_max}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    inner = [(low + i / (num_scales - 1) * (high - low)) ** rho for i in range(1, num_scales - 1)]
    # The power does not return its own ends exactly, and float32 code that trusts it falls below sigma_min.
    return (sigma_min, *inner, sigma_max)
