r"""Zero-shot editing (Song et al. 2023, Algorithm 4 and Appendix D): one loop, and operators as data.

An edit knows part of the image and lets the model make up the rest. With A an orthogonal map and Omega the mask of
what is generated, the paper replaces x by $A^{-1}[(Ay)(1 - \Omega) + (Ax)\Omega]$ after every evaluation. Written with
the orthogonal projection $P = A^T(1 - \Omega)A$ onto the known part this is $x + P(y - x)$, and no matrix A is needed:
P keeps pixels (inpainting), the luma of a pixel (colorization) or the mean of a patch (super-resolution).

Shapes: images (B, C, H, W) in [-1, 1]; sides may be any that the model's network takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cmtool.rng import SampleStreams, derive
from cmtool.samplers.generate import bind
from cmtool.samplers.solvers import ConsistencyFunction, levels, multistep

# Rec. 601 luma of red, green and blue, as the paper writes it.
LUMA = (0.2989, 0.5870, 0.1140)

Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operator:
    """What an edit knows of an image.

    `project` is the orthogonal projection P onto the known part; `weight` (broadcastable to (B, C, H, W), in [0, 1])
    says how much of it is put back: 1 everywhere except at the seam of a soft mask.
    """

    project: Projection
    weight: Tensor | None = None

    @property
    def knows(self) -> bool:
        """Whether anything is known, so that edits can be compared by how well they agree with it."""
        return True

    def replace(self, x: Tensor, y: Tensor, strength: float = 1.0) -> Tensor:
        """Return x + strength P(y - x): at strength 1, x with the known part of y put back."""
        if self.weight is not None:
            # Written as a choice where the weight is 1, so that known pixels come back to the bit.
            moved = x + self.weight * strength * (y - x)
            return torch.where((self.weight >= 1) & (strength == 1.0), y, moved)
        return x + strength * self.project(y - x)

    def start(self, y: Tensor) -> Tensor:
        """Return P y: the known part, zero (mid gray) elsewhere."""
        return self.project(y)


def known_pixels(mask: Tensor) -> Operator:
    """Inpainting: A = identity. `mask` is 1 where the model generates, 0 where pixels are known, between at the seam.

    Args:
        mask: (B or 1, C or 1, H, W) in [0, 1].
    """
    known = 1.0 - mask
    return Operator(lambda v: known * v, known)


def luma_vector(like: Tensor) -> Tensor:
    """The unit vector along the luma weights, (1, 3, 1, 1): the first column of the paper's 3 x 3 orthogonal matrix."""
    weights = torch.tensor(LUMA, dtype=torch.float64)
    return (weights / weights.norm()).to(dtype=like.dtype, device=like.device).reshape(1, 3, 1, 1)


def known_luma() -> Operator:
    """Colorization: the component of each RGB pixel along the luma vector is known, the two others are generated."""

    def project(v: Tensor) -> Tensor:
        unit = luma_vector(v)
        return unit * (unit * v).sum(dim=1, keepdim=True)

    return Operator(project)


def patch_means(x: Tensor, factor: int) -> Tensor:
    """Mean over patches: (B, C, H, W) -> (B, C, H / factor, W / factor)."""
    return avg_pool2d(x, factor)


def repeat_patches(small: Tensor, factor: int) -> Tensor:
    """Each pixel of (B, C, h, w) as a flat patch: (B, C, h factor, w factor)."""
    return small.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def known_patch_means(factor: int) -> Operator:
    """Super-resolution: the mean of every factor x factor patch of each channel is known."""
    return Operator(lambda v: repeat_patches(patch_means(v, factor), factor))


def nothing_known() -> Operator:
    """Stroke editing (SDEdit): everything is generated, and the guide only says where to start."""
    return _Guided(torch.zeros_like)


class _Guided(Operator):
    """An operator whose start is the guide itself although nothing of it is kept."""

    @property
    def knows(self) -> bool:
        return False

    def start(self, y: Tensor) -> Tensor:
        return y


class Edited(NamedTuple):
    """An edit, and how the model's own answers agreed with what is known.

    Attributes:
        image: (B, C, H, W), the known part put back.
        answer: (B, C, H, W), the model's last answer before that.
        misfit: (B,), mean over the evaluations of the mean square of P(answer - y) over all values of an image.
        residual: (B,), that mean square of the last answer alone.
    """

    image: Tensor
    answer: Tensor
    misfit: Tensor
    residual: Tensor


