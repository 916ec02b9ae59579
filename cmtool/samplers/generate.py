"""From a plan and seeds to samples, in batches that bound memory and change nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.diffusion.guidance import Told, guide, numbers_of
from cmtool.models import Model, beside
from cmtool.rng import SampleStreams
from cmtool.samplers.plan import SAMPLERS, SamplePlan
from cmtool.samplers.solvers import Denoise, Noise

Conditions = Callable[[Sequence[int]], Tensor]
Solver = Callable[[Denoise, Tensor, Sequence[float], Noise], Tensor]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words


class Batch(NamedTuple):
    """Samples `start` .. `start + len(x0)`: x0 (B, C, H, W) on the model's device, labels (B,) or None."""

    start: int
    x0: Tensor
    labels: Tensor | None


def bind(model: Callable[..., Tensor], label: Tensor | None, clamp: bool) -> Denoise:
    """Return `model(x, t, label)` as a function of x and t; `clamp` confines its answers to [-1, 1], where images live.

    The released code clamps every answer; the published algorithms do not.
    """

    def denoise(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        answer = model(x, t, label) if r is None else model(x, t, label, r)
        return answer.clamp(-1.0, 1.0) if clamp else answer

    return denoise


def solver(sampler: str) -> Solver:
    """Return the function that a row of SAMPLERS names."""
    module, function = SAMPLERS[sampler].run.split(":")
    return getattr(importlib.import_module(f"cmtool.samplers.{module}"), function)


def streams_for(model: Model, seeds: Sequence[int]) -> SampleStreams:
    """Return the noise streams of these seeds on the model's device, in float64 for a float64 model, else float32."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    return SampleStreams(seeds, model.device, dtype)


def labels_for(model: Model, streams: SampleStreams, labels: Sequence[int] | None) -> Tensor | None:
    """Return labels (B,): those given, else one drawn from each sample's seed; None for an unconditional model."""
    if model.num_classes is None:
        return None
    if labels is None:
        return streams.labels(model.num_classes)
    return torch.tensor(list(labels), dtype=torch.int64, device=model.device)


def conditions_for(model: Model, conditions: Conditions | None) -> Conditions | None:
    """Return the pictures of seeds: those given, else those of the model's own data; None for a model without.

    Raises:
        DataError: its own data are not here.
    """
    if conditions is None and model.condition is not None:
        from cmtool.data.condition import own_conditions

        return own_conditions(model.header["data"])
    return conditions


def guided(model: Model, plan: SamplePlan, weak: Model | None = None) -> Callable[..., Tensor]:
    """Return the model as it is guided by a plan; `weak` is the weak model that the plan names."""
    wanted = plan.guidance
    if wanted is None:
        return model
    if model.kind == "diffusion":
        return guide(model, wanted.scale, weak, wanted.interval)
    return Told(model, numbers_of(wanted.scale, wanted.interval))


@torch.no_grad()
def sample_batch(
    model: Model,
    plan: SamplePlan,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    conditions: Conditions | None = None,
    weak: Model | None = None,
) -> Batch:
    """Sample one image for each seed as one batch; see `generate`."""
    streams = streams_for(model, seeds)
    label = labels_for(model, streams, labels)
    denoise = bind(guided(model, plan, weak), label, clamp=model.clamps)
    sigmas = (*plan.times, 0.0 if SAMPLERS[plan.sampler].to_zero else model.sigma_min)
    noise = partial(streams.normal, model.image_shape)
    with beside(None if conditions is None else conditions(seeds).to(model.device)):
        x0 = solver(plan.sampler)(denoise, sigmas[0] * noise(), sigmas, noise)
    return Batch(0, to_pictures(model, x0), label)


def to_pictures(model: Model, x0: Tensor) -> Tensor:
    """Decode the samples of a latent model; those of other models are pictures or points already.

    Raises:
        UserError, DataError: the autoencoder is not here.
    """
    if model.latent is None:
        return x0
    from cmtool.data.latents import decoder

    return decoder(model.latent)(x0)


def generate(
    model: Model,
    plan: SamplePlan,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch_size: int = 64,
    start: int = 0,
    conditions: Conditions | None = None,
    weak: Model | None = None,
) -> Iterator[Batch]:
    """Yield the samples of `seeds` from number `start` on, `batch_size` at a time.

    Args:
        model: the model that `plan` was made for.
        plan: sampler and noise levels.
        seeds: one for each sample; sample i depends only on seeds[i] (and labels[i]).
        labels: one for each sample; None draws each from its seed if the model is conditional.
        batch_size: images per batch; it affects only speed and memory, and is halved when memory runs out.
        start: the first sample to make, to continue where an earlier call was cut off.
        conditions: seeds to the pictures (B, K, H, W) that a conditioned model sees; None: those of its own data.
        weak: the weak model, if `plan.guidance` names one.

    Yields:
        `Batch` with x0 in [-1, 1] (float data: unbounded).
    """
    pictures = conditions_for(model, conditions)
    with model.replaying():
        yield from _batches(model, plan, seeds, labels, batch_size, start, pictures, weak)


def _batches(
    model: Model,
    plan: SamplePlan,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    batch_size: int,
    first: int,
    conditions: Conditions | None,
    weak: Model | None,
) -> Iterator[Batch]:
    while first < len(seeds):
        chosen = seeds[first : first + batch_size]
        some = None if labels is None else labels[first : first + batch_size]
        try:
            batch = sample_batch(model, plan, chosen, some, conditions, weak)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
            batch_size = -(-min(batch_size, len(chosen)) // 2)
            continue
        yield batch._replace(start=first)
        first += len(chosen)
