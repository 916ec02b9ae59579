"""Draws of noise levels t, and of pairs (t, r) with r < t, from uniform numbers.

Every function takes numbers u in [0, 1) drawn elsewhere, so that a draw is a value and can be sliced by image.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmtool.config.parts import GapPart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.grid import karras_grid
from cmtool.errors import ConfigError


@functools.lru_cache(maxsize=64)
def grid_tensor(points: int, process: ProcessConfig) -> Tensor:
    """The ascending Karras grid of `process` with N = `points` levels, float64 (N,)."""
    return torch.tensor(karras_grid(points, process.sigma_min, process.sigma_max, process.rho), dtype=torch.float64)


def grid_of(part: TimesPart, points: int, process: ProcessConfig) -> Tensor:
    """The ascending grid that `part` draws from, float64 (N,): Karras's, or with equal ratios for "grid_log"."""
    if part.kind != "grid_log":
        return grid_tensor(points, process)
    low, high = process.sigma_min, process.sigma_max
    inner = (low * (high / low) ** (i / (points - 1)) for i in range(1, points - 1))
    return torch.tensor([low, *inner, high], dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def lognormal_masses(points: int, process: ProcessConfig, mean: float, std: float) -> Tensor:
    """Probability of each interval of the grid under ln t ~ N(mean, std^2), normalized, float64 (N-1,); iCT, Eq. 10."""
    edges = torch.erf((grid_tensor(points, process).log() - mean) / (math.sqrt(2) * std))
    masses = edges[1:] - edges[:-1]
    return masses / masses.sum()


def grid_index(part: TimesPart, u: Tensor, points: int, process: ProcessConfig) -> Tensor:
    """Return the interval i in 0 .. N-2 of each u (B,): uniform, or with log-normal mass."""
    if part.kind in ("grid_uniform", "grid_log"):
        return (u * (points - 1)).long().clamp_max(points - 2)
    cumulative = lognormal_masses(points, process, part.mean, part.std).cumsum(0)
    return torch.searchsorted(cumulative, u, right=True).clamp_max(points - 2)


def draw_lognormal(part: TimesPart, u: Tensor, process: ProcessConfig) -> Tensor:
    """exp(mean + std n) of the normal quantile n of u (B,): not cut off, as published (EDM, ECT, sCM, MeanFlow).

    If f is the identity at sigma_min and not defined below it, levels start there.
    """
    n = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
    t = (part.mean + part.std * n).exp()
    return t.clamp_min(process.sigma_min) if process.parameterization in ("consistency", "hard") else t


def draw_karras_uniform(u: Tensor, process: ProcessConfig) -> Tensor:
    """(low + u (high - low))^rho: uniform in t^(1/rho), the continuous limit of the grid (Song et al. 2023, App. B)."""
    low, high = process.sigma_min ** (1 / process.rho), process.sigma_max ** (1 / process.rho)
    return (low + u * (high - low)) ** process.rho


def draw_flow_uniform(u: Tensor, process: ProcessConfig) -> Tensor:
    """Levels whose rectified-flow time t / (1 + t) is uniform between those of sigma_min and sigma_max."""
    low, high = (level / (1 + level) for level in (process.sigma_min, process.sigma_max))
    tau = low + u * (high - low)
    return tau / (1 - tau)


def draw_student(part: TimesPart, u: Tensor, rank: Tensor, process: ProcessConfig) -> Tensor:
    """TCM's levels from `low` up: ln(t / low) is |scale T| with Student's T, cut at sigma_max; an atom at `low`.

    `rank` (B,) in [0, 1) is an image's place in the global batch: images below `atom` sit at the atom, so that its
    share of every batch is exact (Lee et al. 2025, section 4).
    """
    reach = math.log(process.sigma_max / part.low) / part.std
    # The import takes a quarter of a second and only this draw needs it; sampling and editing load this room too.
    from scipy.special import stdtr, stdtrit

    p = 0.5 + u * (float(stdtr(part.df, reach)) - 0.5)
    tail = torch.as_tensor(stdtrit(part.df, p.cpu().numpy())).to(u.device)
    t = (part.low * (part.std * tail).exp()).clamp(part.low, process.sigma_max)
    return torch.where(rank < part.atom, torch.full_like(t, part.low), t)


def draw_two(part: TimesPart, u: Tensor, second: Tensor, rank: Tensor, process: ProcessConfig) -> tuple[Tensor, Tensor]:
    """Two levels t >= r: the larger and the smaller of two draws of a law, equal where `rank` < `same` (MeanFlow).

    If r has a law of its own (`mean_r`), r is its draw, or t where that is above t (py-meanflow, SoFlow). So may the
    equal levels (`mean_same`; SoFlow). A log-normal level is a logit-normal time of rectified flow.
    """
    if part.kind == "two_karras":
        one, other = draw_karras_uniform(u, process), draw_karras_uniform(second, process)
    elif part.mean_r is not None:
        own = part.model_copy(update={"mean": part.mean_r, "std": part.std_r or part.std})
        one = draw_lognormal(part, u, process)
        other = torch.minimum(draw_lognormal(own, second, process), one)
    else:
        one, other = draw_lognormal(part, u, process), draw_lognormal(part, second, process)
    t, r = torch.maximum(one, other), torch.minimum(one, other)
    equal, alone = rank < part.same, t
    if part.mean_same is not None:
        own = part.model_copy(update={"mean": part.mean_same, "std": part.std_same or part.std})
        alone = draw_lognormal(own, u, process)
    return torch.where(equal, alone, t), torch.where(equal, alone, r)


def draw_dyadic(
    part: TimesPart, u: Tensor, second: Tensor, rank: Tensor, process: ProcessConfig
) -> tuple[Tensor, Tensor]:
    """Levels t > r whose times in rectified flow are d = 2^-j of the whole apart, t a multiple of d (shortcut models).

    j is uniform in 0 .. halvings - 1, and `halvings` where `rank` < `same` (Frans et al. 2025, section 3.1). The whole
    is the time of sigma_max.
    """
    j = (second * part.halvings).floor().clamp_max(part.halvings - 1)
    parts = torch.where(rank < part.same, torch.full_like(j, part.halvings), j).exp2()
    step = (u * parts).floor().clamp_max(parts - 1)
    whole = process.sigma_max / (1 + process.sigma_max)
    tau, sigma = whole * ((step + 1) / parts), whole * (step / parts)
    return tau / (1 - tau), sigma / (1 - sigma)


def draw_flow_pair(u: Tensor, share: Tensor, process: ProcessConfig) -> tuple[Tensor, Tensor]:
    """IMM's levels t and s < t: both uniform in tau = t / (t + sigma_data), s between that of sigma_min and t's.

    tau is the time of a rectified flow whose noise is as wide as the data, as published.
    """
    data = process.sigma_data
    low, high = (level / (level + data) for level in (process.sigma_min, process.sigma_max))
    tau = low + u * (high - low)
    to = low + share * (tau - low)
    return data * tau / (1 - tau), data * to / (1 - to)


def decrement_map(part: GapPart, t: Tensor, s: Tensor, sigma_max: float) -> Tensor:
    """IMM's r(s, t) = max(s, t - sigma_max / 2^k): a constant step in the level eta of the noise, from t down to s."""
    return torch.maximum(s, t - sigma_max / 2**part.k)


def ratio_map(part: GapPart, t: Tensor, stage: int, sigma_min: float = 0.0) -> Tensor:
    """ECT's cleaner time r = max(0, t (1 - n(t) / q^(stage+1))), n(t) = 1 + k sigmoid(-b t) (Geng et al. 2025, Eq. 14).

    Values below `sigma_min` become 0: there the target is the clean image itself.
    """
    slow = 1 + part.k * torch.sigmoid(-part.b * t) if part.map == "sigmoid" else torch.ones_like(t)
    r = (t * (1 - slow / part.q ** (stage + 1))).clamp_min(0.0)
    if part.cap < 1:
        r = torch.minimum(r, part.cap * t)
    return torch.where(r < sigma_min, torch.zeros_like(r), r)


@dataclass(frozen=True)
class Uniforms:
    """A draw's random numbers, float64 (B,) each in [0, 1), and each image's place in the global batch.

    `second` is for draws of two levels; `rank` = (row + 1/2) / rows of the global batch.
    """

    first: Tensor
    second: Tensor
    rank: Tensor


def draw_level(
    part: TimesPart, numbers: Uniforms, process: ProcessConfig, density: LevelDensity | None = None
) -> Tensor:
    """Return t, float64 (B,), of a continuous law that draws one level per image."""
    u = numbers.first
    if part.kind == "student_t":
        return draw_student(part, u, numbers.rank, process)
    if part.kind == "largest":
        return torch.full_like(u, process.sigma_max)
    if part.kind == "discrepancy":
        if density is None:
            raise ConfigError("times that follow the discrepancy need it measured first.")
        return density.quantile(u)
    laws = {"karras_uniform": draw_karras_uniform, "flow_uniform": draw_flow_uniform}
    return laws[part.kind](u, process) if part.kind in laws else draw_lognormal(part, u, process)


def draw_times(
    part: TimesPart,
    gap: GapPart,
    u: Tensor | Uniforms,
    process: ProcessConfig,
    points: int,
    stage: int,
    density: LevelDensity | None = None,
) -> tuple[Tensor, ...]:
    """Return (t, r), float64 (B,) each, from uniform numbers: the noisier and the cleaner time of each pair.

    Grid draws give neighbors of the grid with N = `points`; continuous draws take r from the gap's map; a gap of
    kind "none" gives r = t. Draws for jumps to a third level give (t, r, s) with s <= r.
    """
    numbers = u if isinstance(u, Uniforms) else Uniforms(u, u, u)
    numbers = Uniforms(numbers.first.double(), numbers.second.double(), numbers.rank.double())
    if part.kind.startswith("grid"):
        index = grid_index(part, numbers.first, points, process)
        grid = grid_of(part, points, process).to(index.device)
        return grid[index + 1], grid[index]
    if part.draws_two:
        draw = draw_dyadic if part.kind == "dyadic" else draw_two
        return draw(part, numbers.first, numbers.second, numbers.rank, process)
    if part.kind == "flow_pair":
        t, s = draw_flow_pair(numbers.first, numbers.second, process)
        return t, decrement_map(gap, t, s, process.sigma_max), s
    t = draw_level(part, numbers, process, density)
    if gap.kind == "ratio":
        return t, ratio_map(gap, t, stage)
    return t, t


@dataclass(frozen=True)
class LevelDensity:
    """Levels t (K,) ascending and the cumulative probability (K,) at each, from 0 to 1; float64."""

    levels: Tensor
    cumulative: Tensor

    def quantile(self, u: Tensor) -> Tensor:
        """Return t (B,) of u (B,) in [0, 1): linear in ln t between the levels."""
        cumulative, logs = self.cumulative.to(u.device), self.levels.to(u.device).log()
        index = torch.searchsorted(cumulative, u, right=True).clamp(1, len(logs) - 1)
        below, above = cumulative[index - 1], cumulative[index]
        share = ((u - below) / (above - below).clamp_min(1e-300)).clamp(0, 1)
        return torch.lerp(logs[index - 1], logs[index], share).exp()


def density_from(levels: Tensor, height: Tensor, floor: float = 0.0) -> LevelDensity:
    """Return the law whose density over ln t is proportional to `height` (K,) at `levels` (K,), linear between them.

    A share `floor` of it is spread evenly over ln t, so that every level is drawn sometimes.
    """
    logs = levels.double().log()
    steps = logs[1:] - logs[:-1]
    height = height.double().clamp_min(0)
    mass = steps * (height[1:] + height[:-1]) / 2
    total = float(mass.sum())
    mass = mass / total if total > 0 and math.isfinite(total) else steps / steps.sum()
    mass = (1 - floor) * mass + floor * steps / steps.sum()
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    return LevelDensity(levels.double(), cumulative / cumulative[-1])
