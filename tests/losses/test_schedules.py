"""Curricula and draws of times against published tables."""

import itertools
import math

import numpy as np
import pytest
import torch

from cmtool.config.combinations import MOST_POINTS
from cmtool.config.parts import CouplingPart, CurriculumPart, GapPart, TargetPart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.grid import karras_grid
from cmtool.schedules.curriculum import (
    curriculum_at,
    halving_span,
    mix_at,
    num_scales,
    num_scales_doubling,
    ratio_stage,
)
from cmtool.schedules.times import Uniforms, density_from, draw_times, grid_tensor, lognormal_masses, ratio_map
from tests.losses.oracles import D, column

PROCESS = ProcessConfig()


def spread(n):
    return (torch.arange(n, dtype=D) + 0.5) / n


def test_ict_grid_and_masses():
    grid = [0.002, 0.016721, 0.085087, 0.318283, 0.965417, 2.515219, 5.838948, 12.381576, 24.408342, 45.313734, 80]
    assert karras_grid(11) == pytest.approx(grid, abs=5e-7)
    masses = lognormal_masses(11, PROCESS, -1.1, 2.0)
    golden = [0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.04108, 0.01958, 0.008944, 0.00398]
    assert masses.tolist() == pytest.approx(golden, abs=5e-7)
    t = grid_tensor(11, PROCESS)
    assert float((masses / (t[1:] - t[:-1])).sum()) == pytest.approx(8.420307, abs=1e-6)


@pytest.mark.parametrize("parameterization", ["edm", "trig", "flow", "consistency"])
def test_log_normal_levels_are_not_cut_off(parameterization):
    """As published; where f is the identity at sigma_min, levels begin there."""
    process = ProcessConfig(parameterization=parameterization)
    part = TimesPart(kind="lognormal", mean=-1.1, std=2.0)
    t, r = draw_times(part, GapPart(kind="none"), spread(100_000), process, 2, 0)
    assert torch.equal(t, r)
    assert float((t > 80).double().mean()) == pytest.approx(0.00307, rel=0.02)
    below = {"consistency": 0.0}.get(parameterization, 0.00526)
    assert float((t < 0.002).double().mean()) == pytest.approx(below, rel=0.02)
    if parameterization != "consistency":
        assert float(t.log().mean()) == pytest.approx(-1.1, abs=1e-3)
        assert float(t.log().std()) == pytest.approx(2.0, abs=1e-3)


def test_progressive_stages_are_the_published_ones():
    """11 stages of 50,000 steps from 4096 levels to 4, then 100,000 for 2 and for 1 (Song et al. 2023, Appendix C)."""
    part = CurriculumPart(scales="halving", s0=4096, s1=1)
    starts = [50_000 * k for k in range(11)] + [550_000, 650_000]
    for stage, (first, end) in enumerate(itertools.pairwise([*starts, 750_000])):
        for step in (first, end - 1):
            assert num_scales(part, step, 750_000) == 4096 // 2**stage + 1
            assert halving_span(part, step, 750_000) == (first, end)


def test_grid_draws_follow_the_masses_and_are_neighbors():
    t, r = draw_times(TimesPart(kind="grid_lognormal"), GapPart(), spread(20_000), PROCESS, 11, 0)
    grid = grid_tensor(11, PROCESS)
    index = torch.searchsorted(grid, t)
    assert torch.equal(grid[index], t)
    assert torch.equal(grid[index - 1], r)
    share = torch.bincount(index - 1, minlength=10).double() / 20_000
    assert torch.allclose(share, lognormal_masses(11, PROCESS, -1.1, 2.0), atol=1e-4)


def test_the_finest_grid_still_has_gaps_in_float32():
    """At the largest number of points that is taken, rounding moves a gap by about a percent; with 30 times as many, by a third."""
    for points, rounding in ((MOST_POINTS, 0.011), (30 * MOST_POINTS, 0.34)):
        low, high = PROCESS.sigma_min ** (1 / 7), PROCESS.sigma_max ** (1 / 7)
        gap = PROCESS.sigma_max - (high - (high - low) / (points - 1)) ** 7
        apart = gap / float(np.spacing(np.float32(PROCESS.sigma_max)))
        assert 0.5 / apart < rounding < 1 / apart
    t, r = draw_times(TimesPart(), GapPart(), spread(500), PROCESS, MOST_POINTS, 0)
    assert bool((t.float() > r.float()).all())
    assert float(((t.float() - r.float()) / (t - r) - 1).abs().max()) < 0.02


@pytest.mark.parametrize("seed_value", [0.0, 0.5, 1 - 1e-16])
@pytest.mark.parametrize("kind", ["grid_uniform", "grid_lognormal"])
def test_extreme_numbers_stay_on_the_grid(kind, seed_value):
    t, r = draw_times(TimesPart(kind=kind), GapPart(), column(seed_value), PROCESS, 18, 0)
    assert PROCESS.sigma_min <= float(r) < float(t) <= PROCESS.sigma_max


