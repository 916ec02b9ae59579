"""Paths through noise: slerp between key points, and the noise of an image by running a teacher's ODE upward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cmtool.diffusion.process import exact, expand
from cmtool.diffusion.solvers import heun_step
from cmtool.errors import UserError
from cmtool.rng import SampleStreams, derive
from cmtool.samplers.generate import bind
from cmtool.samplers.solvers import ConsistencyFunction, levels, multistep

# Noise that pictures get before they are encoded: about one byte.
DITHER = 0.01
# Below this angle (radians) the sines of slerp lose their digits and the straight line is the same to rounding.
NEARLY_PARALLEL = 1e-4


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation from a (share 0) to b (share 1), with the angle taken over all values of an image.

    Args:
        a: (B, ...).
        b: (B, ...).
        share: (B,) in [0, 1].

    Returns:
        (sin((1 - s) psi) a + sin(s psi) b) / sin(psi), psi the angle between a and b. Homogeneous: noise may be scaled
            before or after. Nearly parallel vectors are interpolated along a straight line, and so are opposite ones,
            which have no shortest arc.
    """
    flat_a, flat_b = exact(a.reshape(len(a), -1)), exact(b.reshape(len(b), -1))
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1)).clamp_min(1e-300)
    psi = torch.arccos(cosine.clamp(-1.0, 1.0))
    straight = torch.sin(psi) < NEARLY_PARALLEL
    sine = torch.where(straight, torch.ones_like(psi), torch.sin(psi))
    s = share.to(psi)
    left = torch.where(straight, 1 - s, torch.sin((1 - s) * psi) / sine)
    right = torch.where(straight, s, torch.sin(s * psi) / sine)
    return expand(left.to(a), a) * a + expand(right.to(a), a) * b


def path(keys: Tensor, num: int, loop: bool = False) -> Tensor:
    """Return `num` points (num, ...) of the path through the key points (K, ...), evenly spaced by key.

    Both ends are included. A loop continues from the last key to the first without repeating it at the end, so that the
    frames play seamlessly.

    Raises:
        UserError: for fewer than two keys, or fewer frames than needed to show both ends.
    """
    if len(keys) < 2:
        raise UserError("a path needs at least two key points", "name them, e.g. --seeds 1,2")
    if num < 2:
        raise UserError(f"a path of {num} pictures shows nothing between; use at least 2")
    segments = len(keys) if loop else len(keys) - 1
    places = torch.arange(num, dtype=torch.float64) * (segments / (num if loop else num - 1))
    first = places.floor().clamp_max(segments - 1).long()
    share = places - first
    return slerp(keys[first], keys[(first + 1) % len(keys)], share)


@torch.no_grad()
def decode(
    model: ConsistencyFunction,
    noise: Tensor,
    times: Sequence[float],
    label: Tensor | None = None,
    *,
    clamp: bool = True,
) -> Tensor:
    """Turn unit-variance noise (B, C, H, W) into images: f(times[0] * noise, times[0]), then the later times.

    Later evaluations add the same noise to every picture, so that a path stays smooth.
    """
    shared = SampleStreams([derive(0, "interpolation")] * len(noise), noise.device, noise.dtype)
    draw = partial(shared.normal, noise.shape[1:])
    return multistep(bind(model, label, clamp), times[0] * noise, (*times, model.sigma_min), draw)


@torch.no_grad()
def encode(denoise: Callable[..., Tensor], x0: Tensor, times: Sequence[float], label: Tensor | None = None) -> Tensor:
    """Return the unit-variance noise (B, C, H, W) of images: Heun's method on the ODE from clean to noisy.

    Args:
        denoise: the teacher, called as (x, t, label).
        x0: images in [-1, 1], assumed to be at the smallest time.
        times: strictly descending noise levels, as a solver takes them; this walks them upward. The last should be the
            level of `dithered`.
        label: classes (B,).
    """
    bound = bind(denoise, label, clamp=False)
    upward = list(reversed(times))
    x = x0
    for t, r in itertools.pairwise(upward):
        x = heun_step(bound, x, levels(x, t), levels(x, r))
    return x / upward[-1]


def dithered(x0: Tensor, level: float) -> Tensor:
    """Add noise of `level` to images before they are encoded from that level; the same for every call.

    Pictures stored as bytes are flatter than anything that the ODE maps to unit noise. Encoded as they are, the shapes
    gave noise with a standard deviation of .79, off the sphere that slerp walks on; with .01, about one byte, they gave
    .96.
    """
    streams = SampleStreams([derive(index, "dither") for index in range(len(x0))], x0.device, x0.dtype)
    return x0 + level * streams.normal(x0.shape[1:])


def key_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The initial noise (K, *shape) that `sample` gives to these seeds."""
    return SampleStreams(seeds).normal(shape)
