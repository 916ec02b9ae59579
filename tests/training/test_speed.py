"""Which networks a plan times, on a machine that is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cmtool.config import laws
from cmtool.training import speed

IMPORTS = 5.0


@pytest.fixture
def timed(monkeypatch):
    """Let `speed.measure` time a machine: work a second by kind; seconds pass only there."""
    clock = SimpleNamespace(now=0.0)

    def measure(machine, candidates, seconds):
        def trial(config, data, device, precision, batch):
            size, resolution = config.network
            one = batch * size.work(resolution) / machine[size.kind]
            clock.now += speed.STEPS * one + (0.0 if clock.now else IMPORTS)
            return SimpleNamespace(images_per_s=batch / one)

        def config_of(size, resolution):
            return SimpleNamespace(network=(size, resolution), train=SimpleNamespace(batch_size=32, precision="auto"))

        clock.now = 0.0
        monkeypatch.setattr(speed, "trial", trial)
        monkeypatch.setattr(speed, "stand_in_data", lambda config: None)
        monkeypatch.setattr(speed.time, "monotonic", lambda: clock.now)
        return speed.measure(candidates, config_of, torch.device("cpu"), seconds), clock.now

    return measure


def sizes(*names):
    return [next(size for size in laws.SIZES if size.name == name) for name in names]


TINY, DIT = sizes("tiny", "dit-small")
PAIRS = [(DIT, 16), (TINY, 8)]


def test_a_kind_that_does_three_times_the_work_in_a_second_is_measured_as_well(timed):
    """Judged by the U-Net it would take most of the time; where it does not, the plan would be off by that factor."""
    whole = 4 * 32 * DIT.work(16)
    found, seconds = timed({"adm": whole / 4, "dit": 3 * whole / 4}, PAIRS, 6.0)
    assert found["dit-small", 16] == pytest.approx(3 * whole / 4 / DIT.work(16))
    assert seconds < IMPORTS + 6.0


def test_a_network_that_would_take_too_long_is_left_to_its_work(timed):
    whole = 4 * 32 * DIT.work(16)
    found, _ = timed({"adm": whole / 40, "dit": whole / 40}, PAIRS, 6.0)
    assert list(found) == [("tiny", 8)]
    larger = [(size, 16) for size in laws.SIZES if size.kind == "dit" and 16 in size.sides]
    found, seconds = timed({"dit": whole / 2}, larger, 6.0)
    assert 1 <= len(found) < len(larger) and seconds < IMPORTS + 2 + 6.0


def test_the_imports_of_the_first_trial_do_not_count(timed):
    whole = 4 * 32 * TINY.work(8)
    found, _ = timed({"adm": 2 * whole, "dit": 1e3 * whole}, PAIRS, IMPORTS)
    assert len(found) == 2
