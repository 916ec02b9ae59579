"""The two-leg rule: a leg along a given slope and a leg by the network must together lead where the network does alone.

One rule covers flow matching, SoFlow, alpha-Flow, shortcut models and CTM, and MeanFlow in its limit. It needs no
derivative: two passes of the network at two points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmtool.config.parts import LegsPart, RecipeConfig, TargetPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import RectifiedFlow, expand
from cmtool.diffusion.solvers import euler_step
from cmtool.losses.distance import Distance
from cmtool.losses.objective import Comparison, Pair, TargetRule
from cmtool.losses.tangent import average_velocity, build_average
from cmtool.losses.target import call, paired_passes
from cmtool.losses.terms import Nets, Points, Slice
from cmtool.rng import batch_uniform

# (levels t and r, share of the run that is done, rows) -> levels from t to r
Middle = Callable[[tuple[Tensor, ...], float, Slice], tuple[Tensor, ...]]

# A solver's mean slope is taken over at least this share of t: differences of close points lose digits.
LEAST_WAY = 1e-3


def build_middle(recipe: RecipeConfig, process: ProcessConfig) -> Middle | None:
    """Return what inserts the end of the first leg between the levels t and r of a draw; None for other rules.

    For a rule with a `limit` it inserts nothing once the law has reached its end, so that the rule takes the limit.
    """
    part, target, times = recipe.legs, recipe.target, recipe.times
    if target.rule != "two_leg":
        return None
    if times.kind == "dyadic":
        whole = process.sigma_max / (1 + process.sigma_max)
        part = part.model_copy(update={"shortest": max(part.shortest, whole / 2**times.halvings)})

    def middle(times: tuple[Tensor, ...], done: float, rows: Slice) -> tuple[Tensor, ...]:
        t, r = times
        if target.limit and at_end(part, done):
            return t, r
        a: float | Tensor = leg_share(part, done)
        if part.law == "uniform":
            u = batch_uniform((rows.total,), rows.seed, "legs", rows.step, start=rows.start, count=len(t))
            a = part.end + (part.start - part.end) * u.double()
        return t, middle_level(part, t, r, a), r

    return middle


@dataclass(frozen=True)
class Stepped(Pair):
    """A pair whose gradient is scaled by the length of the first leg, `share` (B,) of the way; its distance is not."""

    share: Tensor

    def measure(self, distance: Distance) -> Tensor:
        """The distance between the two, its gradient times the share."""
        measured = super().measure(distance)
        return measured.detach() + self.share * (measured - measured.detach())


def first_leg(part: TargetPart, nets: Nets, points: Points, to: Tensor, whole: Tensor) -> Tensor:
    """Return the clean image (B, C, H, W) that the straight line from x_t to the end of the first leg aims at.

    The leg ends at level `to` (B,). It follows the direction, in as many solver steps as that has, or the target
    network itself where the leg is not the `whole` (B,) way.
    """
    x, t = points.x_t, points.t
    if points.solver is euler_step:
        aim = points.denoise(x, t)
    else:
        near = torch.minimum(to, t * (1 - LEAST_WAY))
        aim = x - expand(t / (t - near), x) * (x - points.solver(points.denoise, x, t, near))
    if part.first == "own":
        aim = torch.where(expand(whole, x), aim, call(nets.target, points, x, t, to))
    return aim


def build_two_leg(part: TargetPart) -> TargetRule:
    """The average velocity u from t to r must reach a v1 + (1 - a) u(x_m, m, r), where a leg with v1 leads to x_m.

    With h the gap in rectified flow's time and m = t - a h. The residual divided by a is that of SoFlow's consistency,
    (f(x_t, t, r) - f(x_m, m, r)) / (t - m) (Luo et al. 2026), and for a -> 0 MeanFlow's; undivided and pulling
    by a it is alpha-Flow's (Zhang et al. 2025). a = 1 is flow matching, a = 1/2 with the network's own first leg a
    shortcut model (Frans et al. 2025), a teacher's leg of random length CTM without discriminator (Kim et al. 2024).
    """
    flow, derivative = RectifiedFlow(), build_average(part)

    def two_leg(nets: Nets, points: Points) -> Comparison:
        if len(points.times) == 2:
            return derivative(nets, points)
        (t, middle, r), x = points.times, points.x_t
        whole = middle <= r
        with torch.no_grad():
            aim = first_leg(part, nets, points, middle, whole)
            velocity = (x - aim) / expand(t, x) - aim
            x_m = aim + expand(middle / t, x) * (x - aim)
            gap = torch.where(t > r, flow.time(t) - flow.time(r), torch.ones_like(t))
            a = torch.where(whole, torch.ones_like(t), (flow.time(t) - flow.time(middle)) / gap)

        def prediction() -> Tensor:
            return average_velocity(nets.student, points, x, t, r)

        def rest() -> Tensor:
            return average_velocity(nets.target, points, x_m, middle, r)

        u, u_m = paired_passes(nets, prediction, rest)
        with torch.no_grad():
            share = expand(a, x)
            # Where the first leg is the whole way, the network's own is empty, and may be undefined at r = 0.
            target = torch.where(share < 1, share * velocity + (1 - share) * u_m, velocity)
            if part.residual == "rate":
                target = u + (target - u) / share
        return Stepped(u, target, a) if part.residual == "step" else Pair(u, target)

    return two_leg


def leg_share(part: LegsPart, done: float) -> float:
    """Return a in (0, 1], the share of the gap that the first leg takes, when `done` in [0, 1] of the run is over.

    `exponential` is SoFlow's law, start (end / start)^done; `sigmoid` alpha-Flow's, 1 - sigmoid(gamma (x - 1/2)) with x
    from 0 to 1 between `begins` and `ends`, set to 1 above 1 - end and to `end` below it.
    """
    if part.law == "exponential":
        return part.start * (part.end / part.start) ** done
    if part.law == "sigmoid":
        x = (done - part.begins) / (part.ends - part.begins)
        a = (1 - math.tanh(part.gamma * (x - 0.5) / 2)) / 2
        return 1.0 if a > 1 - part.end else max(a, part.end)
    return part.start


def at_end(part: LegsPart, done: float) -> bool:
    """Whether a law that shrinks is at its end when `done` in [0, 1] of the run is over."""
    return part.law in ("exponential", "sigmoid") and leg_share(part, done) <= part.end


def middle_level(part: LegsPart, t: Tensor, r: Tensor, a: float | Tensor) -> Tensor:
    """Return the noise level (B,) after a share `a` (or (B,) of them) of the way from t to r in rectified flow's time.

    Float64 in and out. A leg is at least `part.shortest` long, or the whole way where that is shorter; then it is r.
    """
    flow = RectifiedFlow()
    tau = flow.time(t)
    whole = tau - flow.time(r)
    leg = (a * whole).clamp_min(part.shortest)
    # With a margin for rounding, so that a gap meant to be `shortest` counts as such.
    return torch.where(leg >= whole * (1 - 1e-9), r, flow.level(tau - leg))
