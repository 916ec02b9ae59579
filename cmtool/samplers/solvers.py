"""Samplers as pure functions `(denoise, x, sigmas, noise) -> x`, one for each row of `plan.SAMPLERS`.

`x` (B, C, H, W) is at sigmas[0]. `sigmas` descend strictly to the level where the sampler ends: 0, or the model's
sigma_min for those that stop there. `denoise(x, t)` maps x at t (B,) to the expected clean image, with label and clamp
already bound (`generate.bind`); `noise()` draws unit noise shaped like x. n evaluations take n + 1 sigmas.

The diffusion samplers solve the probability-flow ODE dx/dt = (x - D) / t = e(x, t) with the noise level as time, where
the exponential integrators of the literature take a simple form: DPM-Solver++ extrapolates D, and DEIS extrapolates e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from cmtool.diffusion.process import VarianceExploding
from cmtool.diffusion.solvers import Step, dpmpp_2m_along, euler_step, heun_step, midpoint_step

Noise = Callable[[], Tensor]

# Points of the Gauss-Legendre rule that integrates Lagrange's polynomials.
_NODES = (-0.9324695142031521, -0.6612093864662645, -0.2386191860831969)
_WEIGHTS = (0.1713244923791704, 0.3607615730481386, 0.4679139345726910)


class Denoise(Protocol):
    """A model with its label and clamp bound; `r` is the second time of a model of two times."""

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        """Return the clean image (B, C, H, W) of x at t (B,)."""


def no_noise() -> Tensor:
    """The noise of a sampler that draws none: a draw is an error.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("this sampler was given no noise to draw")


def levels(x: Tensor, value: float) -> Tensor:
    """Return a noise level for each image of x: (B,), in its dtype and on its device."""
    return torch.full((len(x),), value, dtype=x.dtype, device=x.device)


