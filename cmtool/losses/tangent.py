"""Target rules that differentiate the network along the flow: continuous time, sCM, MeanFlow.

All derivatives are taken as t d/dt = d/d(ln t) in variance-exploding coordinates, x moving by t dx/dt and the time by
t. In TrigFlow that is cos(tau) sin(tau) d/dtau, the rearrangement that keeps the tangent finite at both ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmtool.config.parts import TargetPart
from cmtool.diffusion.process import RectifiedFlow, TrigFlow, expand
from cmtool.losses.objective import Pair, Slope, TargetRule
from cmtool.losses.target import call
from cmtool.losses.terms import Nets, Points

Function = Callable[[Tensor, Tensor], Tensor]


def log_derivative(function: Function, x: Tensor, t: Tensor, shift: Tensor, part: TargetPart) -> tuple[Tensor, Tensor]:
    """Return function(x, t) and its derivative in ln t along the flow, (B, C, H, W) each.

    `shift` is t dx/dt = x - D(x, t). Forward mode is exact; the central difference moves both ways by
    `part.difference_step`, and costs two more passes of a network that need not support derivatives.
    """
    if part.derivative == "forward":
        with warnings.catch_warnings():
            # The first forward-mode derivative makes torch load a module that warns about itself.
            warnings.simplefilter("ignore", FutureWarning)
            value, slope = torch.func.jvp(function, (x, t), (shift, t))[:2]
        return value, slope
    h = part.difference_step
    ahead = function(x + h * shift, t * (1 + h))
    behind = function(x - h * shift, t * (1 - h))
    return function(x, t), (ahead - behind) / (2 * h)


def build_limit(part: TargetPart) -> TargetRule:
    """Consistency in continuous time: df/dt along the flow must vanish (Song et al. 2023, Theorems 3 to 6)."""

    def limit(nets: Nets, points: Points) -> Slope:
        with torch.no_grad():
            shift = points.x_t - points.denoise(points.x_t, points.t)

        def f(x: Tensor, t: Tensor) -> Tensor:
            return call(nets.student, points, x, t)

        if part.stop_gradient:
            with torch.no_grad():
                _, slope = log_derivative(f, points.x_t, points.t, shift, part)
            value = f(points.x_t, points.t)
        else:
            value, slope = log_derivative(f, points.x_t, points.t, shift, part)
        return Slope(value, slope / expand(points.t, slope), part.stop_gradient)

    return limit


def normalized(g: Tensor, part: TargetPart) -> Tensor:
    """Return the tangent g (B, C, H, W) as g / (|g| + c) with the norm of an image, clipped to [-1, 1], or as it is."""
    if part.normalize == "norm":
        return g / (torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True) + part.c)
    return g.clamp(-1, 1) if part.normalize == "clip" else g


def warmed(share: float | Tensor, warmup: float) -> float | Tensor:
    """Return the factor that rises from 0 to 1 over the first `warmup` of a run, at `share` of it (Lu & Song 2025)."""
    if warmup <= 0:
        return 1.0
    return (share / warmup).clamp_max(1.0) if isinstance(share, Tensor) else min(1.0, share / warmup)


def trig_tangent(
    x_t: Tensor, t: Tensor, clean: Tensor, raw: Tensor, raw_slope: Tensor, sigma_data: float, warm: float | Tensor
) -> Tensor:
    """Return g = -cos^2 (sigma_data F - dx/dtau) - warm cos sin (x + sigma_data dF/dtau), (B, C, H, W).

    Everything in TrigFlow: F = `raw`, cos sin dF/dtau = `raw_slope`; `x_t` at level t (B,) and the denoiser's answer
    `clean` in variance-exploding coordinates. For warm = 1 it is cos(tau) df/dtau (Lu & Song 2025, Algorithm 1).
    """
    tau = TrigFlow(sigma_data).time(t)
    cos, sin = expand(tau.cos(), x_t), expand(tau.sin(), x_t)
    velocity = cos * sigma_data * (x_t - clean) / expand(t, x_t) - sin * clean
    return -(cos**2) * (sigma_data * raw - velocity) - warm * (cos**2 * sin * x_t + sigma_data * raw_slope)


def build_trig(part: TargetPart) -> TargetRule:
    """The rule of sCM: F must reach F + g with the tangent g of the consistency function in TrigFlow.

    A network with EDM's scalings is one of TrigFlow's with the sign of F flipped; it keeps its conditioning.
    """

    def trig(nets: Nets, points: Points) -> Pair:
        student: Any = nets.student
        process = student.process
        sign = 1.0 if process.parameterization == "trig" else -1.0

        def raw(x: Tensor, t: Tensor) -> Tensor:
            return call(student.raw, points, x, t)

        with torch.no_grad():
            clean = points.denoise(points.x_t, points.t)
            value, slope = log_derivative(raw, points.x_t, points.t, points.x_t - clean, part)
            warm = warmed(points.share, part.warmup)
            g = trig_tangent(points.x_t, points.t, clean, sign * value, sign * slope, process.sigma_data, warm)
            target = sign * value + normalized(g, part)
        return Pair(sign * raw(points.x_t, points.t), target)

    return trig


def average_velocity(model: Any, points: Points, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return u (B, C, H, W), the average velocity of rectified flow from (x, t) to r that a model of two times gives.

    Where the network gives the image instead (scalings of EDM), u is the slope of the line to it (pixel MeanFlow).
    """
    if model.process.parameterization == "flow":
        return call(model.raw, points, x, t, r)
    aim = call(model, points, x, t, r)
    return (x - aim) / expand(t, x) - aim


def build_average(part: TargetPart) -> TargetRule:
    """MeanFlow: the average velocity u from t to r must reach v - (t - r) du/dt, times of rectified flow.

    Geng et al. 2025, Eq. 8. The network takes r as its second time. The derivative is along the flow of the direction,
    or along the network's own, u from t to t, whose noise is not the sample's (improved MeanFlow, Geng et al. 2025b).
    """
    flow = RectifiedFlow()

    def average(nets: Nets, points: Points) -> Pair:
        def u(x: Tensor, t: Tensor) -> Tensor:
            return average_velocity(nets.student, points, x, t, points.r)

        with torch.no_grad():
            clean = points.denoise(points.x_t, points.t)
            shift = points.x_t - clean
            own = call(nets.student, points, points.x_t, points.t, points.t) if part.tangent == "own" else clean
            _, slope = log_derivative(u, points.x_t, points.t, points.x_t - own, part)
            velocity = shift / expand(points.t, shift) - clean
            # slope is du/d(ln t), and d(ln t)/dtau = (dt/dtau) / t.
            span = (flow.time(points.t) - flow.time(points.r)) * flow.speed(points.t) / points.t
            target = velocity - expand(span, slope) * slope
        return Pair(u(points.x_t, points.t), target)

    return average