@pytest.mark.parametrize(
    ("steps", "s0", "s1", "mu0", "table"),
    [
        (
            800_000, 2, 150, 0.9,
            {
                0: (2, 0.8100, 0.9000), 1: (3, 0.9, 0.93217), 1000: (6, 0.958732, 0.965489),
                10_000: (17, 0.986916, 0.987681), 100_000: (54, 0.996032, 0.996105),
                400_000: (107, 0.998014, 0.998033), 800_000: (151, 0.998596, 0.998605),
            },
        ),
        (
            800_000, 2, 200, 0.95,
            {
                0: (2, 0.9025, 0.95), 1: (3, 0.95, 0.966383), 1000: (8, 0.985452, 0.987259),
                10_000: (23, 0.995348, 0.995550), 100_000: (72, 0.998556, 0.998576),
                800_000: (201, 0.999487, 0.999490),
            },
        ),
        (
            1_000_000, 2, 150, 0.95,
            {1000: (6, 0.979692, 0.983048), 10_000: (16, 0.993184, 0.993609), 1_000_000: (151, 0.999316, 0.999321)},
        ),
    ],
)  # fmt: skip
def test_n_and_mu_in_both_conventions(steps, s0, s1, mu0, table):
    target = TargetPart(ema=mu0, adaptive=True)
    for step, (points, code, paper) in table.items():
        for form, mu in (("code", code), ("paper", paper)):
            part = CurriculumPart(scales="sqrt", s0=s0, s1=s1, form=form)
            now = curriculum_at(part, target, GapPart(), step, steps)
            assert now.num_scales == points
            assert now.target_ema == pytest.approx(mu, abs=6e-6)


def test_n_first_rises_where_published():
    part = CurriculumPart(scales="sqrt", s0=2, s1=150)
    for points, step in {
        3: 1,
        4: 176,
        5: 422,
        6: 737,
        7: 1123,
        8: 1580,
        9: 2106,
        10: 2703,
        16: 7756,
        20: 12528,
    }.items():
        assert num_scales(part, step, 800_000) == points
        assert num_scales(part, step - 1, 800_000) == points - 1


def test_doubling():
    for step, points in {0: 11, 12499: 11, 12500: 21, 25000: 41, 75000: 641, 87500: 1281, 99999: 1281}.items():
        assert num_scales_doubling(step, 100_000, 10, 1280) == points
    # The ratio is floored, its logarithm is not: 10 to 100 in 10,000 steps changes every 2313.
    found = [num_scales_doubling(k * 2313, 10_000, 10, 100) for k in range(5)]
    assert found == [11, 21, 41, 81, 101]
    assert num_scales_doubling(2312, 10_000, 10, 100) == 11


def test_halving_is_the_published_schedule_of_progressive_distillation():
    part = CurriculumPart(scales="halving", s0=4096, s1=1)
    total = 750_000
    for step, intervals in {
        0: 4096,
        49_999: 4096,
        50_000: 2048,
        549_999: 4,
        550_000: 2,
        649_999: 2,
        650_000: 1,
    }.items():
        assert num_scales(part, step, total) - 1 == intervals
    target = TargetPart(rule="leap", update="stage")
    kept = [curriculum_at(part, target, GapPart(), k, total).target_ema for k in (0, 49_998, 49_999, 50_000, 749_999)]
    assert kept == [1.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 3, 40, 2801])
def test_a_short_run_goes_through_every_schedule(steps):
    for part in (
        CurriculumPart(scales="halving", s0=32, s1=1),
        CurriculumPart(scales="doubling", s0=10, s1=1280),
        CurriculumPart(scales="sqrt"),
    ):
        found = [num_scales(part, k, steps) for k in range(steps)]
        assert min(found) >= 2
        assert found == sorted(found, reverse=part.scales == "halving")


@pytest.mark.parametrize(
    ("q", "stage", "golden"),
    [
        (2.0, 0, [0, 0, 0, 0, 2.36614298, 40]),
        (2.0, 3, [0.0013755, 0.06999896, 0.37436483, 0.80302929, 4.67076787, 75]),
        (2.0, 7, [0.00196097, 0.09812493, 0.4921478, 0.98768933, 4.97942299, 79.6875]),
        (4.0, 3, [0.00196097, 0.09812493, 0.4921478, 0.98768933, 4.97942299, 79.6875]),
        (256.0, 0, [0.00196097, 0.09812493, 0.4921478, 0.98768933, 4.97942299, 79.6875]),
        (4.0, 0, [0, 0, 0, 0.21211716, 3.68307149, 60]),
    ],
)
def test_ect_map(q, stage, golden):
    r = ratio_map(GapPart(kind="ratio", q=q), column(0.002, 0.1, 0.5, 1, 5, 80), stage)
    assert r.tolist() == pytest.approx(golden, abs=1e-8)


