"""Exact answers for Gaussian data, as models that the samplers accept."""

import torch

from cmtool.rng import SampleStreams


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
