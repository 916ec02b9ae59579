"""Continuous time: gradient limits, sCM and MeanFlow against closed forms, and derivatives of every network."""

import math

import pytest
import torch

from cmtool.config.networks import network_config
from cmtool.config.parts import DistancePart, TargetPart, WeightingPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import RectifiedFlow, TrigFlow, expand
from cmtool.diffusion.solvers import euler_step
from cmtool.losses.assemble import build_distance, build_target
from cmtool.losses.tangent import log_derivative, normalized, trig_tangent
from cmtool.losses.terms import Nets, Points
from cmtool.losses.weighting import build_weighting
from cmtool.models import ConsistencyModel
from cmtool.networks import build_network
from tests.losses.oracles import D, Given, Linear, column, gaussian_denoise, images, model


def points(x_t, t, denoise, r=None, share=1.0, seed=None):
    r = t if r is None else r
    return Points(x_t, x_t, x_t, (t, r), None, denoise, euler_step, seed, share)


class Toy(torch.nn.Module):
    """A small smooth network in float64."""

    two_time = False

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(8, 5, generator=g, dtype=D) * 0.5)
        self.last = torch.nn.Parameter(torch.randn(4, 8, generator=g, dtype=D) * 0.5)

    def forward(self, x, c_noise, label=None, r=None):
        h = torch.cat([x.flatten(1), c_noise[:, None]], 1)
        return (torch.tanh(h @ self.first.T) @ self.last.T).reshape(x.shape)


def gradient(student, loss):
    grads = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])
    return torch.cat([g.flatten() for g in grads])


def discrete_gradient(student, distance, denoise, x0, z, u, n, stop_gradient, kind):
    """(N-1)^k times the gradient of the mean distance of neighbors of the grid about t(u), N = n."""
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    t, r = ((low + u * (high - low)) ** 7, (low + (u - 1 / (n - 1)) * (high - low)) ** 7)
    x_t = x0 + expand(t, x0) * z
    x_r = euler_step(denoise, x_t, t, r)
    target = student(x_r, r)
    loss = distance.between(student(x_t, t), target.detach() if stop_gradient else target).mean()
    return gradient(student, loss) * (n - 1) ** kind


@pytest.mark.parametrize(
    ("kind", "stop_gradient", "weight", "power", "direction"),
    [
        ("l2", True, "grid_speed", 1, "teacher"),  # Theorem 5
        ("l2", True, "grid_speed", 1, "sample"),  # Theorem 6
        ("l2", False, "speed_squared", 2, "teacher"),  # Theorem 3
        ("l1", False, "grid_speed", 1, "teacher"),  # Theorem 4
        ("pseudo_huber", True, "grid_speed", 1, "sample"),
    ],
)
def test_gradients_are_the_limits_of_the_discrete_ones(kind, stop_gradient, weight, power, direction):
    g = torch.Generator().manual_seed(3)
    x0, z = torch.randn(6, 1, 2, 2, generator=g, dtype=D), torch.randn(6, 1, 2, 2, generator=g, dtype=D)
    u = torch.rand(6, generator=g, dtype=D) * 0.6 + 0.2
    t = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    student = model(Toy(), parameterization="consistency")
    denoise = gaussian_denoise() if direction == "teacher" else lambda x, t: x0
    distance = build_distance(DistancePart(kind=kind, c=0.4), 4)
    rule = build_target(TargetPart(rule="tangent", stop_gradient=stop_gradient))
    measured = rule(Nets(student, student), points(x0 + expand(t, x0) * z, t, denoise)).measure(distance)
    speed = build_weighting(WeightingPart(kind="grid_speed"), ProcessConfig())(torch.ones_like(t), t, t, None)
    weights = speed**2 if weight == "speed_squared" else speed
    exact = gradient(student, (weights * measured).mean())
    errors = []
    for n in (1000, 10_000):
        limit = discrete_gradient(student, distance, denoise, x0, z, u, n, stop_gradient, power)
        errors.append(float((limit - exact).norm() / exact.norm()))
    assert errors[1] < 1e-2
    assert errors[1] < errors[0] / 3


