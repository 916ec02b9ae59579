"""The direction of a pair: a denoiser whose slope leads from x_t to x_r.

The sample's own image, the teacher, or the mean of the training images given x_t. With the sample's image one Euler
step lands on x0 + r z exactly, so consistency training is distillation with another denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmtool.config.parts import DirectionPart
from cmtool.diffusion.solvers import Denoise
from cmtool.errors import ConfigError
from cmtool.losses.draw import Nets
from cmtool.models import Model

Direction = Callable[[Nets, Tensor, "Tensor | None"], Denoise]

# Distances to every reference image are differences of large numbers: in float64 up to this many values.
_FLOAT64_VALUES = 20_000_000


@dataclass(frozen=True)
class Reference:
    """The images that a posterior mean runs over: (M, C, H, W) in [-1, 1], and their labels (M,) or None."""

    images: Tensor
    labels: Tensor | None = None


def posterior_mean(x: Tensor, t: Tensor, reference: Reference, label: Tensor | None = None) -> Tensor:
    """E[x0 | x_t = x] for data spread evenly over the reference images: a softmax of -|x - x_j|^2 / (2 t^2).

    x (B, C, H, W), t (B,); with labels only images of the same class count (a class without images: all of them).
    Source: Xu et al. 2023 (stable target fields); Stable Consistency Tuning, Eq. 9.
    """
    flat = reference.images.flatten(1)
    exact = flat.numel() <= _FLOAT64_VALUES and x.device.type != "mps"
    dtype = torch.float64 if exact else torch.float32
    bank, point = flat.to(dtype), x.flatten(1).to(dtype)
    # |x|^2 is the same for every image and falls out of the softmax.
    closeness = point @ bank.T - (bank**2).sum(1) / 2
    logits = closeness / (t.to(dtype) ** 2)[:, None]
    if label is not None and reference.labels is not None:
        same = reference.labels[None, :] == label[:, None]
        same |= ~same.any(1, keepdim=True)
        logits = logits.masked_fill(~same, -torch.inf)
    return (logits.softmax(1) @ bank).to(x.dtype).reshape(x.shape)


def toward_sample() -> Direction:
    """The slope (x_t - x0) / t of consistency training."""
    return lambda nets, x0, label: lambda x, t: x0


def toward_teacher(teacher: Model, guidance: float = 1.0) -> Direction:
    """The slope of the teacher's probability-flow ODE, with classifier-free guidance (Ho & Salimans 2021)."""

    def direction(nets: Nets, x0: Tensor, label: Tensor | None) -> Denoise:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            conditional = teacher(x, t.to(x.dtype), label)
            if guidance == 1 or label is None:
                return conditional
            free = teacher(x, t.to(x.dtype), torch.full_like(label, -1))
            return free + guidance * (conditional - free)

        return denoise

    return direction


def toward_target(nets: Nets, x0: Tensor, label: Tensor | None) -> Denoise:
    """The slope of the target network's own flow: in progressive distillation the student of the stage before."""
    return lambda x, t: nets.target(x, t.to(x.dtype), label)


def toward_posterior_mean(reference: Reference) -> Direction:
    """The slope of the probability-flow ODE of the reference images themselves."""
    return lambda nets, x0, label: lambda x, t: posterior_mean(x, t, reference, label)


def toward_batch_mean(nets: Nets, x0: Tensor, label: Tensor | None) -> Denoise:
    """The same with the images of the forward pass alone as reference."""
    return lambda x, t: posterior_mean(x, t, Reference(x0, label), label)


def build_direction(part: DirectionPart, teacher: Model | None, reference: Reference | None) -> Direction:
    """Return the direction that `part` names.

    Raises:
        ConfigError: if it needs a teacher or reference images and there are none.
    """
    if part.kind == "sample":
        return toward_sample()
    if part.kind == "target":
        return toward_target
    if part.kind == "teacher":
        if teacher is None:
            raise ConfigError("a teacher's direction needs a teacher.", "add --teacher MODEL")
        return toward_teacher(teacher, part.guidance)
    if part.pool == "batch":
        return toward_batch_mean
    if reference is None:
        raise ConfigError("the posterior mean needs reference images, and none were given.")
    return toward_posterior_mean(reference)
