"""Samplers of diffusion models: solvers of the probability-flow ODE, and one of its stochastic sister.

Each is a pure function of (denoise, x, sigmas, streams, label). `x` (B, C, H, W) is at sigmas[0]; `sigmas` descend
strictly and the solver goes on from the last of them to 0 with one Euler step, which is the denoiser's answer itself.
`denoise(x, t, label)` maps x at t (B,) to the expected clean image. Steps themselves live in `diffusion.solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmtool.diffusion.solvers import SOLVERS, euler_step
from cmtool.rng import SampleStreams

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
OneStep = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor], Tensor]


def _levels(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, dtype=x.dtype, device=x.device)


def _bind(denoise: Denoiser, label: Tensor | None, clamp: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def bound(x: Tensor, t: Tensor) -> Tensor:
        answer = denoise(x, t, label)
        return answer.clamp(-1.0, 1.0) if clamp else answer

    return bound


def _pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(sigmas, [*sigmas[1:], 0.0], strict=True))


def _solve(step: OneStep, bound: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Sequence[float]) -> Tensor:
    for t, r in _pairs(sigmas):
        # The slope does not exist at 0 and a model knows nothing below sigma_min, so the last step is Euler's.
        x = (step if r > 0 else euler_step)(bound, x, _levels(x, t), _levels(x, r))
    return x


@torch.no_grad()
def sample_euler(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """Euler's method, order 1; n sigmas are n evaluations. Equal to DDIM in this process."""
    return _solve(euler_step, _bind(denoise, label, clamp), x, sigmas)


@torch.no_grad()
def sample_midpoint(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """The midpoint method on t^(1/3) (DPM-Solver-2, called `dpm` in OpenAI's code), order 2; 2n - 1 evaluations."""
    return _solve(SOLVERS["midpoint"], _bind(denoise, label, clamp), x, sigmas)


@torch.no_grad()
def sample_heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Heun's method, order 2; n sigmas are 2n - 1 evaluations (Karras et al. 2022, Algorithm 2).

    `churn` (S_churn) adds noise before each step whose level lies in [churn_min, churn_max], raising it by a factor
    1 + min(churn / n, sqrt(2) - 1); `churn_noise` (S_noise) scales that noise. Without churn the map is
    deterministic and no noise is drawn.

    Raises:
        ValueError: if churn is asked for without streams.
    """
    if churn > 0 and streams is None:
        raise ValueError("churn needs noise streams")
    bound = _bind(denoise, label, clamp)
    most = min(churn / len(sigmas), math.sqrt(2.0) - 1.0)
    for t, r in _pairs(sigmas):
        gamma = most if churn_min <= t <= churn_max else 0.0
        if gamma > 0 and streams is not None:
            raised = t * (1.0 + gamma)
            x = x + math.sqrt(raised**2 - t**2) * churn_noise * streams.normal(x.shape[1:])
            t = raised
        x = (SOLVERS["heun"] if r > 0 else euler_step)(bound, x, _levels(x, t), _levels(x, r))
    return x


@torch.no_grad()
def sample_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """Ancestral sampling: Euler down to sigma_down, then fresh noise up to the next level; n evaluations.

    sigma_up^2 = r^2 (t^2 - r^2) / t^2 and sigma_down^2 = r^2 - sigma_up^2 for a step from t to r.
    """
    bound = _bind(denoise, label, clamp)
    for t, r in _pairs(sigmas):
        up = math.sqrt(r**2 * (t**2 - r**2) / t**2)
        down = r**2 / t
        x = euler_step(bound, x, _levels(x, t), _levels(x, down))
        if up > 0:
            x = x + up * streams.normal(x.shape[1:])
    return x