def test_constant_map_is_a_geometric_grid_and_the_cap_holds():
    t = column(0.01, 1.0, 80.0)
    assert torch.allclose(ratio_map(GapPart(kind="ratio", map="constant"), t, 2), t * (1 - 1 / 8))
    capped = ratio_map(GapPart(kind="ratio", map="constant", cap=0.999), t, 11)
    assert torch.allclose(capped, 0.999 * t)
    assert [ratio_stage(GapPart(stages=4, first=3), k, 100) for k in (0, 24, 25, 99)] == [3, 3, 4, 6]


def test_student_times_of_tcm():
    part = TimesPart(kind="student_t", std=0.2, atom=0.25)
    n = 200_000
    numbers = Uniforms(spread(n), spread(n), torch.ones(n, dtype=D))
    t, r = draw_times(part, GapPart(kind="ratio", map="constant", first=9, cap=0.999), numbers, PROCESS, 0, 9)
    quantiles = np.quantile(t.numpy(), [0.05, 0.25, 0.5, 0.75, 0.9, 0.99])
    assert quantiles == pytest.approx([1.006, 1.043, 1.221, 2.524, 10.44, 61.3], rel=6e-4)
    assert float(t.min()) >= 1.0
    assert float(t.max()) <= 80.0
    assert torch.allclose(r, 0.999 * t)


def test_the_atom_of_tcm_is_an_exact_share():
    numbers = Uniforms(spread(64).flip(0), spread(64), spread(64))
    t, _ = draw_times(TimesPart(kind="student_t", std=0.2), GapPart(kind="ratio"), numbers, PROCESS, 0, 0)
    assert int((t == 1.0).sum()) == 16


def test_meanflow_times():
    g = torch.Generator().manual_seed(0)
    n = 200_000
    u, w = torch.rand(n, generator=g, dtype=D), torch.rand(n, generator=g, dtype=D)
    part = TimesPart(kind="two_lognormal", mean=-2.0, std=2.0, same=0.25)
    t, r = draw_times(part, GapPart(kind="none"), Uniforms(u, w, spread(n)), PROCESS, 0, 0)
    tau_t, tau_r = t / (1 + t), r / (1 + r)
    assert bool((r <= t).all())
    assert float((r == t).double().mean()) == pytest.approx(0.25, abs=1e-3)
    assert float(tau_t.mean()) == pytest.approx(0.354, abs=2e-3)
    assert float((tau_t - tau_r)[tau_r < tau_t].mean()) == pytest.approx(0.258, abs=3e-3)


def test_continuous_laws():
    u = spread(100_000)
    none = GapPart(kind="none")
    t, r = draw_times(TimesPart(kind="flow_uniform"), none, u, PROCESS, 0, 0)
    assert torch.equal(t, r)
    assert float((t / (1 + t)).mean()) == pytest.approx((0.002 / 1.002 + 80 / 81) / 2, abs=1e-6)
    t, _ = draw_times(TimesPart(kind="karras_uniform"), none, u, PROCESS, 0, 0)
    assert float((t ** (1 / 7)).mean()) == pytest.approx((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2, abs=1e-6)
    t, _ = draw_times(TimesPart(kind="lognormal", mean=-1.2, std=1.2), none, u, PROCESS, 0, 0)
    assert float(t.log().mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(t.log().std()) == pytest.approx(1.2, abs=1e-3)
    t, _ = draw_times(TimesPart(kind="largest"), none, u, PROCESS, 0, 0)
    assert set(t.tolist()) == {80.0}


def test_density_table():
    """A density proportional to t over ln t is uniform in t; the floor is uniform in ln t."""
    levels = torch.linspace(math.log(0.1), math.log(10.0), 2001, dtype=D).exp()
    t = density_from(levels, levels).quantile(spread(20_000))
    assert float(t.mean()) == pytest.approx(5.05, abs=1e-3)
    even = density_from(levels, levels, floor=1.0).quantile(spread(20_000))
    assert float(even.log().mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(density_from(levels, torch.zeros_like(levels)).quantile(column(0.5))) == pytest.approx(1.0, abs=1e-3)


def test_mix_schedule():
    part = CouplingPart(kind="generator", mix=0.2, mix_end=0.8)
    assert [mix_at(part, k, 100) for k in (0, 50, 100)] == pytest.approx([0.2, 0.5, 0.8])
    assert mix_at(CouplingPart(kind="generator", mix=0.3), 77, 100) == 0.3
