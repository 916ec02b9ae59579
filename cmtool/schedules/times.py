"""Draws of noise levels t, and of pairs (t, r) with r < t, from uniform numbers.

Every function takes numbers u in [0, 1) drawn elsewhere, so that a draw is a value and can be sliced by image.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from cmtool.config.parts import GapPart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.grid import karras_grid


@functools.lru_cache(maxsize=64)
def grid_tensor(points: int, process: ProcessConfig) -> Tensor:
    """The ascending Karras grid of `process` with N = `points` levels, float64 (N,)."""
    return torch.tensor(karras_grid(points, process.sigma_min, process.sigma_max, process.rho), dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def lognormal_masses(points: int, process: ProcessConfig, mean: float, std: float) -> Tensor:
    """Probability of each interval of the grid under ln t ~ N(mean, std^2), normalized, float64 (N-1,) (iCT, Eq. 10)."""
    edges = torch.erf((grid_tensor(points, process).log() - mean) / (math.sqrt(2) * std))
    masses = edges[1:] - edges[:-1]
    return masses / masses.sum()


def grid_index(part: TimesPart, u: Tensor, points: int, process: ProcessConfig) -> Tensor:
    """Return the interval i in 0 .. N-2 of each u (B,): uniform, or with log-normal mass."""
    if part.kind == "grid_uniform":
        return (u * (points - 1)).long().clamp_max(points - 2)
    cumulative = lognormal_masses(points, process, part.mean, part.std).cumsum(0)
    return torch.searchsorted(cumulative, u, right=True).clamp_max(points - 2)


def draw_lognormal(part: TimesPart, u: Tensor, process: ProcessConfig) -> Tensor:
    """exp(mean + std n) of the normal quantile n of u (B,), kept inside [sigma_min, sigma_max]."""
    n = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
    return (part.mean + part.std * n).exp().clamp(process.sigma_min, process.sigma_max)


def draw_karras_uniform(u: Tensor, process: ProcessConfig) -> Tensor:
    """(low + u (high - low))^rho: uniform in t^(1/rho), the continuous limit of the grid (Song et al. 2023, App. B)."""
    low, high = process.sigma_min ** (1 / process.rho), process.sigma_max ** (1 / process.rho)
    return (low + u * (high - low)) ** process.rho


def ratio_map(part: GapPart, t: Tensor, stage: int, sigma_min: float = 0.0) -> Tensor:
    """ECT's cleaner time r = max(0, t (1 - n(t) / q^(stage+1))), n(t) = 1 + k sigmoid(-b t) (Geng et al. 2025, Eq. 14).

    Values below `sigma_min` become 0: there the target is the clean image itself.
    """
    slow = 1 + part.k * torch.sigmoid(-part.b * t) if part.map == "sigmoid" else torch.ones_like(t)
    r = (t * (1 - slow / part.q ** (stage + 1))).clamp_min(0.0)
    return torch.where(r < sigma_min, torch.zeros_like(r), r)


def draw_times(
    part: TimesPart, gap: GapPart, u: Tensor, process: ProcessConfig, points: int, stage: int
) -> tuple[Tensor, Tensor]:
    """Return (t, r), float64 (B,) each, from uniform u (B,): the noisier and the cleaner time of each pair.

    Grid draws give neighbors of the grid with N = `points`; continuous draws take r from the gap's map; a gap of
    kind "none" gives r = t.
    """
    u = u.double()
    if part.kind.startswith("grid"):
        index = grid_index(part, u, points, process)
        grid = grid_tensor(points, process).to(u.device)
        return grid[index + 1], grid[index]
    t = draw_karras_uniform(u, process) if part.kind == "karras_uniform" else draw_lognormal(part, u, process)
    if gap.kind == "ratio":
        return t, ratio_map(gap, t, stage)
    return t, t