def test_the_number_reported_with_a_stop_gradient_is_the_local_form():
    student = model(Linear(), parameterization="consistency")
    x, t = images(0.3, -1.0), column(0.5, 2.0)
    comparison = build_target(TargetPart(rule="tangent"))(Nets(student, student), points(x, t, gaussian_denoise()))
    measured = comparison.measure(build_distance(DistancePart(kind="l2"), 1))
    assert torch.allclose(measured.detach(), (comparison.tangent**2).flatten())
    assert gradient(student, measured.sum()).abs().sum() > 0


def test_the_exact_map_has_no_tangent_along_its_own_flow():
    s = 0.5

    def exact(x, t):
        return x * torch.sqrt((s**2 + 0.002**2) / (s**2 + expand(t, x) ** 2))

    x, t = images(0.3, -4.0, 70.0), column(0.1, 3.0, 80.0)
    _, slope = log_derivative(exact, x, t, x - gaussian_denoise()(x, t), TargetPart(rule="tangent"))
    assert float(slope.abs().max()) < 1e-14


NETWORKS = {
    "adm": network_config(channels=8, head_channels=8, attention=(4,), attention_kernel="math"),
    "song": network_config(kind="song", channels=8, head_channels=8, attention=(4,), attention_kernel="math"),
    "song residual": network_config(
        kind="song", channels=8, head_channels=8, attention=(4,), encoder="residual", embedding="fourier",
        fourier_scale=0.02, resample_filter=(1, 3, 3, 1), attention_kernel="math",
    ),
    "edm2": network_config(
        kind="edm2", channels=16, channel_mult=(1, 2), attention=(4,), head_channels=8, attention_kernel="math"
    ),
    "mlp": network_config(kind="mlp", channels=16, num_blocks=2),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("parameterization", ["consistency", "trig", "flow"])
def test_forward_mode_is_the_central_difference_on_every_network(name, parameterization):
    network = build_network(NETWORKS[name], channels=1, resolution=8, seed=1).double()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g, dtype=D) * 0.1)
    student = ConsistencyModel(network, ProcessConfig(parameterization=parameterization), {})
    x, t = torch.randn(3, 1, 8, 8, generator=g, dtype=D), column(0.05, 0.9, 20.0)
    shift = torch.randn(3, 1, 8, 8, generator=g, dtype=D)
    value, exact = log_derivative(student, x, t, shift, TargetPart(rule="tangent"))
    part = TargetPart(rule="tangent", derivative="difference", difference_step=1e-5)
    same, near = log_derivative(student, x, t, shift, part)
    assert torch.allclose(value, same, atol=1e-12)
    assert torch.allclose(exact, near, rtol=1e-6, atol=1e-7)


