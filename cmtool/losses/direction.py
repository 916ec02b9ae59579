"""The direction of a pair: a denoiser whose slope leads from x_t to x_r.

The sample's own image, the teacher, or the mean of the training images given x_t. With the sample's image one Euler
step lands on x0 + r z exactly, so consistency training is distillation with another denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cmtool.config.parts import AugmentPart, DirectionPart
from cmtool.config.schema import RunConfig
from cmtool.diffusion.guidance import guide
from cmtool.diffusion.process import RectifiedFlow, expand
from cmtool.diffusion.solvers import Denoise
from cmtool.errors import ConfigError
from cmtool.losses.terms import Nets, Slice, evaluating, told_of
from cmtool.models import Model
from cmtool.rng import batch_uniform, moved


class Direction(Protocol):
    """From the networks and the images of a pass to the denoiser whose slope is followed."""

    def __call__(self, nets: Nets, x0: Tensor, label: Tensor | None, augment: Tensor | None = None) -> Denoise:
        """Return it for images x0 (B, C, H, W) with labels (B,), and augmentation labels (B, L) if there are any."""


# Distances to reference images are differences of large numbers; up to this many values they are taken in float64.
_FLOAT64_VALUES = 20_000_000


@dataclass(frozen=True)
class Reference:
    """The images that a posterior mean runs over: (M, C, H, W) in [-1, 1], and their labels (M,) or None.

    `whole` says that they are all the images that training noises, not a subset.
    """

    images: Tensor
    labels: Tensor | None = None
    whole: bool = True


def posterior_mean(
    x: Tensor, t: Tensor, reference: Reference, label: Tensor | None = None, own: Tensor | None = None
) -> Tensor:
    """E[x0 | x_t = x] for data spread evenly over the reference images: a softmax of -|x - x_j|^2 / (2 t^2).

    Args:
        x: (B, C, H, W).
        t: noise levels (B,).
        reference: the images x_j.
        label: if given, only images of the row's class count; for -1, and for a class that the reference does
            not have, all of them count.
        own: the image (B, C, H, W) that each row of x was made from, for a reference that is a subset. It counts as one
            of the images, and only once if it is among them. Without it the mean at small t would be that of others.

    Returns:
        (B, C, H, W) in x's dtype. Source: Xu et al. 2023 (stable target fields, whose reference batch holds the own
        image); Stable Consistency Tuning, Eq. 9.
    """
    flat = reference.images.flatten(1)
    exact = flat.numel() <= _FLOAT64_VALUES and x.device.type != "mps"
    dtype = torch.float64 if exact else torch.float32
    bank, point = flat.to(dtype), x.flatten(1).to(dtype)
    # The squares of a large bank are summed without being stored: the bank alone may fill half of a small GPU.
    half = (bank**2).sum(1) / 2 if exact else torch.linalg.vector_norm(bank, dim=1) ** 2 / 2
    foreign = _foreign(reference.labels, label, fall_back=own is None)
    # |x|^2 is the same for every image and falls out of the softmax.
    logits = _allowed(point @ bank.T - half, foreign) / (t.to(dtype) ** 2)[:, None]
    if own is None:
        return (logits.softmax(1) @ bank).to(x.dtype).reshape(x.shape)
    mine = own.flatten(1).to(dtype)
    size = (mine**2).sum(1) / 2
    among = _allowed(mine @ bank.T - half, foreign).amax(1) >= size * (1 - (1e-9 if exact else 1e-5))
    one = (((point * mine).sum(1) - size) / t.to(dtype) ** 2).masked_fill(among, -torch.inf)
    weights = torch.cat([logits, one[:, None]], 1).softmax(1)
    return (weights[:, :-1] @ bank + weights[:, -1:] * mine).to(x.dtype).reshape(x.shape)


def _foreign(labels: Tensor | None, label: Tensor | None, fall_back: bool) -> Tensor | None:
    """Return which images (B, M) are of another class than the row.

    A row without a class (a dropped label, -1) excludes none; with `fall_back` neither does one whose class is missing.
    """
    if labels is None or label is None:
        return None
    other = (labels[None, :] != label[:, None]) & (label >= 0)[:, None]
    return other & ~other.all(1, keepdim=True) if fall_back else other


def _allowed(closeness: Tensor, foreign: Tensor | None) -> Tensor:
    return closeness if foreign is None else closeness.masked_fill(foreign, -torch.inf)


def toward_sample() -> Direction:
    """The slope (x_t - x0) / t of consistency training."""
    return lambda nets, x0, label, augment=None: lambda x, t: x0


def toward_teacher(
    teacher: Model, guidance: float = 1.0, weak: Model | None = None, interval: tuple[float, float] | None = None
) -> Direction:
    """The slope of the teacher's probability-flow ODE, guided away from its own answer to no label, or from `weak`."""
    guided = guide(teacher, guidance, weak, interval)

    def direction(nets: Nets, x0: Tensor, label: Tensor | None, augment: Tensor | None = None) -> Denoise:
        told = told_of(augment)
        return lambda x, t: guided(x, t.to(x.dtype), label, **told)

    return direction


