"""Guidance: a slope that leads further from a worse answer than the model's own does."""

from __future__ import annotations

from collections.abc import Callable

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
