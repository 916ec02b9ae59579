"""Consistency training and distillation on data whose answers are known: K08 to K14, K20, and the pair itself."""

import math

import numpy as np
import pytest
import torch

from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.grid import karras_grid
from cmtool.diffusion.parameterization import Edm
from cmtool.diffusion.process import RectifiedFlow, TrigFlow, VarianceExploding
from cmtool.diffusion.solvers import build_solver, euler_step, heun_step
from cmtool.losses.direction import Reference, posterior_mean
from cmtool.theory.distances import normal_nodes
from cmtool.theory.laws import GMM_E
from tests.losses.oracles import D, Given, column, gaussian_consistency, gaussian_denoise, images, model, walk


def test_ct_pair_is_the_euler_step_with_the_data_as_denoiser():
    g = torch.Generator().manual_seed(0)
    x0, z = torch.randn(64, 1, 4, 4, generator=g, dtype=D), torch.randn(64, 1, 4, 4, generator=g, dtype=D)
    grid = torch.tensor(karras_grid(18), dtype=D)
    index = torch.randint(17, (64,), generator=g)
    t, r = grid[index + 1], grid[index]
    for step in (euler_step, heun_step):
        landed = step(lambda x, t: x0, VarianceExploding().noised(x0, z, t), t, r)
        assert torch.allclose(landed, VarianceExploding().noised(x0, z, r), rtol=0, atol=1e-11)


def test_k08_maps_and_scalings():
    denoise = gaussian_denoise(0.5, 0.3)
    assert float(denoise(images(1.0), column(2.0))) == pytest.approx(0.341176471, abs=1e-9)
    f = 0.3 + gaussian_consistency(images(0.7, 59.7), column(0.5, 80.0), 0.5, 0.002)
    assert f.flatten().tolist() == pytest.approx([0.794978707, 0.673120698], abs=1e-9)
    c = Edm(ProcessConfig()).coefficients(column(2.0))
    # The shifted scalings of the consistency model differ from EDM's in these two.
    from cmtool.diffusion.parameterization import Consistency

    shifted = Consistency(ProcessConfig()).coefficients(column(2.0))
    assert float(shifted.c_skip) == pytest.approx(0.0589344093, abs=1e-9)
    assert float(shifted.c_out) == pytest.approx(0.484586179, abs=1e-9)
    assert float(c.c_skip) == pytest.approx(0.25 / 4.25)


@pytest.mark.parametrize(
    ("solver", "n", "product"),
    [
        ("euler", 18, 5.28797756e-3),
        ("euler", 72, 6.00471469e-3),
        ("heun", 18, 6.59541349e-3),
        ("heun", 72, 6.26792061e-3),
    ],
)
def test_k09_products(solver, n, product):
    end = walk(build_solver(solver), gaussian_denoise(), images(1.0), n)
    assert float(end) == pytest.approx(product, rel=1e-8)


@pytest.mark.parametrize(
    ("solver", "errors", "order"),
    [
        ("euler", (-7.696e-2, -3.899e-2, -1.962e-2, -9.838e-3), 1.0),
        ("heun", (2.764e-2, 6.111e-3, 1.439e-3, 3.495e-4), 2.0),
    ],
)
def test_orders_of_distillation_by_regression(solver, errors, order):
    sizes = (18, 36, 72, 144)
    exact = gaussian_consistency(images(80.0), column(80.0), 0.5, 0.002)
    found = [float(walk(build_solver(solver), gaussian_denoise(), images(80.0), n) - exact) for n in sizes]
    assert found == pytest.approx(errors, rel=5e-4)
    slope = np.polyfit(np.log([n - 1 for n in sizes]), np.log(np.abs(found)), 1)[0]
    assert -slope == pytest.approx(order, abs=0.08)


def test_k10_orders_far_out():
    exact = float(gaussian_consistency(images(1.0), column(80.0), 0.5, 0.002))

    def gap(solver, n):
        return abs(float(walk(build_solver(solver), gaussian_denoise(), images(1.0), n)) / exact - 1)

    for solver, order in (("euler", 0.998299), ("heun", 2.002541)):
        rate = math.log(gap(solver, 576) / gap(solver, 1280)) / math.log(1279 / 575)
        assert rate == pytest.approx(order, abs=2e-6)
    assert 1279 * gap("euler", 1280) == pytest.approx(2.838651, abs=1e-6)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "adams_bashforth"])
