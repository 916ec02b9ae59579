"""The fast samplers: orders fitted on Gaussian data, evaluations counted, special cases that must coincide."""

import itertools
import math

import numpy as np
import pytest
import torch

from cmtool.diffusion.solvers import dpmpp_2m_along
from cmtool.errors import UserError
from cmtool.samplers.generate import bind
from cmtool.samplers.plan import SAMPLERS, plan_sampling
from cmtool.samplers.solvers import deis, deis_step, dpm2, dpmpp_2m, euler, jumps, lagrange_integrals, progressive
from cmtool.samplers.times import geometric_times, solver_times
from tests.samplers.oracle import GaussianDenoiser, solve

X = torch.tensor([[[[1.0]]], [[[-20.0]]]], dtype=torch.float64)


def error(sample, n, first=10.0, last=0.1, s=0.5):
    """Relative error at level `last`, where the last step to 0 then answers D: compared with the exact D there."""
    times = geometric_times(n, first, last)
    exact = X * math.sqrt((s**2 + last**2) / (s**2 + first**2)) * s**2 / (s**2 + last**2)
    return float(((solve(sample, GaussianDenoiser(s), X, times) - exact) / exact).abs().max())


def fitted(sample, sizes, **span):
    return -np.polyfit(np.log([n - 1 for n in sizes]), np.log([error(sample, n, **span) for n in sizes]), 1)[0]


@pytest.mark.parametrize(("sample", "order"), [(euler, 1), (dpm2, 2), (dpmpp_2m, 2)])
def test_fitted_order(sample, order):
    assert fitted(sample, (33, 65, 129, 257)) == pytest.approx(order, abs=0.25)


def started_exactly(n, first=10.0, last=0.1, s=0.5):
    """Relative error of DEIS whose first two slopes are those of the exact flow: what its order is about."""
    times = geometric_times(n, first, last)
    flow = [X * math.sqrt((s**2 + t**2) / (s**2 + first**2)) for t in times]
    slopes = [(t, x * t / (s**2 + t**2)) for t, x in zip(times, flow, strict=True)]
    x, history = flow[2], [slopes[1], slopes[0]]
    for t, r in itertools.pairwise(times[2:]):
        history = [(t, x * t / (s**2 + t**2)), *history][:3]
        x = deis_step(x, history, r)
    return float(((x - flow[-1]) / flow[-1]).abs().max())


def test_fitted_order_of_deis():
    sizes = (257, 513, 1025)
    errors = [started_exactly(n) for n in sizes]
    assert -np.polyfit(np.log([n - 1 for n in sizes]), np.log(errors), 1)[0] == pytest.approx(3, abs=0.1)


def test_fitted_order_of_deis_with_its_own_start():
    """The first step, which is Euler's, leaves an error of order 2; from sigma_max down it hides below 129 steps."""
    assert fitted(deis, (129, 257, 513)) == pytest.approx(2, abs=0.1)
    assert fitted(deis, (17, 33, 65, 129), first=80.0, last=0.02) > 3.0


@pytest.mark.parametrize(
    ("sample", "name"),
    [(dpm2, "dpm-solver-2"), (dpmpp_2m, "dpm-solver++-2m"), (deis, "deis-3")],
)
def test_evaluations_are_those_announced(sample, name):
    for n in (1, 2, 7):
        oracle = GaussianDenoiser()
        solve(sample, oracle, X, solver_times(n))
        assert oracle.calls == SAMPLERS[name].evaluations(n)


def test_remembering_pays_at_equal_evaluations():
    assert error(deis, 24) < error(dpmpp_2m, 24) < error(euler, 24) / 5


def test_of_order_one_deis_is_euler():
    times = solver_times(9)
    one = solve(deis, GaussianDenoiser(), X, times, order=1)
    assert torch.allclose(one, solve(euler, GaussianDenoiser(), X, times), atol=1e-10)


def test_lagrange_integrals_of_polynomials():
    """In u = ln t the weights reproduce the integral of t dt-measure for 1, u and u^2."""
    nodes, start, end = (4.0, 6.0, 9.0), 4.0, 2.5
    weights = lagrange_integrals(nodes, start, end)
    for power, exact in (
        (0, end - start),
        (1, (end * math.log(end) - end) - (start * math.log(start) - start)),
    ):
        assert sum(w * math.log(n) ** power for w, n in zip(weights, nodes, strict=True)) == pytest.approx(
            exact, rel=1e-9
        )


def test_progressive_ends_at_its_last_level():
    out = solve(progressive, GaussianDenoiser(), X, (10.0, 1.0), last=0.002)

    def factor(t, r):
        return (0.25 + t * r) / (0.25 + t * t)

    assert torch.allclose(out, X * factor(10.0, 1.0) * factor(1.0, 0.002))


def test_jumps_with_the_average_velocity_are_exact_in_any_number():
    """The clean end of the straight line from t to r on which the flow itself lands at r."""

    def model(x, t, label, r):
        t, r = t.reshape(-1, 1, 1, 1), r.reshape(-1, 1, 1, 1)
        landed = x * torch.sqrt((0.25 + r**2) / (0.25 + t**2))
        return (landed - r / t * x) / (1 - r / t)

    one = solve(jumps, model, X, (10.0,))
    many = solve(jumps, model, X, (10.0, 3.0, 0.2))
    assert torch.allclose(one, X * math.sqrt(0.25 / 100.25))
    assert torch.allclose(one, many)


HEADER = {"kind": "diffusion", "process": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}, "network": {}}


def test_a_model_names_its_own_sampler():
    plan = plan_sampling({**HEADER, "sample": {"sampler": "progressive", "steps": 2}})
    assert plan.sampler == "progressive"
    assert plan.times == pytest.approx(solver_times(3)[:-1])
    assert plan_sampling({**HEADER, "sample": {"sampler": None, "steps": None}}).sampler == "heun"
    assert len(plan_sampling({**HEADER, "sample": {"sampler": "progressive", "steps": 2}}, steps=8).times) == 8


def test_jumps_need_a_model_of_two_times():
    with pytest.raises(UserError, match="two times"):
        plan_sampling({**HEADER, "kind": "consistency"}, sampler="jumps")
    plan = plan_sampling({**HEADER, "kind": "consistency", "network": {"two_time": True}}, sampler="jumps")
    assert plan.nfe == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sampler_and_the_solver_of_training_walk_the_same_2m(dtype):
    """DPM-Solver++ 2M is one loop, for levels that are numbers and for those that are tensors of the batch."""
    x, levels = X.to(dtype), (10.0, 4.0, 1.0, 0.3)
    denoise = bind(GaussianDenoiser(), None, clamp=False)
    numbers = solve(dpmpp_2m, GaussianDenoiser(), x, levels)
    at = dpmpp_2m_along(denoise, x, [torch.full((2,), level, dtype=dtype) for level in levels])
    torch.testing.assert_close(numbers, denoise(at, torch.full((2,), levels[-1], dtype=dtype)))