@torch.no_grad()
def edit(
    model: ConsistencyFunction,
    operator: Operator,
    y: Tensor,
    streams: SampleStreams,
    times: Sequence[float],
    label: Tensor | None = None,
    *,
    clamp: bool = True,
    guidance: float = 0.0,
    fresh: float = 1.0,
) -> Edited:
    """Edit one batch by Algorithm 4: start at P y + t_1 z, then evaluate, put the known part back, renoise, repeat.

    Args:
        model: a consistency model.
        operator: what is known.
        y: the measurement as images (B, C, H, W): known pixels, a gray picture, flat patches, or a stroke guide.
        streams: the noise of each image; B is its length. One draw for each time.
        times: strictly decreasing noise levels; len(times) evaluations.
        label: classes (B,) of a conditional model.
        clamp: confine answers to [-1, 1] before the known part is put back (in the released code, not the paper).
        guidance: over-relaxation g >= 0 between the steps: the known part is put back as y + g (y - answer), which
            moves the rest towards consistency with the measurement faster than Algorithm 4 (g = 0) does. The last
            step always puts back y itself.
        fresh: share e of new noise in (0, 1]. Below 1 the rest of what is added before the next evaluation is the noise
            that the model just found, negated: e z + sqrt(1 - e^2) (answer - x) / t (CM4IR, Garber & Tirer 2025), which
            restores in few evaluations what a measurement nearly settles.

    Returns:
        `Edited`; the image holds the known part exactly and may leave [-1, 1] elsewhere (see `into_range`).
    """
    answer = found = y
    misfit = residual = torch.zeros(len(y), dtype=y.dtype, device=y.device)

    def after(raw: Tensor, last: bool) -> Tensor:
        nonlocal answer, misfit, residual
        answer = raw
        residual = operator.start(answer - y).square().flatten(1).mean(1)
        misfit = misfit + residual / len(times)
        return operator.replace(answer, y, 1.0 if last else 1.0 + guidance)

    denoise = bind(model, label, clamp)

    def told(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        nonlocal found
        clean = denoise(x, t)
        found = (clean - x) / t.reshape(-1, 1, 1, 1)
        return clean

    start = operator.start(y)
    noise = partial(streams.normal, start.shape[1:])
    x = start + times[0] * noise()
    if fresh < 1:
        image = multistep(told, x, (*times, model.sigma_min), lambda: _mixed(noise(), found, fresh), after)
    else:
        image = multistep(denoise, x, (*times, model.sigma_min), noise, after)
    return Edited(image, answer, misfit, residual)


def _mixed(noise: Tensor, found: Tensor, fresh: float) -> Tensor:
    return fresh * noise + math.sqrt(1 - fresh**2) * found


def edit_best(
    model: ConsistencyFunction,
    operator: Operator,
    y: Tensor,
    seeds: Sequence[int],
    times: Sequence[float],
    label: Tensor | None = None,
    *,
    candidates: int = 1,
    clamp: bool = True,
    guidance: float = 0.0,
    fresh: float = 1.0,
) -> Edited:
    """Edit each image `candidates` times and keep the edit whose last answer agrees best with what is known.

    Algorithm 4 settles large features, such as a color, at noise levels where a measurement as fine as luma says
    little, and cannot return to them later; choosing among several edits makes up for that. Candidate 0 is the edit of
    the seed itself, and each depends on its image's seed alone.

    Args:
        seeds: one for each image, B in all.
        candidates: edits of each image, at least 1; len(times) evaluations each.
    """
    best = None
    for number in range(candidates):
        own = [derive(seed, "candidate", number) if number else seed for seed in seeds]
        streams = SampleStreams(own, y.device, y.dtype)
        made = edit(model, operator, y, streams, times, label, clamp=clamp, guidance=guidance, fresh=fresh)
        best = made if best is None else _closer(best, made)
    if best is None:
        raise ValueError(f"{candidates} candidates are none")
    return best


def _closer(a: Edited, b: Edited) -> Edited:
    """Of each image, the edit with the smaller residual."""
    better = b.residual < a.residual

    def pick(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return Edited(*map(pick, a, b))


@torch.no_grad()
def denoise(
    model: ConsistencyFunction, noisy: Tensor, sigma: float, label: Tensor | None = None, *, clamp: bool = True
) -> Tensor:
    """Denoise images whose Gaussian noise has standard deviation `sigma` on the [-1, 1] scale: f(noisy, sigma)."""
    return bind(model, label, clamp)(noisy, levels(noisy, sigma))


def into_range(x: Tensor, anchor: Tensor, group: Callable[[Tensor], Tensor]) -> Tensor:
    """Bring x into [-1, 1] without touching its known part: shrink x towards `anchor` where it leaves the range.

    x - anchor has no known part (same luma, same patch mean), so every x_s = anchor + s (x - anchor) keeps it.

    Args:
        x: (B, C, H, W).
        anchor: same shape, in [-1, 1]: the gray picture, or the flat patches.
        group: takes the largest admissible s of every value to the smallest over the values that must share one
            (`by_pixel`, or `by_patch(factor)`).
    """
    away = x - anchor
    room = torch.where(away > 0, 1.0 - anchor, anchor + 1.0)
    largest = torch.where(away.abs() > room, room / away.abs().clamp_min(1e-12), torch.ones_like(away))
    return anchor + group(largest.clamp(0.0, 1.0)) * away


def by_pixel(values: Tensor) -> Tensor:
    """Smallest over channels, (B, C, H, W) -> (B, 1, H, W)."""
    return values.amin(dim=1, keepdim=True)


def by_patch(factor: int) -> Callable[[Tensor], Tensor]:
    """Smallest over each factor x factor patch of each channel, at full size."""

    def smallest(values: Tensor) -> Tensor:
        return repeat_patches(-torch.nn.functional.max_pool2d(-values, factor), factor)

    return smallest


def luma_image(x: Tensor) -> Tensor:
    """The gray picture of an RGB one: .2989 R + .587 G + .114 B in every channel, white staying white.

    The paper's three weights add up to .9999; they are scaled to one here, so that a gray picture is its own luma.
    """
    weights = torch.tensor(LUMA, dtype=x.dtype, device=x.device).reshape(1, 3, 1, 1)
    return (x * (weights / weights.sum())).sum(dim=1, keepdim=True).expand_as(x)
