"""Guidance: a slope that leads further away from a worse answer than the model's own slope does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmtool.diffusion.process import expand

# (x, t, label), and what else the model is told -> clean image
Answer = Callable[..., Tensor]


def guide(
    strong: Answer, scale: float, weak: Answer | None = None, interval: tuple[float, float] | None = None
) -> Answer:
    """Return D_less + scale (D - D_less) of a denoiser D, as a denoiser.

    D_less is the answer of `weak`, a smaller or less trained model (autoguidance, Karras et al. 2024), or without one
    that of `strong` to no label (classifier-free guidance, Ho & Salimans 2021). An `interval` of noise levels confines
    it to them (Kynkaanniemi et al. 2024). A scale of 1 asks nothing of D_less.
    """

    def answer(x: Tensor, t: Tensor, label: Tensor | None = None, **told: Tensor) -> Tensor:
        own = strong(x, t, label, **told)
        if scale == 1 or (weak is None and label is None):
            return own
        unlabeled = None if label is None else torch.full_like(label, -1)
        less = strong(x, t, unlabeled, **told) if weak is None else weak(x, t, label, **told)
        guided = less + scale * (own - less)
        if interval is None:
            return guided
        return torch.where(expand((t >= interval[0]) & (t <= interval[1]), x), guided, own)

    return answer


def numbers_of(scale: float, interval: tuple[float, float] | None) -> Tensor:
    """Return what a guided network is told of a scale and an interval of noise levels, (1, 3).

    ln of the scale, and the first and last time that is guided in rectified flow's time (Geng et al. 2025b).
    """
    low, high = (0.0, math.inf) if interval is None else interval
    return torch.tensor([[math.log(scale), low / (1 + low), 1.0 if math.isinf(high) else high / (1 + high)]])


class Told:
    """A model of two times with guidance, (B, 3) or (1, 3), beside every time to go to; all else is the model's."""

    def __init__(self, model: Any, guidance: Tensor) -> None:
        self._model, self._guidance = model, guidance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _beside(self, t: Tensor, r: Tensor | None) -> Tensor:
        to = torch.zeros_like(t) if r is None else r
        return torch.cat([to[:, None], self._guidance.to(to).expand(len(to), 3)], dim=1)

    def __call__(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, r: Tensor | None = None, **told: Tensor
    ) -> Tensor:
        """Return the model's answer, (B, C, H, W)."""
        return self._model(x, t, label, self._beside(t, r), **told)

    def raw(self, x: Tensor, t: Tensor, label: Tensor | None = None, r: Tensor | None = None, **told: Tensor) -> Tensor:
        """Return the network's answer, (B, C, H, W)."""
        return self._model.raw(x, t, label, self._beside(t, r), **told)