def test_difference_in_float32_is_good_enough():
    network = build_network(NETWORKS["adm"], channels=1, resolution=8, seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    student = ConsistencyModel(network, ProcessConfig(), {})
    x, t = torch.randn(3, 1, 8, 8, generator=g), torch.tensor([0.05, 0.9, 20.0])
    exact = log_derivative(student, x, t, x, TargetPart(rule="tangent"))[1]
    near = log_derivative(student, x, t, x, TargetPart(rule="tangent", derivative="difference"))[1]
    assert float((near - exact).norm() / exact.norm()) < 2e-3


# --- sCM: facts of TrigFlow with data std .3, sigma_data .5, tau = 1.1, x = .7 ---

S, SD, TAU, X = 0.3, 0.5, 1.1, 0.7
SIGMA = SD * math.tan(TAU)
SCALE = math.cos(TAU)


def exact_f_trig(x, tau):
    """F of the exact consistency map: f = s x / sqrt(V) with V = cos^2 s^2 + sin^2 sigma_data^2."""
    v = torch.cos(tau) ** 2 * S**2 + torch.sin(tau) ** 2 * SD**2
    return (torch.cos(tau) * x - S * x / v.sqrt()) / (SD * torch.sin(tau))


def trig_student(function):
    """A TrigFlow model whose F is a function of (x_trig, tau), x_trig not divided by sigma_data."""
    return model(Given(lambda x, c: function(x * SD, c)), parameterization="trig", sigma_data=SD)


def tangent_of(student, clean, share, normalize="none"):
    part = TargetPart(rule="trig_tangent", normalize=normalize, warmup=1.0)
    pts = points(images(X / SCALE), column(SIGMA), lambda x, t: clean, share=share)
    pair = build_target(part)(Nets(student, student), pts)
    return float(pair.target - pair.prediction)


VELOCITY = math.sin(TAU) * math.cos(TAU) * (SD**2 - S**2) * X / 0.2170800894
EXACT_CLEAN = math.cos(TAU) * X - math.sin(TAU) * VELOCITY
SAMPLE_CLEAN = (X - math.sin(TAU) * 0.4) / math.cos(TAU)


@pytest.mark.parametrize(
    ("function", "clean", "share", "golden"),
    [
        (exact_f_trig, EXACT_CLEAN, 1.0, 0.0),
        (exact_f_trig, EXACT_CLEAN, 0.0, 0.0736651605),
        (exact_f_trig, SAMPLE_CLEAN, 1.0, -0.2050468616),
        (exact_f_trig, SAMPLE_CLEAN, 0.5, -0.1379147951),
        (lambda x, tau: -0.2 * x + 0.1 * tau, SAMPLE_CLEAN, 1.0, -0.4215844473),
        (lambda x, tau: -0.2 * x + 0.1 * tau, SAMPLE_CLEAN, 0.0, -0.0984490511),
    ],
)
def test_tangent_of_scm(function, clean, share, golden):
    assert pytest.approx(0.7573192092, abs=1e-9) == SAMPLE_CLEAN
    assert pytest.approx(0.2085672562, abs=1e-9) == VELOCITY
    assert tangent_of(trig_student(function), clean, share) == pytest.approx(golden, abs=1e-9)


def test_networks_of_gaussian_data_in_trigflow():
    """F of the consistency map and of the flow, and f itself, through the model's own scalings."""
    x, t = images(X / SCALE), column(SIGMA)
    assert float(exact_f_trig(images(X), column(TAU))) == pytest.approx(-0.2989321758, abs=1e-9)
    assert float(trig_student(exact_f_trig)(x, t)) == pytest.approx(0.4507225626, abs=1e-9)
    flow = trig_student(lambda x, tau: torch.full_like(x, VELOCITY / SD))
    assert pytest.approx(0.4171345124, abs=1e-9) == VELOCITY / SD
    assert float(flow(x, t)) == pytest.approx(float(gaussian_denoise(S)(x, t)), abs=1e-9)
    # The velocity of the pair: cos tau z - sin tau x0.
    assert SCALE * 0.4 - math.sin(TAU) * SAMPLE_CLEAN == pytest.approx(-0.4934900046, abs=1e-9)


def test_tangent_of_scm_is_cos_times_df_dtau():
    """g = cos(tau) df/dtau with f taken by a difference along the path, in TrigFlow's own clock."""
    student = trig_student(lambda x, tau: torch.sin(x) + tau**2)
    x0, z, h = 0.4, -1.3, 1e-5

    def f(tau):
        level = SD * math.tan(tau)
        return float(student(images(x0 + level * z), column(level)))

    part = TargetPart(rule="trig_tangent", normalize="none", warmup=0.0)
    pts = points(images(x0 + SIGMA * z), column(SIGMA), lambda x, t: images(x0))
    pair = build_target(part)(Nets(student, student), pts)
    expected = math.cos(TAU) * (f(TAU + h) - f(TAU - h)) / (2 * h)
    assert float(pair.target - pair.prediction) == pytest.approx(expected, rel=1e-7)


def test_a_network_with_edm_scalings_is_trigflow_with_the_sign_turned():
    """F_Trig = -F_EDM: one raw function under both names gives one denoiser, one tangent, one gradient."""
    trig = trig_student(lambda x, tau: torch.sin(x) * tau)

    def edm_raw(x, c):  # the same function, told of the level as EDM does
        tau = torch.atan(torch.exp(4 * c) / SD)
        return -torch.sin(x * SD) * tau

    edm = model(Given(edm_raw), parameterization="edm", sigma_data=SD)
    x, t = images(0.3, 2.0, -50.0), column(0.02, 1.0, 60.0)
    assert torch.allclose(trig(x, t), edm(x, t), atol=1e-12)
    part = TargetPart(rule="trig_tangent", normalize="norm", warmup=0.0)
    one, other = (build_target(part)(Nets(m, m), points(x, t, gaussian_denoise())) for m in (trig, edm))
    assert torch.allclose(one.prediction, other.prediction, atol=1e-12)
    assert torch.allclose(one.target, other.target, atol=1e-10)


def test_tangent_stays_finite_and_accurate_at_both_ends_in_float32():
    """The rearranged derivative against float64 at sigma .002 and 80, with log-time conditioning."""
    network = build_network(NETWORKS["mlp"], channels=1, resolution=8, seed=0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    x0, z = torch.randn(2, 1, 8, 8, generator=g), torch.randn(2, 1, 8, 8, generator=g)
    found = []
    for dtype in (torch.float32, D):
        student = ConsistencyModel(network.to(dtype), ProcessConfig(parameterization="edm"), {})
        t = torch.tensor([0.002, 80.0], dtype=dtype)
        x_t = x0.to(dtype) + expand(t, x0.to(dtype)) * z.to(dtype)
        part = TargetPart(rule="trig_tangent", normalize="none", warmup=0.0)
        pair = build_target(part)(Nets(student, student), points(x_t, t, lambda x, t: x0.to(x.dtype)))
        found.append((pair.target - pair.prediction).detach().double())
    assert bool(torch.isfinite(found[0]).all())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 2e-3


def test_normalization_of_the_tangent():
    g = torch.randn(3, 1, 4, 4, dtype=D) * 7
    norm = g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    assert torch.allclose(normalized(g, TargetPart(rule="trig_tangent")), g / (norm + 0.1))
    assert float(normalized(g, TargetPart(rule="trig_tangent", normalize="clip")).abs().max()) == 1.0
    assert normalized(g, TargetPart(rule="trig_tangent", normalize="none")) is g


def test_warm_up_multiplies_the_second_bracket_alone():
    x, t, clean = images(0.7), column(0.9), images(0.2)
    raw, slope = images(0.3), images(-0.8)
    full, none = (trig_tangent(x, t, clean, raw, slope, SD, warm) for warm in (1.0, 0.0))
    half = trig_tangent(x, t, clean, raw, slope, SD, 0.5)
    assert torch.allclose(half, (full + none) / 2)
    cos = TrigFlow(SD).scale(t)
    assert float(none) == pytest.approx(
        float(-(cos**2) * (SD * raw - (cos * SD * (x - clean) / t - (1 - cos**2).sqrt() * clean)))
    )


# --- MeanFlow on N(0, .5^2): t = .8, r = .3, z = .7 of rectified flow's clock ---


def average_velocity(x, t, r, s=0.5):
    """u of Gaussian data: (x - x_r) / (t - r) with x_r the flow's map."""

    def variance(tau):
        return (1 - tau) ** 2 * s**2 + tau**2

    same = (t - r).abs() < 1e-12
    instant = (t - (1 - t) * s**2) / variance(t) * x
    gap = torch.where(same, torch.ones_like(t), t - r)
    return torch.where(same, instant, (x - x * torch.sqrt(variance(r) / variance(t))) / gap)


class AverageVelocity(torch.nn.Module):
    two_time = True

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=D))

    def forward(self, x, c, label=None, r=None):
        return average_velocity(x, c[:, None, None, None], r[:, None, None, None]) + 0 * self.unused