def test_multistep_teacher_solvers_are_of_order_two_and_cost_one_call_a_step(solver):
    exact = float(gaussian_consistency(images(1.0), column(5.0), 0.5, 0.05))
    calls = 0

    def denoise(x, t):
        nonlocal calls
        calls += 1
        return gaussian_denoise()(x, t)

    def error(steps):
        end = build_solver(solver, steps)(denoise, images(1.0), column(5.0), column(0.05))
        return abs(float(end) - exact)

    assert error(7) > 0
    assert calls == 7
    slope = math.log(error(40) / error(160)) / math.log(4)
    assert slope == pytest.approx(2.0, abs=0.15)


def test_repeated_steps_are_the_finer_grid():
    """Two solver steps inside each of 17 intervals are one step in each of 34, for both lie even in t^(1/7)."""
    coarse = walk(build_solver("heun", 2), gaussian_denoise(), images(1.0), 18)
    fine = walk(build_solver("heun"), gaussian_denoise(), images(1.0), 35)
    assert float(coarse) == pytest.approx(float(fine), rel=1e-10)


def test_k11_loss_of_the_exact_map_is_the_discrepancy():
    """N^2 L_CT(f*) on a uniform grid of N = 1e5 steps: what consistency training reports when it is perfect."""
    s, low, high, n = 0.5, 0.002, 80.0, 100_000
    t = torch.linspace(low, high, n + 1, dtype=D)
    gain = gaussian_consistency(torch.ones(n + 1, 1, 1, 1, dtype=D), t, s, low).flatten()
    a, b = gain[1:] - gain[:-1], gain[1:] * t[1:] - gain[:-1] * t[:-1]
    assert n**2 * float((s**2 * a**2 + b**2).mean()) == pytest.approx(31.255636, rel=1e-6)


def test_k13_without_stop_gradient_the_output_shrinks():
    """Minimizing both ends of every pair jointly gives std .302294 of the data's at N = 1000 (Karras grid, s = .5)."""
    s, n = 0.5, 1000
    t = np.array(karras_grid(n))
    # f_n(x) = A_n x with A_1 = 1: stationarity of sum_n E(A_{n+1} x_{n+1} - A_n x_n)^2 is tridiagonal.
    v, c = s**2 + t**2, s**2 + t[1:] * t[:-1]
    matrix = np.diag(np.append(2 * v[1:-1], v[-1])) - np.diag(c[1:], 1) - np.diag(c[1:], -1)
    right = np.zeros(n - 1)
    right[0] = c[0]
    joint = np.linalg.solve(matrix, right)[-1] * math.sqrt(v[-1]) / math.sqrt(v[0])
    assert joint == pytest.approx(0.302294317, abs=1e-8)


def wasserstein(x_start, n, step):
    """W1 of what n - 1 steps make of the quantiles of p_T, against the data's quantiles."""
    nodes, weights = normal_nodes(6.0, 801)
    x = torch.tensor(GMM_E.quantile(nodes, 1.0, 80.0), dtype=D).reshape(-1, 1, 1, 1)
    end = walk(euler_step, step, x, n).flatten().numpy()
    return float(weights @ np.abs(end - GMM_E.quantile(nodes, 1.0, 0.002)))


def test_k20_variance_reduction_moves_the_population_answer():
    """Towards the sample: .1030. Towards the posterior mean of enough reference images: distillation's .0550."""
    u = (np.arange(3000) + 0.5) / 3000
    from scipy.special import ndtri

    bank = torch.tensor(GMM_E.quantile(ndtri(u), 1.0, 1e-9), dtype=D).reshape(-1, 1, 1, 1)
    with_bank = wasserstein(None, 18, lambda x, t: posterior_mean(x, t, Reference(bank)))
    assert with_bank == pytest.approx(0.0549973543, abs=4e-3)
    from cmtool.theory.levels import karras
    from cmtool.theory.population import errors, train

    sample_direction = errors(GMM_E, karras(18), train(GMM_E, karras(18), 1001)[-1], "exact", 4001)[0]
    assert sample_direction == pytest.approx(0.103014931, abs=2e-5)


def test_posterior_mean_against_brute_force():
    g = torch.Generator().manual_seed(1)
    bank, x = torch.randn(7, 2, 3, 3, generator=g, dtype=D), torch.randn(5, 2, 3, 3, generator=g, dtype=D)
    t = column(0.3, 0.7, 1.0, 2.0, 9.0)
    kinds = torch.tensor([0, 1, 0, 1, 0, 1, 2])
    label = torch.tensor([0, 1, 2, 3, -1])
    for reference, wanted in ((Reference(bank), None), (Reference(bank, kinds), label)):
        mean = posterior_mean(x, t, reference, wanted)
        for i in range(5):
            near = ((x[i] - bank) ** 2).sum((1, 2, 3))
            weight = torch.exp(-near / (2 * t[i] ** 2))
            if wanted is not None and bool((kinds == wanted[i]).any()):
                weight = weight * (kinds == wanted[i])
            expected = (weight[:, None, None, None] * bank).sum(0) / weight.sum()
            assert torch.allclose(mean[i], expected, atol=1e-12)


