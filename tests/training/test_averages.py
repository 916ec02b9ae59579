"""Moving averages and learning rates against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cmtool.config.schema import EmaConfig, TrainConfig
from cmtool.schedules.curriculum import lr_factor
from cmtool.training.averages import decay_at, move_towards, power_gamma


def averaged(ema: EmaConfig, values: list[float]) -> float:
    """Run the average over a network of one weight that takes `values` after steps 0, 1, ..."""
    average, source = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        average.weight.fill_(7.0)
        for step, value in enumerate(values):
            source.weight.fill_(value)
            move_towards(average, source, decay_at(ema, step))
    return float(average.weight.detach())


# EDM2 (Karras et al. 2024), after Eq. 123: relative widths 0.05 and 0.10 are gamma 16.97 and 6.94.
@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_exponents_are_the_published_ones(std, gamma):
    assert power_gamma(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [0.03, 0.1, 0.25])
def test_the_exponent_solves_its_equation(std):
    gamma = power_gamma(std)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(std, rel=1e-9)


def test_power_average_weighs_steps_by_a_power_of_time():
    """The weight of step i among k is prop. to i^(gamma+1) - (i-1)^(gamma+1): the discrete form of t^gamma."""
    values = [math.sin(3 * i) for i in range(40)]
    exponent = power_gamma(0.10) + 1
    weights = [(i + 1) ** exponent - i**exponent for i in range(40)]
    products, k = [], 40
    for i in range(k):  # what the published recursion beta_t = (1 - 1/t)^(gamma+1) gives each step
        w = 1 - (1 - 1 / (i + 1)) ** exponent
        for j in range(i + 1, k):
            w *= (1 - 1 / (j + 1)) ** exponent
        products.append(w)
    assert products == pytest.approx([w / k**exponent for w in weights], rel=1e-9)
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / k**exponent
    assert averaged(EmaConfig(kind="power", std=0.10), values) == pytest.approx(expected, rel=1e-9)


def test_power_average_forgets_where_it_started():
    assert averaged(EmaConfig(kind="power", std=0.10), [1.5]) == 1.5


def test_exponential_average():
    values = [1.0, -2.0, 0.5, 4.0]
    expected = 7.0
    for value in values:
        expected = 0.9 * expected + 0.1 * value
    assert averaged(EmaConfig(decay=0.9), values) == pytest.approx(expected, rel=1e-12)
    assert averaged(EmaConfig(kind="none"), values) == 4.0


def settings(**changes):
    return TrainConfig(**{"steps": 100, "lr": 1.0} | changes)


def test_a_constant_rate():
    assert {lr_factor(settings(), step) for step in range(100)} == {1.0}


def test_linear_warm_up_reaches_one_and_stays():
    factors = [lr_factor(settings(warmup=0.2), step) for step in range(100)]
    assert factors[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert set(factors[20:]) == {1.0}


def test_linear_decay():
    factors = [lr_factor(settings(decay="linear", decay_start=0.5, decay_end=0.1), step) for step in range(100)]
    assert set(factors[:50]) == {1.0}
    assert factors[75] == pytest.approx(0.55) and factors[50] == 1.0
    assert factors[99] == pytest.approx(0.1 + 0.9 / 50)


def test_cosine_decay_to_zero():
    factors = [lr_factor(settings(decay="cosine"), step) for step in range(100)]
    assert factors[50] == pytest.approx(0.5) and factors[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert 0 < factors[99] < 0.001


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_no_length_is_too_short(steps, decay):
    train = settings(steps=steps, warmup=0.02, decay=decay, decay_start=0.9)
    assert all(0 < lr_factor(train, step) <= 1 for step in range(steps))
