"""Exact denoisers and consistency functions of simple data, and models built around a given raw network."""

import torch
from torch import nn

from cmtool.config.load import resolve
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.grid import karras_grid
from cmtool.losses.terms import Slice
from cmtool.models import ConsistencyModel

D = torch.float64


def gaussian_denoise(s=0.5, mean=0.0):
    """D(x, t) of N(mean, s^2)."""

    def denoise(x, t):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        return mean + s**2 / (s**2 + t**2) * (x - mean)

    return denoise


def gaussian_consistency(x, t, std, sigma_min):
    """The exact consistency function of N(0, std^2): x sqrt((std^2 + sigma_min^2) / (std^2 + t^2))."""
    return x * (((std**2 + sigma_min**2) / (std**2 + t**2)).sqrt()).reshape(-1, *[1] * (x.ndim - 1))


def walk(step, denoise, x, n):
    """Compose a solver's steps over the Karras grid of n points from 80 down to .002."""
    grid = karras_grid(n)
    for t, r in zip(grid[:0:-1], grid[-2::-1], strict=True):
        x = step(denoise, x, torch.full((len(x),), t, dtype=x.dtype), torch.full((len(x),), r, dtype=x.dtype))
    return x


class Linear(nn.Module):
    """A raw network F = a x + b c_noise (+ g r): its derivatives are known."""

    two_time = False

    def __init__(self, a=-0.2, b=0.1, g=None):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a, dtype=D)), nn.Parameter(torch.tensor(b, dtype=D))
        if g is not None:
            self.g, self.two_time = nn.Parameter(torch.tensor(g, dtype=D)), True

    def forward(self, x, c_noise, label=None, r=None):
        out = self.a * x + self.b * c_noise[:, None, None, None]
        return out if r is None else out + self.g * r[:, None, None, None]


class Given(nn.Module):
    """A raw network that is any function of (x, c_noise)."""

    two_time = False

    def __init__(self, function):
        super().__init__()
        self.unused, self.function = nn.Parameter(torch.zeros((), dtype=D)), function

    def forward(self, x, c_noise, label=None, r=None):
        c = c_noise[:, None, None, None]
        return self.function(x, c) if r is None else self.function(x, c, r[:, None, None, None])


def model(network, **process):
    header = {"data": {"channels": 1, "resolution": 1, "num_classes": None}}
    return ConsistencyModel(network.double(), ProcessConfig(**process), header)


def images(*values):
    """Numbers as images (B, 1, 1, 1) in float64."""
    return torch.tensor(values, dtype=D).reshape(-1, 1, 1, 1)


def column(*values):
    return torch.tensor(values, dtype=D)


SMALL = ("network.channels=8", "network.head_channels=8", "data.size=64")


def config_of(recipe, *sets, preset="digits", **flags):
    """A small resolved run: 8 images a step, 40 steps."""
    given = {"train.steps": 40, "train.batch_size": 8, **flags}
    small = SMALL if preset == "digits" else ("network.channels=16", "data.size=64")
    return resolve(preset, recipe=recipe, sets=(*small, *sets), flags=given).config


def loss_of(objective, nets, x0, label, state, rows):
    """The loss of the images x0 at these rows of a batch."""
    return objective.loss(nets, objective.draw(x0, label, state, rows))


def rows(total, start=0, step=0, seed=0):
    return Slice(seed, step, start, total)
