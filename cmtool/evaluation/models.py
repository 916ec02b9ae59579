"""Judging a model instead of files: its samples are made in memory, from seeds of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cmtool.data import to_uint8
from cmtool.evaluation.frechet import frechet_to_fit
from cmtool.evaluation.judge import Judge
from cmtool.evaluation.metrics import Metrics
from cmtool.evaluation.samples import ImageSet, from_array
from cmtool.models import Model, beside, ve_process
from cmtool.samplers.generate import bind, conditions_for, generate, labels_for, streams_for, to_pictures
from cmtool.samplers.plan import SamplePlan
from cmtool.samplers.solvers import multistep

BATCH = 256
# While times that begin alike are scored, samples after the shared evaluations are kept, up to this many bytes.
KEPT_BYTES = 256 * 2**20


def make_images(model: Model, plan: SamplePlan, seeds: Sequence[int], batch_size: int = BATCH) -> ImageSet:
    """Sample one image per seed into memory, rounded to bytes (points stay floats), with its label."""
    parts, labels = [], []
    for batch in generate(model, plan, seeds, batch_size=batch_size):
        parts.append(_stored(batch.x0, model))
        if batch.labels is not None:
            labels.append(batch.labels.cpu().numpy())
    meta = {"class_names": model.header["data"].get("class_names")}
    return from_array(np.concatenate(parts), "samples", np.concatenate(labels) if labels else None, meta)


def judge_model(
    judge: Judge, model: Model, plan: SamplePlan, seeds: Sequence[int], metrics: Sequence[str] | None = None
) -> Metrics:
    """Sample a model and judge the samples; nothing is written.

    Args:
        judge: what to compare with.
        model: consistency model or teacher.
        plan: sampler and noise levels, from `plan_sampling(model.header, ...)`.
        seeds: one for each sample.
        metrics: as in `Judge.__call__`.
    """
    images = make_images(model, plan, seeds)
    return replace(judge, batch_size=BATCH)(images, metrics, use_cache=False)


def _stored(x0: Tensor, model: Model) -> np.ndarray:
    if model.float_samples:
        return x0.float().cpu().numpy()
    return to_uint8(x0.float()).permute(0, 2, 3, 1).cpu().numpy()


class TimesScore:
    """The Frechet distance as a function of a consistency model's times, with fixed seeds.

    Times that begin alike share their first evaluations, so that each candidate of a greedy search costs one evaluation
    per image, whatever the number of steps.
    """

    def __init__(self, model: Model, judge: Judge, seeds: Sequence[int], batch_size: int = BATCH) -> None:
        assert judge.side is not None
        self.model = model
        self.network = judge.network
        self.side = judge.side
        self.batches = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
        channels, height, width = model.image_shape
        self._keeps = len(seeds) * channels * height * width * 4 <= KEPT_BYTES
        self._known: dict[tuple[float, ...], list[Tensor]] = {}

    def __call__(self, times: tuple[float, ...]) -> float:
        """Return the Frechet distance of samples made with `times`."""
        x0 = self._samples(times)
        features = [self.network.call(_stored(to_pictures(self.model, batch), self.model)).features for batch in x0]
        return frechet_to_fit(np.concatenate(features), self.side.fit, self.side.factor)

    @torch.no_grad()
    def _samples(self, times: tuple[float, ...]) -> list[Tensor]:
        prefix = times[:-1] if len(times) > 1 and self._keeps else ()
        if prefix and prefix not in self._known:
            kept = self._samples(prefix)
            if len(self._known) > 3:
                self._known.pop(next(iter(self._known)))
            self._known[prefix] = kept
        before: Sequence[Tensor | None] = self._known.get(prefix) or [None] * len(self.batches)
        return [self._walk(seeds, times, len(prefix), x0) for seeds, x0 in zip(self.batches, before, strict=True)]

    def _walk(self, seeds: Sequence[int], times: tuple[float, ...], done: int, x0: Tensor | None) -> Tensor:
        """Continue from `x0`, the result of the first `done` evaluations, with the noise of an unbroken run."""
        model = self.model
        streams = streams_for(model, seeds)
        label = labels_for(model, streams, None)
        draws = [streams.normal(model.image_shape) for _ in range(done + 1)]
        if x0 is None:
            x = times[0] * draws[0]
        else:
            level = torch.full((len(x0),), times[done], dtype=x0.dtype, device=x0.device)
            x = ve_process(model).renoise(x0, draws[-1], level)
        denoise = bind(model, label, clamp=model.clamps)
        noise = partial(streams.normal, model.image_shape)
        pictures = conditions_for(model, None)
        with beside(None if pictures is None else pictures(seeds).to(model.device)):
            return multistep(denoise, x, (*times[done:], model.sigma_min), noise)
