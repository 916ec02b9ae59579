"""One-step and multistep sampling of consistency models (Song et al. 2023, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from cmtool.diffusion.process import VarianceExploding
from cmtool.samplers.solvers import Denoise, Noise, levels


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
