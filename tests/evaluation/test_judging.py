"""Intervals and comparisons, copies, consistency along trajectories, models judged in memory."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from cmtool.config.schema import EvalConfig, ProcessConfig
from cmtool.errors import DataError, UsageError, UserError
from cmtool.evaluation.bootstrap import compare, frechet_statistic, interval, share_statistic
from cmtool.evaluation.closing_search import RunJudge, descending_grid, short_search
from cmtool.evaluation.consistency import measure_consistency
from cmtool.evaluation.memorization import copies
from cmtool.evaluation.models import TimesScore, judge_model, make_images
from cmtool.evaluation.statistics import statistics
from cmtool.models import ConsistencyModel, Denoiser
from cmtool.samplers.plan import plan_sampling


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def header(kind, channels=1, resolution=8, source="digits"):
    process = ProcessConfig(sigma_data=0.5).model_dump(mode="json")
    data = {"source": source, "resolution": resolution, "channels": channels, "num_classes": None}
    return {"kind": kind, "process": process, "data": data, "times": {"2": [80.0, 0.5]}}


class Exact(torch.nn.Module):
    """f or D of data N(0, s^2) per pixel, in place of network and parameterization."""

    def __init__(self, model, s=0.5, consistent=True):
        super().__init__()
        self.s, self.consistent, self.calls = s, consistent, 0
        self.weight = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        model.forward = self.forward

    def forward(self, x, t, label=None, r=None):
        self.calls += len(x)
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        ratio = (self.s**2 + 0.002**2) / (self.s**2 + t**2)
        return x * (ratio.sqrt() if self.consistent else self.s**2 / (self.s**2 + t**2))


def exact(kind=ConsistencyModel, s=0.5):
    model = kind(torch.nn.Identity(), ProcessConfig(sigma_data=s), header(kind.kind))
    model.network = Exact(model, s, kind is ConsistencyModel)
    return model


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_of_a_mean_has_its_known_width():
    values = np.random.default_rng(0).standard_normal(400)
    found = interval(lambda rows: float(values[rows].mean()), 400, 500)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    with pytest.raises(UsageError, match="too few"):
        interval(lambda rows: 0.0, 10, 5)


def test_a_comparison_of_a_set_with_itself_or_another_seed_is_not_distinguishable_and_a_worse_one_is():
    random = np.random.default_rng(1)
    real = random.standard_normal((600, 6))
    fit = statistics(real)
    same, worse = random.standard_normal((2, 400, 6))
    sets = {"good": same, "as good": random.standard_normal((400, 6)), "worse": worse * 1.6}
    statistic = {name: frechet_statistic(rows, fit) for name, rows in sets.items()}
    itself = compare("FD", statistic["good"], statistic["good"], (400, 400), True, 50)
    assert (itself.difference, itself.low, itself.high) == (0, 0, 0) and not itself.distinguishable
    assert not compare("FD", statistic["good"], statistic["as good"], (400, 400), False, 60).distinguishable
    found = compare("FD", statistic["good"], statistic["worse"], (400, 400), False, 60)
    assert found.distinguishable and found.difference > 0


def test_pairs_are_sharper_than_independent_sets():
    random = np.random.default_rng(2)
    common = random.random(500)
    first, second = common < 0.5, common < 0.55
    paired = compare("share", share_statistic(first), share_statistic(second), (500, 500), True, 200)
    loose = compare("share", share_statistic(first), share_statistic(second), (500, 500), False, 200)
    assert paired.distinguishable and not loose.distinguishable


# --- copies ----------------------------------------------------------------------------------------------------------


def test_copies_are_found_and_fresh_samples_are_not():
    random = np.random.default_rng(5)
    real, fresh = random.standard_normal((400, 5)), random.standard_normal((300, 5))
    copied = real[:300] + 0.01 * random.standard_normal((300, 5))
    honest, caught = copies(fresh, real), copies(copied, real)
    assert caught.share > 0.98 and caught.ratio < 0.1
    assert abs(honest.share - honest.expected) < 0.1
    assert caught.nearest.tolist() == list(range(300))
    assert caught.closest(3)[0][0] == int(np.argmin(caught.distance))
    with pytest.raises(DataError):
        copies(fresh[:, :3], real)


def test_copies_equal_brute_force():
    random = np.random.default_rng(4)
    real, fake = random.standard_normal((40, 3)), random.standard_normal((30, 3))
    own = np.linalg.norm(real[:, None] - real[None], axis=-1) + 1e9 * np.eye(40)
    cross = np.linalg.norm(fake[:, None] - real[None], axis=-1)
    nearest = cross.argmin(1)
    assert copies(fake, real).share == pytest.approx((cross.min(1) < own.min(1)[nearest]).mean())
    left_out = []
    for index in range(40):
        near = own[index].argmin()
        others = own[near].copy()
        others[index] = np.inf
        left_out.append(own[index].min() < others.min())
    assert copies(fake, real).expected == pytest.approx(np.mean(left_out))


# --- consistency -----------------------------------------------------------------------------------------------------


def test_the_exact_model_is_consistent_and_an_identity_is_not():
    teacher = exact(Denoiser)
    good = measure_consistency(exact(), teacher, count=32, levels=40)
    assert good.end < 0.02 and good.neighbor < 0.01 and good.far < 0.03
    # Ends are N(0, s^2 + eps^2): unrelated ones are sqrt(2) s apart.
    assert good.shuffled == pytest.approx(0.5 * 2**0.5, rel=0.1)
    wrong = exact()
    wrong.network.s = 1.0
    bad = measure_consistency(wrong, teacher, count=32, levels=40)
    assert bad.figures()["consistency"] > 10 * good.figures()["consistency"]


# --- models ----------------------------------------------------------------------------------------------------------


def judge(count=200):
    return RunJudge.of(EvalConfig(reference="digits", count=count), exact())


def test_samples_of_a_model_are_those_of_its_seeds_in_any_batch():
    model = exact()
    plan = plan_sampling(model.header, steps=2)
    whole, parts = (make_images(model, plan, range(20), batch_size=size).all() for size in (20, 7))
    assert whole.shape == (20, 8, 8, 1)
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1


def test_times_that_begin_alike_share_their_evaluations_and_change_nothing():
    found, model = judge().judge, exact()
    seeds = range(50)
    score = TimesScore(model, found, seeds, batch_size=20)
    value = score((80.0, 3.0, 0.5))
    calls = model.network.calls
    again = score((80.0, 3.0, 0.2))
    assert model.network.calls - calls == 50
    for times, expected in (((80.0, 3.0, 0.5), value), ((80.0, 3.0, 0.2), again)):
        plan = plan_sampling(model.header, times=times)
        direct = judge_model(found, model, plan, seeds, ("fid",)).values["fid"]
        assert expected == pytest.approx(direct, rel=1e-3)


def test_the_judge_of_a_training_run_repeats_itself():
    found, model = judge(), exact()
    first = found(model)
    assert set(first) == {"fid", "precision", "recall"}
    assert found(model) == first
    assert found.search_count(0) and not found.is_worth(model, 10**9)  # of its own pictures alone
    with pytest.raises(UserError, match="names no reference"):
        RunJudge.of(EvalConfig(), model)


def test_a_short_search_ends_with_times_for_every_number_and_never_loses_to_those_it_started_with():
    found, model = judge().judge, exact()
    extra = short_search(model, found, steps=(2, 3), count=100, points=10)
    assert set(extra["times"]) == {"1", "2", "3"} == set(extra["figures"])
    for key, times in extra["times"].items():
        assert len(times) == int(key) and times[0] == pytest.approx(80)
        assert all(a > b for a, b in pairwise(times))
    fresh = TimesScore(model, found, range(1002_000_000, 1002_000_200))
    assert extra["figures"]["2"] <= fresh((80.0, 0.5)) + 1e-3


def test_grid_descends_over_the_whole_range():
    grid = descending_grid(exact(), 18)
    assert (grid[0], grid[-1], len(grid)) == (pytest.approx(80), pytest.approx(0.002), 18)
    assert all(a > b for a, b in pairwise(grid))


def test_a_short_search_stops_where_no_level_is_left_below():
    found, model = judge().judge, exact()
    extra = short_search(model, found, steps=(2, 3, 4), count=60, points=3)
    assert set(extra["times"]) >= {"1", "2"}
    assert "4" not in extra["figures"]


def test_an_interval_stays_among_possible_values_and_holds_its_value():
    inside = np.ones(50, dtype=bool)
    inside[:2] = False
    found = interval(share_statistic(inside), 50, 60, possible=(0, 1))
    assert found.low <= found.value <= found.high == 1
    rows = np.random.default_rng(0).standard_normal((40, 4))
    found = interval(frechet_statistic(rows, statistics(rows)), 40, 60, possible=(0, np.inf))
    assert (found.low, found.value) == (0, 0) and found.high > 0