def test_meanflow_identity_on_gaussian_data():
    flow = RectifiedFlow()
    t, r = flow.level(column(0.8)), flow.level(column(0.3))
    x = images(0.7 / 0.2)  # own coordinates are .2 of these
    assert float(average_velocity(images(0.7), column(0.8), column(0.3))) == pytest.approx(0.5995193751, abs=1e-9)
    student = model(AverageVelocity(), parameterization="flow")
    rule = build_target(TargetPart(rule="average_velocity"))
    pair = rule(Nets(student, student), points(x, t, gaussian_denoise(), r=r))
    assert float(pair.prediction) == pytest.approx(0.5995193751, abs=1e-9)
    assert float(pair.target - pair.prediction) == pytest.approx(0.0, abs=1e-12)
    same = rule(Nets(student, student), points(x, t, gaussian_denoise(), r=t))
    assert float(same.target) == pytest.approx(0.8076923077, abs=1e-9)
    assert (float(same.target) - float(pair.target)) / 0.5 == pytest.approx(0.4163458651, abs=1e-9)  # du/dt
    assert float(average_velocity(images(0.7), column(1.0), column(0.0))) == pytest.approx(0.35, abs=1e-12)


def test_meanflow_residual_over_many_times():
    g = torch.Generator().manual_seed(0)
    flow = RectifiedFlow()
    tau, share = torch.rand(200, generator=g, dtype=D) * 0.98 + 0.005, torch.rand(200, generator=g, dtype=D)
    t, r = flow.level(tau), flow.level(tau * share)
    x = torch.randn(200, 1, 1, 1, generator=g, dtype=D) * torch.sqrt(0.25 + t**2).reshape(-1, 1, 1, 1)
    student = model(AverageVelocity(), parameterization="flow")
    rule = build_target(TargetPart(rule="average_velocity"))
    pair = rule(Nets(student, student), points(x, t, gaussian_denoise(), r=r))
    assert float((pair.target - pair.prediction).detach().abs().max()) < 1e-10


