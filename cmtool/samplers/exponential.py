"""Fast samplers of diffusion models that remember earlier slopes, and those of distilled ones.

All solve the probability-flow ODE dx/dt = (x - D) / t = e(x, t) with the noise level as time, where the exponential
integrators of the literature take a simple form: D is what DPM-Solver++ extrapolates, e what DEIS does. The signature
is that of `samplers.ode`: `x` at sigmas[0], strictly descending; a last step to 0 gives the denoiser's answer there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmtool.rng import SampleStreams
from cmtool.samplers.multistep import to_range, unchanged

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Points of the Gauss-Legendre rule that integrates Lagrange's polynomials.
_NODES = (-0.9324695142031521, -0.6612093864662645, -0.2386191860831969)
_WEIGHTS = (0.1713244923791704, 0.3607615730481386, 0.4679139345726910)


def _ask(denoise: Denoiser, x: Tensor, t: float, label: Tensor | None, clamp: bool) -> Tensor:
    answer = denoise(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), label)
    return (to_range if clamp else unchanged)(answer)


@torch.no_grad()
def sample_dpm2(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """DPM-Solver-2: the midpoint in ln t, order 2; n sigmas are 2n - 1 evaluations (Lu et al. 2022a, Algorithm 1).

    With half a step of h / 2 in ln t, x_r = x + (r - t) e(x_s, s) at s = sqrt(t r).
    """
    for t, r in pairwise(sigmas):
        s = math.sqrt(t * r)
        clean = _ask(denoise, x, t, label, clamp)
        middle = clean + (s / t) * (x - clean)
        x = x + (r - t) / s * (middle - _ask(denoise, middle, s, label, clamp))
    return _ask(denoise, x, sigmas[-1], label, clamp)


@torch.no_grad()
def sample_dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """DPM-Solver++ 2M, order 2 with one evaluation a step (Lu et al. 2022b, Algorithm 2).

    D is extrapolated linearly in ln t to the middle of the step.
    """
    before: tuple[float, Tensor] | None = None
    for t, r in pairwise(sigmas):
        clean = _ask(denoise, x, t, label, clamp)
        ahead = clean
        if before is not None:
            ahead = clean + math.log(t / r) / (2 * math.log(before[0] / t)) * (clean - before[1])
        x = (r / t) * x + (1 - r / t) * ahead
        before = (t, clean)
    return _ask(denoise, x, sigmas[-1], label, clamp)


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals over t from `start` to `end` of Lagrange's polynomials in ln t with the given nodes (times).

    By six Gauss-Legendre points in ln t, t d(ln t) being the measure: accurate to rounding for the steps of a sampler.
    """
    logs = [math.log(node) for node in nodes]
    middle, half = (math.log(start) + math.log(end)) / 2, (math.log(end) - math.log(start)) / 2
    places = [(sign * node, weight) for node, weight in zip(_NODES, _WEIGHTS, strict=True) for sign in (-1.0, 1.0)]
    found = []
    for j, own in enumerate(logs):
        total = 0.0
        for place, weight in places:
            u = middle + half * place
            value = math.prod((u - other) / (own - other) for k, other in enumerate(logs) if k != j)
            total += weight * half * value * math.exp(u)
        found.append(total)
    return found


@torch.no_grad()
def sample_deis(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
    order: int = 3,
) -> Tensor:
    """DEIS of order 3: the slope is a polynomial through the last three (Zhang & Chen 2023); one evaluation a step.

    The polynomial is in ln t and integrated exactly. As published the first step is Euler's and the second knows two
    slopes: with steps without end the first would leave an error of order 2. From large levels, where the slope hardly
    changes, that shows only in the last digits.
    """
    history: list[tuple[float, Tensor]] = []
    for t, r in pairwise(sigmas):
        slope = (x - _ask(denoise, x, t, label, clamp)) / t
        history = [(t, slope), *history][:order]
        x = deis_step(x, history, r)
    return _ask(denoise, x, sigmas[-1], label, clamp)


def deis_step(x: Tensor, history: Sequence[tuple[float, Tensor]], r: float) -> Tensor:
    """Return x at level r, from its level history[0][0], by the polynomial through the slopes of `history`.

    `history`: (level, slope) pairs, newest first.
    """
    weights = lagrange_integrals([level for level, _ in history], history[0][0], r)
    return x + sum(weight * past for weight, (_, past) in zip(weights, history, strict=True))


@torch.no_grad()
def sample_progressive(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
    last: float = 0.002,
) -> Tensor:
    """The sampler of progressive distillation: Euler steps between the student's own levels, ending at `last`.

    n sigmas are n evaluations; there is no step to 0, which the student was never trained for.
    """
    for t, r in zip(sigmas, [*sigmas[1:], last], strict=True):
        clean = _ask(denoise, x, t, label, clamp)
        x = clean + (r / t) * (x - clean)
    return x


@torch.no_grad()
def sample_jumps(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    streams: SampleStreams | None = None,
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """MeanFlow's sampler: jumps along straight lines from one level to the next and to 0, no noise in between.

    `model(x, t, label, r)` answers the clean end of the line from t to r; n sigmas are n evaluations.
    """
    for t, r in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        levels = [torch.full((len(x),), level, dtype=x.dtype, device=x.device) for level in (t, r)]
        aim = (to_range if clamp else unchanged)(model(x, levels[0], label, levels[1]))
        x = aim + (r / t) * (x - aim)
    return x
