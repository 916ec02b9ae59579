"""Every sampler on one curved model, pinned to twelve digits: a change of a step shows here, whatever its order.

New numbers are written with `python -m tests.samplers.test_pinned --write`; whoever does so says why.
"""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cmtool.samplers.generate import bind, solver
from cmtool.samplers.plan import SAMPLERS
from cmtool.samplers.times import geometric_times
from tests.samplers.oracle import streams

FILE = Path(__file__).with_name("pinned.json")


def curved(x, t, label=None, r=None):
    """A clean image that bends with x and both times."""
    low = 0.5 * t if r is None else 0.5 * (t + r)
    scale = (1 + low).reshape(-1, 1, 1, 1)
    return torch.tanh(x / scale + 0.1 * x.roll(1, dims=-1) / scale)


def sampled(name):
    draws = streams(2, dtype=torch.float64)
    noise = partial(draws.normal, (1, 2, 2))
    sigmas = (*geometric_times(4, 20.0, 0.1), 0.0 if SAMPLERS[name].to_zero else 0.002)
    x = solver(name)(bind(curved, None, clamp=True), sigmas[0] * noise(), sigmas, noise)
    return x.flatten().tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_gives_the_pinned_images(name):
    assert sampled(name) == pytest.approx(json.loads(FILE.read_text())[name], rel=1e-12, abs=1e-14)


def test_the_pinned_images_tell_the_samplers_apart():
    pinned = json.loads(FILE.read_text())
    assert pinned.keys() == SAMPLERS.keys()
    # DDIM is Euler's method in this process.
    assert len({tuple(values) for values in pinned.values()}) == len(SAMPLERS) - 1
    assert pinned["ddim"] == pinned["euler"]


if __name__ == "__main__" and "--write" in sys.argv:
    FILE.write_text(json.dumps({name: sampled(name) for name in SAMPLERS}, indent=1) + "\n")
