"""One-step and multistep sampling of consistency models (Song et al. 2023, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cmtool.diffusion.process import VarianceExploding
from cmtool.rng import SampleStreams


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


def walk(
    model: ConsistencyFunction,
    x: Tensor,
    streams: SampleStreams,
    times: Sequence[float],
    label: Tensor | None,
    after: AfterStep,
) -> Tensor:
    """The loop of Algorithms 1 and 4: evaluate at times[0], apply `after`; renoise to the next time and repeat.

    `x` (B, C, H, W) is at times[0] already. The noise added for time tau is sqrt(tau^2 - sigma_min^2), because f
    answers at sigma_min. Returns what `after` returned last; len(times) evaluations.
    """
    process = VarianceExploding(sigma_min=model.sigma_min)
    for index, level in enumerate(times):
        t = torch.full((len(x),), level, dtype=x.dtype, device=x.device)
        if index:
            x = process.renoise(x, streams.normal(x.shape[1:]), t)
        x = after(model(x, t, label), index == len(times) - 1)
    return x


def to_range(x: Tensor, last: bool = True) -> Tensor:
    """Clamp to [-1, 1], where images live."""
    return x.clamp(-1.0, 1.0)


def unchanged(x: Tensor, last: bool = True) -> Tensor:
    """Leave f's answer as it is: for data that is not confined to [-1, 1]."""
    return x


@torch.no_grad()
def sample_multistep(
    model: ConsistencyFunction,
    streams: SampleStreams,
    times: Sequence[float],
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """Sample one batch with len(times) evaluations an image; one time is one-step sampling.

    Args:
        model: a consistency model.
        streams: the noise of each sample; B is its length. One draw is taken for each evaluation.
        times: strictly decreasing noise levels, checked by `validate_times`; times[0] is usually sigma_max.
        label: classes (B,) of a conditional model.
        clamp: confine every answer to [-1, 1], between the evaluations and at the end, as the released code does
            (Algorithm 1 itself does not); False for data that is no image.

    Returns:
        x0 (B, C, H, W) in float; sample i depends on its own stream alone.
    """
    x = times[0] * streams.normal(model.image_shape)
    return walk(model, x, streams, times, label, to_range if clamp else unchanged)