def test_a_subset_is_joined_by_the_image_that_was_noised():
    """Its own image counts once, whether the subset holds it or not; then x -> x0 as t -> 0, for every image."""
    g = torch.Generator().manual_seed(2)
    images = torch.randn(9, 1, 4, 4, generator=g, dtype=D)
    part = Reference(images[:6], torch.tensor([0, 0, 1, 1, 2, 2]), whole=False)
    own, label = images[[0, 3, 7, 8]], torch.tensor([0, 1, 3, -1])
    for level in (0.002, 0.5, 1.0, 9.0):
        t = torch.full((4,), level, dtype=D)
        x = own + level * torch.randn(own.shape, generator=g, dtype=D)
        plain, labeled = posterior_mean(x, t, part, None, own), posterior_mean(x, t, part, label, own)
        for i, joined in enumerate(
            (images[:6], images[:6], images[[0, 1, 2, 3, 4, 5, 7]], images[[0, 1, 2, 3, 4, 5, 8]])
        ):
            expected = posterior_mean(x[i : i + 1], t[:1], Reference(joined))
            assert torch.allclose(plain[i], expected[0], atol=1e-12)
        for i, joined in enumerate((images[:2], images[2:4], images[7:8], images[[0, 1, 2, 3, 4, 5, 8]])):
            expected = posterior_mean(x[i : i + 1], t[:1], Reference(joined))
            assert torch.allclose(labeled[i], expected[0], atol=1e-12)
        assert level > 0.002 or torch.allclose(plain, own, atol=1e-12)
    assert not torch.allclose(posterior_mean(own[2:], torch.full((2,), 0.002, dtype=D), part), own[2:], atol=0.1)


def test_a_large_bank_is_compared_in_float32_with_the_same_answer(monkeypatch):
    from cmtool.losses import direction

    g = torch.Generator().manual_seed(3)
    images = torch.rand(40, 3, 8, 8, generator=g) * 2 - 1
    part = Reference(images[:30], whole=False)
    own = images[[0, 5, 33, 39]]
    x = own + torch.randn(own.shape, generator=g)
    for level in (0.3, 2.0, 20.0):
        t = torch.full((4,), level)
        exact = posterior_mean(x, t, part, None, own)
        monkeypatch.setattr(direction, "_FLOAT64_VALUES", 0)
        assert torch.allclose(posterior_mean(x, t, part, None, own), exact, atol=2e-3)
        monkeypatch.undo()


def test_posterior_mean_far_from_all_images_stays_finite():
    bank = torch.zeros(3, 1, 2, 2, dtype=torch.float32)
    bank[1] += 1
    x = torch.full((1, 1, 2, 2), 50.0)
    assert torch.allclose(posterior_mean(x, torch.tensor([0.002]), Reference(bank)), bank[1:2])


def test_trigflow_and_edm_convert_exactly():
    t = column(0.002, 0.5, 0.821, 1.0, 1.526, 80.0)
    trig = TrigFlow(0.5)
    tau = trig.time(t)
    assert tau.tolist() == pytest.approx(
        [0.00399998, math.pi / 4, 1.0237757, 1.1071487, 1.2541659, 1.5645464], abs=1e-7
    )
    c = Edm(ProcessConfig()).coefficients(t)
    assert torch.allclose(tau.cos() ** 2, c.c_skip, atol=1e-15)
    assert torch.allclose(0.5 * tau.sin(), c.c_out, atol=1e-15)
    assert torch.allclose(tau.cos() / 0.5, c.c_in, atol=1e-15)
    assert torch.allclose(trig.scale(t), tau.cos(), atol=1e-15)
    assert torch.allclose(trig.level(tau), t, rtol=1e-9)
    assert torch.allclose(trig.speed(t), 0.5 / tau.cos() ** 2, rtol=1e-9)


def test_rectified_flow_converts_exactly():
    flow, t = RectifiedFlow(), column(0.002, 0.5, 4.0, 80.0)
    tau = flow.time(t)
    assert torch.allclose(flow.level(tau), t, rtol=1e-12)
    assert torch.allclose(flow.scale(t), 1 - tau, atol=1e-15)
    x0, z = images(0.1, -0.4, 0.9, 0.2), images(1.0, -2.0, 0.3, 0.7)
    own = flow.scale(t).reshape(-1, 1, 1, 1) * VarianceExploding().noised(x0, z, t)
    assert torch.allclose(own, (1 - tau).reshape(-1, 1, 1, 1) * x0 + tau.reshape(-1, 1, 1, 1) * z, atol=1e-15)
    h = 1e-6
    assert torch.allclose((flow.level(tau + h) - flow.level(tau - h)) / (2 * h), flow.speed(t), rtol=1e-4)


