"""Noise levels: published values, and requests that must be refused."""

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.errors import UsageError, UserError
from cmtool.samplers.plan import SAMPLERS, choose_sampler, plan_sampling
from cmtool.samplers.times import (
    default_times,
    geometric_times,
    solver_times,
    spread_times,
    times_from_indices,
    validate_times,
)

PUBLISHED = [
    ((0, 11, 17), 18, 0.585348),  # CIFAR-10 CD
    ((0, 22, 39), 40, 1.382368),  # ImageNet-64 CD
    ((0, 106, 200), 201, 1.912844),  # ImageNet-64 CT
    ((0, 17, 39), 40, 4.365562),  # LSUN Bedroom CD, LPIPS
    ((0, 18, 39), 40, 3.519699),  # LSUN Bedroom CD, l2
    ((0, 67, 150), 151, 3.991219),  # LSUN Bedroom CT
    ((0, 62, 150), 151, 5.248503),  # LSUN Cat CT
]
PROCESS = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
CONSISTENCY = {"kind": "consistency", "process": PROCESS, "times": {"2": [80.0, 1.1]}}
TEACHER = {"kind": "diffusion", "process": PROCESS, "times": {}}


@pytest.mark.parametrize(("indices", "of", "second"), PUBLISHED)
def test_published_indices_give_the_published_second_time(indices, of, second):
    times = times_from_indices(indices, of)
    assert times[0] == 80.0
    assert times[1] == pytest.approx(second, rel=1e-6)
    assert len(times) == 2


def test_the_clean_end_costs_no_evaluation_and_may_be_left_out():
    assert times_from_indices((0, 22), 40) == times_from_indices((0, 22, 39), 40)
    assert len(times_from_indices(range(40), 40)) == 39


@pytest.mark.parametrize(
    ("indices", "of", "says"),
    [
        ((0, 40), 40, "outside"),
        ((-1, 3), 40, "outside"),
        ((0, 5, 5), 40, "ascend"),
        ((5, 0), 40, "ascend"),
        ((39,), 40, "nothing"),
        ((0,), 1, "at least 2"),
    ],
)
def test_bad_indices_are_refused(indices, of, says):
    with pytest.raises(UserError, match=says):
        times_from_indices(indices, of)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([], "no times"),
        ([80.0, 80.0], "strictly decrease"),
        ([1.0, 2.0], "strictly decrease"),
        ([81.0], "outside"),
        ([80, 0.001], "outside"),
        ([float("nan")], "outside"),
    ],
)
def test_bad_times_are_refused(times, says):
    with pytest.raises(UserError, match=says):
        validate_times(times, 0.002, 80.0)


def test_times_a_rounding_outside_the_range_are_taken_to_its_ends():
    assert validate_times([80.000001, 0.0019999999], 0.002, 80.0) == (80.0, 0.002)


def test_solver_grid_is_the_published_one():
    grid = solver_times(18)
    assert grid[0] == 80.0
    assert grid[-1] == 0.002
    assert grid[12] == pytest.approx(0.296442, rel=1e-5)
    assert solver_times(1) == (80.0,)


@given(st.integers(1, 200), st.floats(0.001, 0.1), st.floats(1.0, 200.0))
@settings(max_examples=60, deadline=None)
def test_default_levels_are_always_usable(steps, sigma_min, sigma_max):
    times = spread_times(steps, sigma_min, sigma_max)
    assert len(times) == steps
    assert times[0] == sigma_max
    assert validate_times(times, sigma_min, sigma_max) == pytest.approx(times)


def test_two_default_levels_are_80_and_point_8_and_say_so():
    assert default_times(2, {"process": PROCESS}).times == (80.0, 0.8)
    assert "default" in default_times(2, {"process": PROCESS}).source


def test_the_headers_own_times_come_first():
    chosen = default_times(2, CONSISTENCY)
    assert chosen.times == (80.0, 1.1)
    assert "own" in chosen.source


def test_geometric_levels_keep_their_ratio_and_ends():
    levels = geometric_times(5, 16.0, 1.0)
    assert levels == pytest.approx((16, 8, 4, 2, 1))
    assert geometric_times(1, 3.0, 1.0) == (3.0,)


def test_the_usual_sampler_fits_the_model():
    assert plan_sampling(CONSISTENCY).sampler == "multistep"
    assert plan_sampling(CONSISTENCY).nfe == 1
    teacher = plan_sampling(TEACHER)
    assert (teacher.sampler, len(teacher.times), teacher.nfe) == ("heun", 18, 35)


def test_a_sampler_of_the_other_kind_is_refused_with_those_that_fit():
    with pytest.raises(UserError, match=r"choose from multistep\.$"):
        choose_sampler("heun", "consistency")
    with pytest.raises(UserError, match=r"choose from multistep, jumps\.$"):
        choose_sampler("heun", "consistency", two_time=True)
    with pytest.raises(UserError, match="heun, euler"):
        choose_sampler("multistep", "diffusion")
    with pytest.raises(UserError, match="Did you mean ancestral"):
        choose_sampler("ancestrl", "diffusion")


@pytest.mark.parametrize(
    "request_",
    [
        {"steps": 2, "times": [80, 1]},
        {"indices": [0, 22], "of": None},
        {"of": 40},
        {"steps": 0},
        {"times": [80], "indices": [0], "of": 40},
    ],
)
def test_contradictory_requests_are_usage_errors(request_):
    with pytest.raises(UsageError):
        plan_sampling(CONSISTENCY, **request_)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_function_that_a_sampler_names_is_a_solver(name):
    from cmtool.samplers.generate import solver

    assert list(inspect.signature(solver(name)).parameters)[:4] == ["denoise", "x", "sigmas", "noise"]


def test_the_usual_range_is_the_schemas():
    from cmtool.config.schema import ProcessConfig
    from cmtool.samplers.times import RANGE

    assert {name: getattr(ProcessConfig(), name) for name in RANGE} == RANGE