def toward_guided_sample(part: DirectionPart) -> Direction:
    """The slope to the sample, guided by the instantaneous velocities that a network of two times gives itself.

    (1 - k) (w v + (1 - w) u(no label)) + k u(label) with the velocity v of the sample, w = `guidance`, k = `mix` and u
    from t to t: MeanFlow's (Geng et al. 2025, Eq. 19) with omega = w (1 - k), SoFlow's mixture of 1 - k. A network that
    is told of guidance has w and the interval that it was told, and k = 1 - 1 / w (iMF, Geng et al. 2025b). Images
    without a label, and noise levels outside the interval, keep v.
    """

    def direction(nets: Nets, x0: Tensor, label: Tensor | None, augment: Tensor | None = None) -> Denoise:
        if label is None:
            return lambda x, t: x0
        told = told_of(augment)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            w, k, inside = _asked(part, nets.guidance, t)
            with evaluating(nets.target):
                free = nets.target(x, t, torch.full_like(label, -1), t, **told)
                mixed = part.mix or nets.guidance is not None
                own = nets.target(x, t, label, t, **told) if mixed else free
            w, k = expand(w, x), expand(k, x)
            found = (1 - k) * (w * x0 + (1 - w) * free) + k * own
            return torch.where(expand((label >= 0) & inside, x), found, x0)

        return denoise

    return direction


def _asked(part: DirectionPart, told: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale w, share k of the own velocity, and whether the level is guided, (B,) each."""
    if told is None:
        low, high = part.interval or (0.0, math.inf)
        return torch.full_like(t, part.guidance), torch.full_like(t, part.mix), (t >= low) & (t <= high)
    log_w, first, last = told.to(t).unbind(1)
    tau = RectifiedFlow().time(t)
    return log_w.exp(), 1 - (-log_w).exp(), (tau >= first) & (tau <= last)


def build_guidances(config: RunConfig) -> Callable[[tuple[Tensor, ...], Slice], Tensor] | None:
    """Return the law, by rows, of the (B, 3) numbers that guided networks are told; None for other networks.

    The scale has a density proportional to 1 / w on [1, `guidance`], the interval begins evenly in [0, 1/2] and ends in
    [1/2, 1] of rectified flow's time. Where r = t it is the whole (Geng et al. 2025b, code).
    """
    if not config.network.guided:
        return None
    largest = math.log(config.recipe.direction.guidance)

    def guidances(levels: tuple[Tensor, ...], rows: Slice) -> Tensor:
        t, r = levels[0], levels[-1]
        u = batch_uniform((rows.total, 3), rows.seed, "guidance", rows.step, start=rows.start, count=len(t))
        told = moved(u.double() * torch.tensor([largest, 0.5, 0.5]) + torch.tensor([0.0, 0.0, 0.5]), t.device).to(
            t.dtype
        )
        whole = torch.cat([told[:, :1], torch.zeros_like(told[:, 1:2]), torch.ones_like(told[:, 1:2])], dim=1)
        return torch.where((t == r)[:, None], whole, told)

    return guidances


def toward_target(nets: Nets, x0: Tensor, label: Tensor | None, augment: Tensor | None = None) -> Denoise:
    """The slope of the target network's own flow: in progressive distillation the student of the stage before."""
    told = told_of(augment)
    return lambda x, t: nets.target(x, t.to(x.dtype), label, **told)


def toward_posterior_mean(reference: Reference, mirrors: bool = False) -> Direction:
    """The slope of the reference images' own probability-flow ODE; a subset is completed by the sample's own image.

    Augmented images have the mean of images augmented alike. Of mirror images (`mirrors`: the first augmentation label)
    that is the mirrored mean; for anything else the sample's own image stands alone, as in consistency training.
    """

    def direction(nets: Nets, x0: Tensor, label: Tensor | None, augment: Tensor | None = None) -> Denoise:
        def mean(x: Tensor, t: Tensor, own: Tensor) -> Tensor:
            return posterior_mean(x, t, reference, label, None if reference.whole else own)

        if augment is None:
            return lambda x, t: mean(x, t, x0)
        mirrored = expand(augment[:, 0] == 1, x0) if mirrors else torch.zeros_like(x0[:, :1, :1, :1], dtype=torch.bool)
        plain = expand((augment[:, int(mirrors) :] == 0).all(1), x0)

        def straight(images: Tensor) -> Tensor:
            return torch.where(mirrored, images.flip(-1), images)

        return lambda x, t: torch.where(plain, straight(mean(straight(x), t, straight(x0))), x0)

    return direction


def toward_batch_mean(nets: Nets, x0: Tensor, label: Tensor | None, augment: Tensor | None = None) -> Denoise:
    """The same slope, with only the images of the forward pass as reference."""
    return lambda x, t: posterior_mean(x, t, Reference(x0, label), label)


def build_direction(
    part: DirectionPart,
    teacher: Model | None,
    reference: Reference | None,
    weak: Model | None = None,
    augment: AugmentPart | None = None,
) -> Direction:
    """Return the direction that `part` names, for images augmented by the rules of `augment`.

    Raises:
        ConfigError: if it needs a teacher or reference images and there are none.
    """
    if part.kind == "sample":
        return toward_sample() if part.guidance == 1 else toward_guided_sample(part)
    if part.kind == "target":
        return toward_target
    if part.kind == "teacher":
        if teacher is None:
            raise ConfigError("a teacher's direction needs a teacher.", "add --teacher MODEL")
        if part.weak is not None and weak is None:
            raise ConfigError("autoguidance needs the weak model, and none was loaded.")
        return toward_teacher(teacher, part.guidance, weak, part.interval)
    if part.pool == "batch":
        return toward_batch_mean
    if reference is None:
        raise ConfigError("the posterior mean needs reference images, and none were given.")
    return toward_posterior_mean(reference, mirrors=augment is not None and augment.xflip > 0)
