"""Teachers' samplers: orders of convergence and variances on Gaussian data, evaluations counted."""

import itertools
import math

import pytest
import torch

from cmtool.samplers.plan import SAMPLERS
from cmtool.samplers.solvers import ancestral, euler, heun, midpoint
from cmtool.samplers.times import solver_times
from tests.samplers.oracle import GaussianDenoiser, solve, streams

S, SIGMA_MAX = 0.5, 80.0


def _error(solver, steps):
    # x(0) = x(T) s / sqrt(s^2 + T^2) exactly; sigma_min is large enough that the last Euler step to 0 does not rule.
    x = torch.full((1, 1, 1, 1), SIGMA_MAX, dtype=torch.float64)
    got = solve(solver, GaussianDenoiser(S), x, solver_times(steps, sigma_min=1e-4))
    return abs(got.item() - SIGMA_MAX * S / math.hypot(S, SIGMA_MAX))


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (midpoint, 2)])
def test_order_of_convergence(solver, order):
    coarse, fine = _error(solver, 40), _error(solver, 160)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    ("name", "solver"), [("euler", euler), ("heun", heun), ("dpm", midpoint), ("ancestral", ancestral)]
)
def test_evaluations_are_as_many_as_the_table_says(name, solver):
    denoise = GaussianDenoiser()
    solve(solver, denoise, torch.randn(2, 1, 2, 2), solver_times(18), streams(2), clamp=True)
    assert denoise.calls == SAMPLERS[name].evaluations(18)


def test_ancestral_sampling_keeps_the_variance():
    draws = streams(60, dtype=torch.float64)
    x = solve(ancestral, GaussianDenoiser(S), SIGMA_MAX * draws.normal((1, 30, 30)), solver_times(200), draws)
    # Euler's mean at each step loses some variance: first order in the step, 3 % here.
    assert x.var().item() == pytest.approx(S**2, rel=0.06)


def test_ancestral_sampling_nears_the_exact_variance_with_the_steps():
    def variance(steps):
        # Exact recursion of the variance: x' = a x + up z with a = 1 + (down - t) (1 - c) / t, c = s^2 / (s^2 + t^2).
        sigmas = [*solver_times(steps), 0.0]
        v = SIGMA_MAX**2
        for t, r in itertools.pairwise(sigmas):
            a = 1 + (r**2 / t - t) / t * (t**2 / (S**2 + t**2))
            v = a**2 * v + r**2 * (t**2 - r**2) / t**2
        return v

    draws = streams(60, dtype=torch.float64)
    x = solve(ancestral, GaussianDenoiser(S), SIGMA_MAX * draws.normal((1, 30, 30)), solver_times(20), draws)
    assert x.var().item() == pytest.approx(variance(20), rel=4 * math.sqrt(2 / x.numel()))
    assert abs(variance(400) - S**2) < abs(variance(100) - S**2) / 3


def test_denoised_images_are_clamped_unless_told_otherwise():
    start = 80 * streams(4).normal((1, 8, 8))
    assert solve(heun, GaussianDenoiser(5.0), start, solver_times(8), clamp=True).abs().max() <= 1
    assert solve(heun, GaussianDenoiser(5.0), start, solver_times(8)).abs().max() > 2
