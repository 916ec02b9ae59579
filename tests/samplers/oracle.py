"""Exact answers for Gaussian data, as models that the samplers accept."""

from functools import partial

import torch

from cmtool.rng import SampleStreams
from cmtool.samplers.generate import bind
from cmtool.samplers.solvers import multistep, no_noise


class GaussianConsistency:
    """f*(x, t) of data N(0, s^2): x sqrt((s^2 + eps^2) / (s^2 + t^2)); counts its evaluations."""

    def __init__(self, s=0.5, shape=(1, 4, 4), sigma_min=0.002, sigma_max=80.0):
        self.s, self.image_shape, self.sigma_min, self.sigma_max = s, shape, sigma_min, sigma_max
        self.calls = []

    def __call__(self, x, t, label=None):
        self.calls.append(float(t[0]))
        scale = ((self.s**2 + self.sigma_min**2) / (self.s**2 + t.double() ** 2)).sqrt().to(x.dtype)
        return scale.reshape(-1, *[1] * (x.ndim - 1)) * x


class GaussianDenoiser:
    """D(x, t) of data N(0, s^2): x s^2 / (s^2 + t^2); counts its evaluations."""

    def __init__(self, s=0.5):
        self.s, self.calls = s, 0

    def __call__(self, x, t, label=None):
        self.calls += 1
        return (self.s**2 / (self.s**2 + t**2)).reshape(-1, *[1] * (x.ndim - 1)) * x


def streams(count, first=0, dtype=torch.float32):
    return SampleStreams(range(first, first + count), dtype=dtype)


def solve(solver, model, x, times, draws=None, *, clamp=False, last=0.0, **settings):
    """Run a sampler on a bare model: `times` above 0, `draws` streams of noise, down to `last`."""
    noise = no_noise if draws is None else partial(draws.normal, x.shape[1:])
    return solver(bind(model, None, clamp), x, (*times, last), noise, **settings)


def sample_multistep(model, draws, times, clamp=False):
    """Algorithm 1 from the streams' own noise down to the model's sigma_min."""
    return solve(
        multistep, model, times[0] * draws.normal(model.image_shape), times, draws, clamp=clamp, last=model.sigma_min
    )