def test_meanflow_with_equal_times_is_flow_matching():
    student = model(Linear(0.3, 0.2, 0.1), parameterization="flow")
    x0, z, t = images(0.4, -0.2), images(1.0, 0.5), column(0.5, 3.0)
    pair = build_target(TargetPart(rule="average_velocity"))(
        Nets(student, student), points(x0 + expand(t, x0) * z, t, lambda x, t: x0)
    )
    assert torch.allclose(pair.target, z - x0, atol=1e-12)


def test_meanflow_map_of_one_jump():
    """One jump from t to r with the exact average velocity lands where the flow does; r left out means the clean end."""
    flow = RectifiedFlow()
    student = model(AverageVelocity(), parameterization="flow")
    t, r = flow.level(column(0.8)), flow.level(column(0.3))
    x = images(0.7 / 0.2)
    aim = student(x, t, None, r)
    jump = aim + (r / t).reshape(-1, 1, 1, 1) * (x - aim)
    assert float(jump * flow.scale(r)) == pytest.approx(0.4002404, abs=1e-6)
    noise = images(0.9)
    high = column(1e7)
    assert float(student(noise * 1e7, high)) == pytest.approx(0.5 * 0.9, abs=1e-5)


def test_dropout_is_shared_by_both_sides_of_a_difference():
    config = network_config(kind="mlp", channels=16, num_blocks=1, dropout=0.5)
    network = build_network(config, channels=1, resolution=8, seed=1).double().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    student = ConsistencyModel(network, ProcessConfig(), {}).train()
    x, t = torch.randn(2, 1, 8, 8, dtype=D), column(0.3, 2.0)
    found = {}
    for kind in ("forward", "difference"):
        part = TargetPart(rule="tangent", derivative=kind, difference_step=1e-5)
        found[kind] = build_target(part)(Nets(student, student), points(x, t, gaussian_denoise(), seed=7)).tangent
    assert torch.allclose(found["forward"], found["difference"], rtol=1e-5, atol=1e-6)


def test_scm_is_continuous_consistency_training_in_other_coordinates():
    """Unnormalized and warm, the gradient of sCT is that of Theorem 6 times (dt/dtau) / t, image by image."""
    student = model(Toy(), parameterization="edm")
    g = torch.Generator().manual_seed(5)
    x0, z = torch.randn(1, 1, 2, 2, generator=g, dtype=D), torch.randn(1, 1, 2, 2, generator=g, dtype=D)
    distance = build_distance(DistancePart(kind="squared_norm"), 4)
    for level in (0.05, 0.7, 9.0):
        t = column(level)
        pts = points(x0 + expand(t, x0) * z, t, lambda x, t: x0)
        trig = TargetPart(rule="trig_tangent", normalize="none", warmup=0.0)
        one, other = (
            gradient(student, build_target(part)(Nets(student, student), pts).measure(distance).sum())
            for part in (trig, TargetPart(rule="tangent"))
        )
        assert torch.allclose(one, other * float(TrigFlow(SD).speed(t) / t), rtol=1e-8, atol=1e-12)


def test_meanflow_to_the_clean_end_is_continuous_consistency():
    """With r = 0 the residual of MeanFlow is df/dtau of f = x - tau u."""
    student = model(Linear(0.3, 0.2, 0.0), parameterization="flow")
    x, t = images(0.4, -3.0), column(0.5, 3.0)
    pts = points(x, t, gaussian_denoise(), r=torch.zeros_like(t))
    pair = build_target(TargetPart(rule="average_velocity"))(Nets(student, student), pts)
    slope = build_target(TargetPart(rule="tangent"))(Nets(student, student), pts).tangent
    df_dtau = slope * expand(RectifiedFlow().speed(t), slope)
    assert torch.allclose(pair.target - pair.prediction, df_dtau, atol=1e-10)
