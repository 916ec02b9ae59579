"""The recursion four ways (closed form, splines, chains, trained networks) and what must hold for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmtool.errors import UserError
from cmtool.theory import chain, classes, edm, gaussian, population, solvers, trained
from cmtool.theory.distances import normal_nodes
from cmtool.theory.laws import GMM_A, GMM_E, Mixture, parse_law, product
from cmtool.theory.levels import karras, li, uniform_angle
from cmtool.theory.study import log_ratio, power_law
from tests.theory.oracle import gaussian_sde_sd, sampled_w1


def moments(law, levels, f):
    z, weight = normal_nodes(8.0, 4001)
    output = f(law.quantile(z, *population.at(levels, -1)))
    mean = weight @ output
    return float(mean), float(weight @ output**2 - mean**2)


@pytest.mark.parametrize("law", [GMM_A, parse_law("gmm:.2,.5,.3;-2,.3,1.5;.5,.3,.9"), parse_law("gauss:1;.5")])
def test_the_mean_stays_and_the_variance_shrinks(law):
    levels = li(24)
    mean, variance = moments(law, levels, population.train(law, levels, 1001)[-1])
    a, b = population.at(levels, 0)
    assert mean == pytest.approx(a * law.mean, abs=1e-6)
    assert variance < a * a * law.variance + b * b


def test_splines_reproduce_the_closed_form():
    law, levels, x = parse_law("gauss:1;.5"), li(30), np.linspace(-3, 3, 13)
    f = population.train(law, levels, 501)
    expected = gaussian.moments(levels, 1, 0.5)[0][0] + gaussian.gains(levels, 0.5)[-1] * (
        x - gaussian.moments(levels, 1, 0.5)[0][-1]
    )
    assert np.abs(f[-1](x) - expected).max() < 1e-9
    assert np.abs(population.distill(law, levels)(x) - expected).max() < 1e-12
    assert f[0](x) is x


def test_heun_step_is_second_order_and_matches_its_factor():
    law, times = parse_law("gauss:0;.5"), karras(12).noise
    x = np.array([1.0])
    for index in range(11, 0, -1):
        x = population.heun_step(law, x, (1.0, times[index - 1]), (1.0, times[index]))
    assert x[0] == pytest.approx(np.prod(edm.heun_factors(times, 0.5)), rel=1e-12)


@pytest.mark.parametrize("x0", [-40.0, 0.0, 40.0])
def test_chain_and_splines_agree_on_the_karras_grid(x0):
    levels, rng = karras(18), np.random.default_rng(3)
    f = population.train(GMM_E, levels, 1501)[-1]
    mean, error = chain.consistency(product(GMM_E, 1), levels, np.array([[x0]]), 20_000, rng)
    assert abs(float(f(np.array([x0]))[0]) - mean[0, 0]) < 4 * error[0, 0]


def test_chain_in_the_plane_decouples_and_its_posterior_mean_is_ddim():
    levels, rng, plane = li(12), np.random.default_rng(0), product(GMM_A, 2)
    x = np.array([[0.3, -0.8], [1.0, 0.1]])
    f = population.train(GMM_A, levels, 1001)[-1]
    mean, error = chain.consistency(plane, levels, x, 10_000, rng)
    assert (np.abs(mean - f(x)) < 4.5 * error).all()
    assert np.abs(chain.ddim(plane, levels, x) - population.distill(GMM_A, levels)(x)).max() < 1e-10


def test_chain_keeps_the_marginal_and_loses_the_stage_losses():
    levels, rng = li(16), np.random.default_rng(0)
    x = chain.marginal(product(GMM_A, 1), levels, -1, 3000, rng)
    ends = np.stack([chain.resample(product(GMM_A, 1), levels, x, rng) for _ in range(30)], axis=1)
    a, b = population.at(levels, 0)
    total = a * a * GMM_A.variance + b * b
    assert ends.var() == pytest.approx(total, rel=0.02)
    losses = population.stage_losses(GMM_A, levels, population.train(GMM_A, levels, 1001)).sum()
    assert total - chain.unbiased_trace_cov(ends) == pytest.approx(losses, abs=0.06)
    assert population.errors(GMM_A, levels, population.train(GMM_A, levels, 1001)[-1], "exact")[1] <= np.sqrt(losses)


def test_exponents_of_the_mixture():
    counts = [16, 32, 64, 128, 256]
    ct, cd = [], []
    for count in counts:
        levels = li(count)
        ct.append(population.errors(GMM_A, levels, population.train(GMM_A, levels, 1001, 8)[-1])[0])
        cd.append(population.errors(GMM_A, levels, population.distill(GMM_A, levels))[0])
    assert power_law("ct", counts, ct).exponent == pytest.approx(-0.557, abs=0.01)
    assert power_law("cd", log_ratio(counts), cd).exponent == pytest.approx(-1.0, abs=0.02)


@pytest.mark.parametrize(("family", "size"), [("poly", 1), ("poly", 5), ("relu", 3)])
def test_the_bound_holds_for_restricted_classes(family, size):
    levels = li(16)
    base = classes.population_w1(GMM_A, levels, population.train(GMM_A, levels, 1001)[-1])
    exact = classes.run_class(GMM_A, levels, family, size, nodes=8)
    fitted = classes.run_class(GMM_A, levels, family, size, 500, np.random.default_rng(0), nodes=8)
    assert exact.w1 <= base + exact.eps_class + 1e-9 and exact.eps_fit == 0.0
    assert fitted.w1 <= base + fitted.eps_class + fitted.eps_fit + 1e-9 and fitted.eps_fit > 0
    if (family, size) == ("poly", 1):
        assert exact.w1 > 0.9 * classes.affine_floor(GMM_A)


def test_ddim_progressive_and_distillation_are_one_map():
    levels, x = uniform_angle(17), np.linspace(-3, 3, 101)
    one = solvers.distill_progressively(GMM_A, levels, 4001)(x)
    assert np.abs(one - population.distill(GMM_A, levels)(x)).max() < 1e-6
    with pytest.raises(UserError, match="halved"):
        solvers.distill_progressively(GMM_A, uniform_angle(16))


def test_progressive_noise_law():
    rng = np.random.default_rng(0)
    gains = np.prod(1 + 0.02 * rng.standard_normal((20_000, 63)), axis=1)
    assert gains.std() == pytest.approx(solvers.relative_sd(63, 0.02), rel=0.02)


def test_sde_law_on_gaussian_data_is_its_variance_recursion():
    law, levels = parse_law("gauss:0;.5"), uniform_angle(9)
    state = solvers.BinnedLaw.from_cdf(lambda x: law.cdf(x, 0.0, 1.0), size=1200)
    for index in range(levels.count - 1, 0, -1):
        state = state.spread(*solvers.ancestral_step(law, levels, index))
    sd = float(np.sqrt(state.mass @ state.centers**2 - (state.mass @ state.centers) ** 2))
    assert sd == pytest.approx(gaussian_sde_sd(levels, 0.5), rel=2e-4)
    assert state.mass.sum() == pytest.approx(1.0, abs=1e-12)


def test_second_order_beats_first_and_a_mapped_law_keeps_its_w1():
    levels = uniform_angle(33)
    first = population.errors(GMM_A, levels, population.distill(GMM_A, levels))[0]
    second = population.errors(GMM_A, levels, solvers.second_order(GMM_A, levels))[0]
    assert second < first / 2
    functions = population.train(GMM_A, levels, 1001, 8)
    one_step = solvers.multistep_w1(GMM_A, levels, functions, [32])
    assert one_step == pytest.approx(population.errors(GMM_A, levels, functions[-1])[0], rel=5e-3)
    assert solvers.multistep_w1(GMM_A, levels, functions, [32, 20]) < one_step


@pytest.fixture(scope="module")
def small_training():
    members = [trained.Member(method, "restarted", seed) for method in ("ct", "cd") for seed in range(3)]
    levels = li(10)
    budget = trained.Budget(steps=150)
    return levels, trained.train_sequentially(product(GMM_A, 2), levels, members, budget, eval_count=128)


def test_trained_models_meet_the_theorem(small_training):
    """eps at most half the population error, the result below population plus eps, CT worse than CD by 3 s.e."""
    levels, found = small_training
    errors = trained.coupled_errors(GMM_A, levels, found, seed=0)
    ct = [i for i, member in enumerate(found.members) if member.method == "ct"]
    assert found.eps[ct].mean() <= 0.5 * errors.population["ct"]
    assert errors.runs[ct].mean() <= errors.population["ct"] + found.eps[ct].mean() + 2 * errors.error["ct"]
    assert abs(errors.runs[ct].mean() - errors.population["ct"]) <= found.eps[ct].mean()
    assert trained.gap_in_errors(errors, found) >= 3


def test_trained_outputs_are_near_the_population_function(small_training):
    levels, found = small_training
    x = chain.marginal(product(GMM_A, 2), levels, -1, 500, np.random.default_rng(1))
    best = population.train(GMM_A, levels, 1001)[-1](x)
    gaps = np.linalg.norm(found(x) - best, axis=2).mean(axis=1)
    for gap, eps, member in zip(gaps, found.eps, found.members, strict=True):
        if member.method == "ct":
            assert gap <= eps * 1.1
    w1, floor = sampled_w1(GMM_A, levels, found(x)[0], np.random.default_rng(0))
    assert w1 > floor


@pytest.mark.slow
def test_full_training_and_its_learning_rate_rules():
    found = trained.run_training()
    assert found.eps_share <= 0.5 and found.excess_errors <= 2 and found.ct_over_cd_errors >= 3
    assert found.best_rate == "restarted"


def test_training_is_a_function_of_its_seed():
    members = [trained.Member("ct", "constant", 5), trained.Member("cd", "decayed", 5)]
    law, budget = product(GMM_A, 2), trained.Budget(width=8, steps=5, batch=32)
    one, two = (trained.train_sequentially(law, li(10), members, budget, 16) for _ in range(2))
    assert torch.equal(one.theta, two.theta)
    alone = trained.train_sequentially(law, li(10), members[:1], budget, 16)
    assert torch.allclose(alone.theta[0], one.theta[0], atol=1e-5)


def test_learning_rate_rules():
    assert trained.learning_rate("constant", 1.0, 0.9, 0.9) == 1.0
    assert trained.learning_rate("decayed", 1.0, 0.5, 0.0) == pytest.approx(1.001)
    assert trained.learning_rate("restarted", 1.0, 0.0, 0.9) == pytest.approx(1.001)
    assert trained.learning_rate("restarted", 1.0, 0.5, 0.0) == pytest.approx(0.501)


def test_torch_mixture_is_the_numpy_mixture():
    law = Mixture(np.array([0.3, 0.7]), np.array([[0.0, 1.0], [1.0, -1.0]]), np.array([0.3, 0.6]))
    x = np.random.default_rng(0).standard_normal((20, 2))
    ours = trained.TorchMixture(law).denoise(torch.tensor(x, dtype=torch.float32), 0.8, 0.6)
    assert np.abs(ours.numpy() - law.denoise(x, 0.8, 0.6)).max() < 1e-5