@pytest.mark.parametrize("kind", ["trig", "flow", "edm"])
def test_scalings_of_a_denoiser_answer_the_data_of_the_exact_network(kind):
    """With the exact F of Gaussian data every parameterization gives the same denoiser."""
    from cmtool.diffusion.parameterization import build_parameterization

    process = ProcessConfig(parameterization=kind)
    t, x = column(0.01, 0.5, 3.0, 80.0), images(0.2, -1.0, 2.5, 60.0)
    c = build_parameterization(process).coefficients(t)
    exact = gaussian_denoise(0.3)(x, t)
    skip, out = c.c_skip.reshape(-1, 1, 1, 1), c.c_out.reshape(-1, 1, 1, 1)
    raw = (exact - skip * x) / out
    if kind == "flow":  # F is the velocity: noise minus data
        noise = (x - exact) / t.reshape(-1, 1, 1, 1)
        assert torch.allclose(raw, noise - exact, atol=1e-9)
    answered = model(Given(lambda x, c: raw), parameterization=kind)(x, t)
    assert torch.allclose(answered, exact, atol=1e-12)


@pytest.mark.parametrize(("count", "sample", "flow"), [(10, 0.228235770, 0.116556841), (16, 0.166031072, 0.0744163986)])
def test_k17_and_k18_on_the_theorems_schedule(count, sample, flow):
    """The same in variance-preserving training: from K17 towards the sample to K18, the composed DDIM steps."""
    from scipy.special import ndtri

    from cmtool.theory.laws import GMM_A
    from cmtool.theory.levels import li
    from cmtool.theory.population import errors, train

    levels = li(count)
    assert errors(GMM_A, levels, train(GMM_A, levels, 801)[-1], "normal", 4001)[0] == pytest.approx(sample, rel=1e-4)
    bank = GMM_A.quantile(ndtri((np.arange(3000) + 0.5) / 3000), 1.0, 1e-9)
    reference = Reference(torch.tensor(bank, dtype=D).reshape(-1, 1, 1, 1))
    nodes, weights = normal_nodes(6.0, 601)
    sigma = levels.noise / levels.signal
    x = torch.tensor(nodes / levels.signal[-1], dtype=D).reshape(-1, 1, 1, 1)
    for t, r in zip(sigma[:0:-1], sigma[-2::-1], strict=True):
        at = [torch.full((len(x),), float(level), dtype=D) for level in (t, r)]
        x = euler_step(lambda x, t: posterior_mean(x, t, reference), x, *at)
    end = levels.signal[0] * x.flatten().numpy()
    found = float(weights @ np.abs(end - GMM_A.quantile(nodes, levels.signal[0], levels.noise[0])))
    assert found == pytest.approx(flow, abs=3e-3)


# docs/teacher-solvers.md: W1 of the composed steps on GMM-E by teacher calls, (solver, substeps, calls a pair).
CALLS = {
    ("euler", 1, 1): (0.0263, 0.0132, 0.0066),
    ("heun", 1, 2): (0.0169, 0.0038, 0.0009),
    ("dpmpp_2m", 2, 2): (0.0128, 0.0065, 0.0033),
    ("dpmpp_2m", 4, 4): (0.0045, 0.0028, 0.0015),
    ("dpmpp_2m", 9, 9): (0.0034, 0.0008, 0.0006),
    ("adams_bashforth", 4, 4): (0.0120, 0.0048, 0.0021),
    ("adams_bashforth", 9, 9): (0.0091, 0.0032, 0.0012),
}


@pytest.mark.parametrize("setting", CALLS)
def test_what_a_teachers_solver_buys_at_equal_calls(setting):
    from pathlib import Path

    solver, substeps, a_pair = setting
    nodes, weights = normal_nodes(6.0, 401)
    x = torch.tensor(GMM_E.quantile(nodes, 1.0, 80.0), dtype=D).reshape(-1, 1, 1, 1)

    def denoise(x, t):
        return torch.tensor(GMM_E.denoise(x.flatten().numpy(), 1.0, float(t[0]))).reshape(x.shape)

    found = []
    for calls in (36, 72, 144):
        end = walk(build_solver(solver, substeps), denoise, x, calls // a_pair + 1).flatten().numpy()
        found.append(float(weights @ np.abs(end - GMM_E.quantile(nodes, 1.0, 0.002))))
    assert found == pytest.approx(CALLS[setting], abs=6e-5)
    page = (Path(__file__).parents[2] / "docs" / "teacher-solvers.md").read_text(encoding="utf-8")
    assert " | ".join(f"{value:.4f}" for value in CALLS[setting]) in page
