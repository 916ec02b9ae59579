"""Laws, distances and closed forms against independent routes: quadrature, ODE solvers, Monte Carlo, scipy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.stats import norm, wasserstein_distance

from cmtool.errors import UserError
from cmtool.theory import distances, edm, gap, gaussian, scaling, typical
from cmtool.theory.laws import GMM_A, Gaussian, LineMixture, Mixture, empirical, parse_law, product
from cmtool.theory.levels import SCHEDULES, build_levels, geometric, karras, li, smallest_count, uniform_angle
from cmtool.theory.study import local_slopes, log_ratio, power_law

WIDTHS = st.floats(0.05, 5.0)
UNEVEN = LineMixture(np.array([0.2, 0.5, 0.3]), np.array([-2.0, 0.3, 1.5]), np.array([0.5, 0.2, 0.9]))


@settings(max_examples=30, deadline=None)
@given(std=WIDTHS, count=st.integers(16, 300), schedule=st.sampled_from(["li", "angle", "cosine", "linear"]))
def test_gain_is_a_product_of_cosines_and_training_under_disperses(std, count, schedule):
    levels = build_levels(schedule, max(count, 25))
    v = gaussian.moments(levels, 0, std)[1]
    ratio = gaussian.gains(levels, std)[-1] * np.sqrt(v[-1] / v[0])
    assert ratio == pytest.approx(1 - gaussian.shrinkage(levels, std), rel=1e-11)
    span = float(np.ptp(levels.angles(std)))
    assert 1 - ratio >= gaussian.smallest_shrinkage(levels.count - 1, span) * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(std=WIDTHS, mean=st.floats(-3, 3), x=st.floats(-5, 5), k=st.integers(2, 30))
def test_flow_maps_compose(std, mean, x, k):
    levels = li(40)
    half = gaussian.flow_map(levels, mean, std, 40, k, x)
    whole = gaussian.flow_map(levels, mean, std, 40, 1, x)
    assert gaussian.flow_map(levels, mean, std, k, 1, half) == pytest.approx(whole, rel=1e-9, abs=1e-11)


@settings(max_examples=25, deadline=None)
@given(std=WIDTHS, count=st.integers(2, 200))
def test_training_equals_euler_on_gaussian_data(std, count):
    levels = karras(count)
    product_of_factors = np.prod(edm.euler_factors(levels.noise, std))
    assert gaussian.gains(levels, std)[-1] == pytest.approx(product_of_factors, rel=1e-10)


def test_the_intercept_is_needed_when_the_mean_is_not_zero():
    levels = li(32)
    assert gaussian.no_intercept_gain(levels, 0.0, 0.5) == pytest.approx(gaussian.gains(levels, 0.5)[-1], rel=1e-12)
    assert abs(gaussian.no_intercept_gain(levels, 1.0, 0.5) - gaussian.gains(levels, 0.5)[-1]) > 0.5


def test_gain_by_monte_carlo_regression():
    rng, levels, gain = np.random.default_rng(0), li(100), 1.0
    for t in range(1, 100):
        clean, noise = 2.0 * rng.standard_normal(20_000), rng.standard_normal(20_000)
        x = levels.signal[t] * clean + levels.noise[t] * noise
        gain *= x @ (levels.signal[t - 1] * clean + levels.noise[t - 1] * noise) / (x @ x)
    assert gain == pytest.approx(gaussian.gains(levels, 2.0)[-1], rel=3e-3)


@pytest.mark.parametrize("count", [16, 64, 256])
def test_finite_samples_hurt_less_with_more_levels(count):
    assert gaussian.finite_sample_sd(li(count), 1.0, 1000) == pytest.approx(
        {16: 0.01519, 64: 0.00897, 256: 0.00517}[count], rel=1e-3
    )


@pytest.mark.parametrize(("std", "value"), [(0.01, 0.125054), (0.25, 0.134322), (4.0, 0.140001), (100.0, 0.125103)])
def test_the_constant_of_the_theorem_schedule(std, value):
    assert gaussian.li_constant(std) == pytest.approx(value, abs=1.1e-6)


def test_quantile_inverts_in_both_tails():
    z = np.linspace(-9, 9, 1801)
    for law, level in ((GMM_A, (0.9, 0.4)), (UNEVEN, (1.0, 0.002)), (UNEVEN, (1.0, 80.0))):
        assert np.abs(law.normal_score(law.quantile(z, *level), *level) - z).max() < 1e-9


def test_line_score_and_denoiser_against_derivatives():
    x, a, b, step = np.linspace(-4, 4, 101), 0.8, 0.6, 1e-5
    slope = (UNEVEN.log_density(x + step, a, b) - UNEVEN.log_density(x - step, a, b)) / (2 * step)
    assert np.abs(UNEVEN.score(x, a, b) - slope).max() < 1e-8
    assert np.abs((a * UNEVEN.denoise(x, a, b) - x) / b**2 - slope).max() < 1e-8
    assert UNEVEN.cdf(x, a, b) + UNEVEN.survival(x, a, b) == pytest.approx(np.ones(101), abs=1e-14)


def test_line_flow_solves_the_probability_flow_ode():
    levels = li(64)
    start, end = -np.log(levels.alpha[-1]), -np.log(levels.alpha[0])

    def field(u: float, x: np.ndarray) -> np.ndarray:
        alpha = np.exp(-u)
        return -(x + GMM_A.score(x, np.sqrt(alpha), np.sqrt(-np.expm1(-u)))) / 2

    x = np.array([-1.5, 0.0, 0.4])
    path = solve_ivp(field, (start, end), x, method="DOP853", rtol=1e-11, atol=1e-12)
    exact = GMM_A.flow(x, (levels.signal[-1], levels.noise[-1]), (levels.signal[0], levels.noise[0]))
    assert np.abs(path.y[:, -1] - exact).max() < 1e-8


def test_full_covariance_flow_carries_the_law_and_matches_its_score():
    cov = np.array([[2.0, 0.6], [0.6, 0.5]])
    law = Gaussian(np.array([1.0, -2.0]), cov)
    start, end = (0.3, np.sqrt(1 - 0.09)), (0.9, np.sqrt(1 - 0.81))
    x = np.eye(2)
    jacobian = (law.flow(x, start, end) - law.flow(0 * x, start, end)).T
    before = start[0] ** 2 * cov + start[1] ** 2 * np.eye(2)
    after = end[0] ** 2 * cov + end[1] ** 2 * np.eye(2)
    assert np.abs(jacobian @ before @ jacobian.T - after).max() < 1e-12
    tweedie = (start[0] * law.denoise(x, *start) - x) / start[1] ** 2
    assert np.abs(law.score(x, *start) - tweedie).max() < 1e-12
    draws = law.sample(40_000, np.random.default_rng(0))
    assert np.abs(np.cov(draws.T) - cov).max() < 0.05


def test_plane_mixture_agrees_with_its_axes():
    plane, x = product(GMM_A, 2), np.random.default_rng(0).standard_normal((50, 2))
    a, b = 0.7, 0.5
    assert plane.log_density(x, a, b) == pytest.approx(GMM_A.log_density(x, a, b).sum(axis=1), abs=1e-10)
    assert np.abs(plane.denoise(x, a, b) - GMM_A.denoise(x, a, b)).max() < 1e-12
    assert np.abs(plane.score(x, a, b) - GMM_A.score(x, a, b)).max() < 1e-10


def test_posterior_draws_have_the_posterior_mean():
    plane, rng = product(GMM_A, 2), np.random.default_rng(0)
    x = np.array([[0.2, -0.4]])
    draws = plane.posterior_sample(np.repeat(x, 40_000, axis=0), 0.6, 0.8, rng)
    error = draws.std(axis=0) / 200
    assert (np.abs(draws.mean(axis=0) - plane.denoise(x, 0.6, 0.8)[0]) < 4 * error).all()


def test_empirical_law_denoises_to_its_points():
    law = empirical(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert np.abs(law.denoise(np.array([[2.9, 4.1]]), 1.0, 0.1) - [[3.0, 4.0]]).max() < 1e-12
    assert np.abs(law.denoise(np.array([[1.5, 2.0]]), 1.0, 0.1) - [[1.5, 2.0]]).max() < 1e-9


@settings(max_examples=30, deadline=None)
@given(bias=st.floats(-2, 2), spread=st.floats(0, 3))
def test_folded_normal(bias, spread):
    z, weight = distances.normal_nodes(9, 40_001)
    quadrature = distances.absolute_mean(bias + spread * z, z, weight)
    assert float(distances.folded(bias, spread)) == pytest.approx(quadrature, abs=2e-7)


def test_radial_distances_and_those_of_products():
    assert distances.chi_mean(1) == pytest.approx(np.sqrt(2 / np.pi), rel=1e-12)
    assert distances.chi_mean(3) == pytest.approx(2 * np.sqrt(2 / np.pi), rel=1e-12)
    low, high = distances.product_bounds(np.array([0.3, 0.4]), np.inf, np.array([0.3, 0.5]))
    assert low == pytest.approx(0.5) and high == pytest.approx(np.hypot(0.3, 0.5))


def test_sampled_distances_against_scipy():
    rng = np.random.default_rng(0)
    cloud, other = rng.standard_normal((80, 1)), rng.standard_normal((80, 1)) + 1
    expected = wasserstein_distance(cloud[:, 0], other[:, 0])
    assert distances.assignment_w1(cloud, other) == pytest.approx(expected, rel=1e-12)
    assert distances.assignment_w1(cloud, cloud + 0.5) == pytest.approx(0.5, rel=1e-12)
    assert distances.sliced_w1(cloud, cloud + 0.5, rng) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(("count", "dim", "word"), [(2001, 2, "2000"), (10, 4, "floor")])
def test_assignment_refuses_what_it_cannot_do(count, dim, word):
    with pytest.raises(UserError, match=word):
        distances.assignment_w1(np.zeros((count, dim)), np.zeros((count, dim)))


def test_generator_pairs_by_monte_carlo():
    rng, times, gain, std = np.random.default_rng(1), karras(18).noise, 1.0, 0.5
    for r, t in pairwise(times):
        clean, noise = std * rng.standard_normal(200_000), rng.standard_normal(200_000)
        guess = np.hypot(std, 0.002) / np.hypot(std, r) * (clean + r * noise)
        before, now = guess + r * noise, guess + t * noise
        gain *= (before @ now) / (now @ now)
    assert gain * 80 / np.hypot(std, 0.002) == pytest.approx(gap.spread_ratio(times, std, 1.0), rel=5e-3)
    x, a = clean + t * noise, np.hypot(std, 0.002) / np.hypot(std, t)
    pair = a * x + t * noise
    residual = np.var(noise - pair * (noise @ pair) / (pair @ pair))
    assert residual == pytest.approx(gap.residual_generator(std, t), rel=2e-2)


def test_discrepancy_limits_at_a_wrong_map():
    found = gap.wrong_map_losses(0.5, 0.7, 100_000)
    assert found["l2_gap"] == pytest.approx(35.660299, rel=1e-6)
    assert found["l1_ct"] - found["l1_cd"] == pytest.approx(0.473231, abs=1e-5)
    assert found["l2_ct_grad"] == pytest.approx(found["l2_cd_grad"], rel=1e-5)
    assert abs(found["l1_ct_grad"] - found["l1_cd_grad"]) > 0.02


def test_minority_masses_and_losses_between():
    assert [gap.minority_mass(p) for p in (0.55, 0.6, 0.8, 0.9)] == pytest.approx(
        [0.263199, 0.183923, 0.047945, 0.018028], abs=1.1e-6
    )
    masses = [gap.huber_errors(karras(80).noise, 0.7, c, 2001)[0] for c in (0.00054, 0.03, 0.3, np.inf)]
    assert masses == pytest.approx([0.0988, 0.1144, 0.2622, 0.2957], abs=4e-3)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_huber_center_is_the_minimizer(share):
    y = np.linspace(-1, 1, 20_001)
    cost = share * np.hypot(y - 1, 0.3) + (1 - share) * np.hypot(y + 1, 0.3)
    best = gap.huber_center(np.array([-1.0]), np.array([1.0]), np.array([share]), 0.3)[0]
    assert best == pytest.approx(y[cost.argmin()], abs=2e-4)


def test_typical_set_by_integration_and_formula():
    law = parse_law("gauss:0;1")
    assert typical.outside_by_level(law, li(50), 0.5) == pytest.approx(
        np.full(50, typical.gaussian_outside(1, 50, 0.5)), abs=2e-3
    )
    assert typical.tail_constant(100.0**-3, 2, 100) == pytest.approx(1.5)
    assert typical.tail_constant(0.0, 2, 100) == np.inf
    value, bound = typical.score_moment(GMM_A, li(100), 74)
    assert value < bound


def test_digits_estimates_are_consistent():
    rng = np.random.default_rng(0)
    found = typical.estimate_constants(typical.digits_law(), li(100), [60, 99], 60, rng)
    for constants in found:
        assert constants.c3_density[0] < constants.c3_density[1] < 0.5 and constants.c4_tail > constants.c4_resolved
    # At the last level X_t is N(0, I) to 5e-3: the depth per dimension is (1 + log 2 pi) / 2 on average.
    assert found[1].c3_density[0] * np.log(100) == pytest.approx((1 + np.log(2 * np.pi)) / 2, abs=0.05)


def test_power_law_recovers_an_exponent_and_its_error():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    fit = power_law("law", x, 3 * x**-1.5, -1.0)
    assert (fit.exponent, fit.factor) == pytest.approx((-1.5, 3.0)) and fit.error < 1e-12 and fit.theorem == -1.0
    assert local_slopes(x, x**2) == pytest.approx([2, 2, 2])
    noise = np.array([1.0, -1.0, -1.0, 1.0]) * 0.01
    lifted = power_law("law", x, np.exp(noise) * x)
    assert lifted.error == pytest.approx(np.sqrt(4e-4 / 2 / (5 * np.log(2) ** 2)), rel=1e-9)
    with pytest.raises(UserError, match="exponent"):
        power_law("law", [1.0, 1.0], [1.0, 2.0])


def test_the_measured_exponents_of_gaussian_data():
    counts = [16, 32, 64, 128, 256, 512]
    w1 = [gaussian.distances(li(count), 0, 1)[0] for count in counts]
    assert -1.02 < power_law("T", log_ratio(counts), w1).exponent < -0.98
    w2 = [gaussian.distances(li(64), 0, 1, dim)[1] for dim in (1, 4, 16, 64)]
    assert power_law("d", [1, 4, 16, 64], w2).exponent == pytest.approx(0.5, abs=1e-12)


def test_levels_needed_and_the_bound(monkeypatch):
    assert [scaling.levels_needed(dim, 0.1) for dim in (1, 4, 16, 64)] == [18, 47, 116, 276]
    assert [scaling.levels_needed(4, eps) for eps in (0.05, 0.025, 0.00625)] == [116, 276, 1434]
    assert scaling.bound_levels(1, 1.0) == pytest.approx(332_105, rel=1e-5)
    assert scaling.bound_value(4, scaling.bound_levels(4, 0.05)) == pytest.approx(0.05, rel=1e-9)
    found = scaling.make_plan(2, 0.1)
    assert found.mixture_measured and found.mixture is not None
    assert scaling.mixture_error(2, found.mixture) <= 0.1 < scaling.mixture_error(2, found.mixture - 1)
    monkeypatch.setattr(scaling, "MIXTURE_LIMIT", 128)
    beyond = scaling.make_plan(2, 0.05)
    assert not beyond.mixture_measured and beyond.mixture is not None and beyond.mixture > 128


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_are_variance_preserving_and_fall(name):
    levels = build_levels(name, 64)
    assert np.abs(levels.signal**2 + levels.noise**2 - 1).max() < 1e-12
    assert (np.diff(levels.signal) < 0).all() and levels.count == 64


def test_smallest_count_and_grids():
    assert smallest_count(4.0) == 9 and smallest_count(1000.0) == 9119
    assert np.ptp(np.diff(uniform_angle(20).angles(1.0))) < 1e-12
    assert geometric(5, 0.1, 10).noise[[0, 2, 4]] == pytest.approx([0.1, 1.0, 10.0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: li(8), ["T = 8", "c1", "below 1"]),
        (lambda: li(1), ["2 levels"]),
        (lambda: li(64, c0=-1), ["positive"]),
        (lambda: build_levels("linear", 16), ["linear", "T = 16"]),
        (lambda: build_levels("cosin", 16), ["cosin", "cosine"]),
        (lambda: Gaussian(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]])), ["positive semidefinite", "-1"]),
        (lambda: Gaussian(np.zeros(2), np.array([[1.0, 2.0], [0.0, 1.0]])), ["symmetric"]),
        (lambda: Gaussian(np.zeros(3), np.eye(2)), ["3 x 3"]),
        (lambda: parse_law("gmm:1,-1;0,0;1"), ["non-negative"]),
        (lambda: parse_law("gmm:0,0;0,0;1"), ["positive sum"]),
        (lambda: parse_law("gmm:.5,.5;0,0;-1"), ["negative"]),
        (lambda: parse_law("gmm:.5,.5;0,1,2;1,1,1"), ["2 weights"]),
        (lambda: parse_law("gauss:a;1"), ["'a'"]),
        (lambda: parse_law("cauchy:0;1"), ["cauchy"]),
        (lambda: Mixture(np.ones(2), np.zeros((3, 2)), np.ones(2)), ["2 weights"]),
        (lambda: empirical(np.array([[np.nan]])), ["finite"]),
        (lambda: product(GMM_A, 13), ["4096"]),
        (lambda: product(UNEVEN, 2), ["common width"]),
        (lambda: scaling.make_plan(0, 0.1), ["dimension"]),
        (lambda: scaling.make_plan(1, -0.1), ["positive"]),
        (lambda: scaling.make_plan(1, 0.1, 0.5), ["at least 1"]),
    ],
)
def test_bad_input_is_one_clear_sentence(make, words):
    with pytest.raises(UserError) as error:
        make()
    for word in words:
        assert word in error.value.message + (error.value.hint or "")
    assert "\n" not in error.value.message


def test_weights_are_scaled_with_a_notice():
    law = parse_law("gmm:1,3;-1,1;0.4")
    assert law.weights == pytest.approx([0.25, 0.75]) and law.notice is not None and "sum to 4" in law.notice
    assert parse_law("gmm:0.25,0.75;-1,1;0.4").notice is None
    assert norm.cdf(0) == law.cdf(np.array(law.quantile(np.array(0.0), 1, 0)), 1, 0)