def jumps(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """MeanFlow's sampler: straight jumps from one level to the next, without noise in between.

    `denoise(x, t, r)` returns the clean end of the straight line from t to r.
    """
    for t, r in pairwise(sigmas):
        aim = denoise(x, levels(x, t), levels(x, r))
        x = aim + (r / t) * (x - aim)
    return x


def _one_step(step: Step, denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    for t, r in pairwise(sigmas):
        # The slope does not exist at 0 and a model is undefined below sigma_min, so the last step is Euler's.
        x = (step if r > 0 else euler_step)(denoise, x, levels(x, t), levels(x, r))
    return x


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Euler's method, order 1, one evaluation a step. In this process it equals DDIM."""
    return _one_step(euler_step, denoise, x, sigmas)


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Heun's method, order 2; n levels above 0 take 2n - 1 evaluations (Karras et al. 2022, Algorithm 1)."""
    return _one_step(heun_step, denoise, x, sigmas)


def midpoint(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """The midpoint method on t^(1/3) (DPM-Solver-2, called `dpm` in OpenAI's code), order 2; 2n - 1 evaluations."""
    return _one_step(midpoint_step, denoise, x, sigmas)


def ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Ancestral sampling: Euler down to sigma_down, then fresh noise up to the next level; one evaluation a step.

    For a step from t to r, sigma_up^2 = r^2 (t^2 - r^2) / t^2 and sigma_down^2 = r^2 - sigma_up^2.
    """
    for t, r in pairwise(sigmas):
        up = math.sqrt(r**2 * (t**2 - r**2) / t**2)
        x = euler_step(denoise, x, levels(x, t), levels(x, r**2 / t))
        if up > 0:
            x = x + up * noise()
    return x


def dpm2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """DPM-Solver-2: the midpoint in ln t, order 2; n levels above 0 take 2n - 1 evaluations (Lu et al. 2022a).

    Algorithm 1 with half a step of h / 2 in ln t: x_r = x + (r - t) e(x_s, s) at s = sqrt(t r).
    """
    for t, r in pairwise(sigmas[:-1]):
        s = math.sqrt(t * r)
        clean = denoise(x, levels(x, t))
        middle = clean + (s / t) * (x - clean)
        x = x + (r - t) / s * (middle - denoise(middle, levels(x, s)))
    return denoise(x, levels(x, sigmas[-2]))


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """DPM-Solver++ 2M, order 2 with one evaluation a step (Lu et al. 2022b, Algorithm 2)."""
    x = dpmpp_2m_along(lambda at, t: denoise(at, levels(at, t)), x, sigmas[:-1])
    return denoise(x, levels(x, sigmas[-2]))


def deis(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, order: int = 3) -> Tensor:
    """DEIS: the slope is a polynomial through the last `order` of them (Zhang & Chen 2023); one evaluation a step.

    The polynomial is in ln t and integrated exactly. As published, the first step is Euler's and the second knows two
    slopes, which leaves an error of order 2 in the limit of many steps. From large levels, where the slope hardly
    changes, that error shows only in the last digits.
    """
    history: list[tuple[float, Tensor]] = []
    for t, r in pairwise(sigmas[:-1]):
        slope = (x - denoise(x, levels(x, t))) / t
        history = [(t, slope), *history][:order]
        x = deis_step(x, history, r)
    return denoise(x, levels(x, sigmas[-2]))


def deis_step(x: Tensor, history: Sequence[tuple[float, Tensor]], r: float) -> Tensor:
    """Return x at level r, from its level history[0][0], by the polynomial through the slopes of `history`.

    `history`: (level, slope) pairs, newest first.
    """
    weights = lagrange_integrals([level for level, _ in history], history[0][0], r)
    return x + sum(weight * past for weight, (_, past) in zip(weights, history, strict=True))


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals over t from `start` to `end` of Lagrange's polynomials in ln t with the given nodes (times).

    Six Gauss-Legendre points in ln t, where dt = t d(ln t), are accurate to rounding for the steps of a sampler.
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


def progressive(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """The sampler of progressive distillation: Euler steps between the student's own levels, one evaluation each.

    It ends at sigmas[-1] = sigma_min; the student was never trained for a step to 0.
    """
    for t, r in pairwise(sigmas):
        clean = denoise(x, levels(x, t))
        x = clean + (r / t) * (x - clean)
    return x


class ConsistencyFunction(Protocol):
    """What a sampler needs of a model: its range, the shape of an image, and f(x, t, label)."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def sigma_min(self) -> float:
        """The noise level at which f is the identity."""

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Map x (B, C, H, W) at t (B,) to the clean end of its trajectory."""


# What happens to f's answer before it is noised again (last = False) or returned (last = True): the place where
# editing puts the known part back.
AfterStep = Callable[[Tensor, bool], Tensor]


def unchanged(x: Tensor, last: bool = True) -> Tensor:
    """Leave f's answer as it is."""
    return x


def multistep(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, after: AfterStep = unchanged
) -> Tensor:
    """The loop of Algorithms 1 and 4: evaluate at sigmas[0], apply `after`; renoise to the next level and repeat.

    Args:
        denoise: a consistency model with its label and clamp bound.
        x: (B, C, H, W), at sigmas[0] already.
        sigmas: strictly decreasing noise levels; the last is sigma_min, where f answers. Returning from there to level
            t takes noise of sqrt(t^2 - sigma_min^2). n + 1 sigmas are n evaluations; one is one-step sampling.
        noise: draws unit noise shaped like x, once for each evaluation but the first.
        after: what happens to f's answers.

    Returns:
        What `after` returned last, (B, C, H, W).
    """
    process = VarianceExploding(sigma_min=sigmas[-1])
    for index, level in enumerate(sigmas[:-1]):
        t = levels(x, level)
        if index:
            x = process.renoise(x, noise(), t)
        x = after(denoise(x, t), index == len(sigmas) - 2)
    return x
