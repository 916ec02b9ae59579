"""From a plan and seeds to samples, in batches that bound memory and change nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.models import Model
from cmtool.rng import SampleStreams
from cmtool.samplers.multistep import sample_multistep
from cmtool.samplers.ode import sample_ancestral, sample_euler, sample_heun, sample_midpoint
from cmtool.samplers.plan import SamplePlan

Run = Callable[[Model, SampleStreams, Sequence[float], Tensor | None, bool], Tensor]


class Batch(NamedTuple):
    """Samples `start` .. `start + len(x0)`: x0 (B, C, H, W) on the model's device, labels (B,) or None."""

    start: int
    x0: Tensor
    labels: Tensor | None


def _multistep(
    model: Model, streams: SampleStreams, times: Sequence[float], label: Tensor | None, clamp: bool
) -> Tensor:
    return sample_multistep(model, streams, times, label, clamp=clamp)


def _from_noise(solve: Callable[..., Tensor]) -> Run:
    def run(model: Model, streams: SampleStreams, times: Sequence[float], label: Tensor | None, clamp: bool) -> Tensor:
        x = times[0] * streams.normal(model.image_shape)
        return solve(model, x, times, streams, label, clamp=clamp)

    return run


RUNS: dict[str, Run] = {
    "multistep": _multistep,
    "heun": _from_noise(sample_heun),
    "euler": _from_noise(sample_euler),
    "ancestral": _from_noise(sample_ancestral),
    "dpm": _from_noise(sample_midpoint),
}


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


def sample_batch(model: Model, plan: SamplePlan, seeds: Sequence[int], labels: Sequence[int] | None = None) -> Batch:
    """Sample one image for each seed as one batch; see `generate`."""
    streams = streams_for(model, seeds)
    label = labels_for(model, streams, labels)
    x0 = RUNS[plan.sampler](model, streams, plan.times, label, not model.float_samples)
    return Batch(0, x0, label)


def generate(
    model: Model,
    plan: SamplePlan,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch_size: int = 64,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield the samples of `seeds` from number `start` on, `batch_size` at a time.

    Args:
        model: the model that `plan` was made for.
        plan: sampler and noise levels.
        seeds: one for each sample; sample i depends on seeds[i] (and labels[i]) alone.
        labels: one for each sample; None draws each from its seed if the model is conditional.
        batch_size: images at once; changes speed and memory only.
        start: the first sample to make, for going on where an earlier call was cut off.

    Yields:
        `Batch` with x0 in [-1, 1] (float data: unbounded).
    """
    for first in range(start, len(seeds), batch_size):
        chosen = seeds[first : first + batch_size]
        some = None if labels is None else labels[first : first + batch_size]
        batch = sample_batch(model, plan, chosen, some)
        yield batch._replace(start=first)
