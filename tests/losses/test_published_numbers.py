"""Numbers that papers and released code imply, taken from the parts of training: noise levels, gradients, limits."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from cmtool.config.networks import network_config
from cmtool.config.parts import CouplingPart, DistancePart, GapPart, TargetPart, TimesPart, WeightingPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.solvers import euler_step
from cmtool.losses.assemble import build_distance, build_target
from cmtool.losses.coupling import build_coupling
from cmtool.losses.diagnose import diagnose
from cmtool.losses.direction import Reference
from cmtool.losses.tangent import log_derivative
from cmtool.losses.terms import Nets, Points
from cmtool.losses.weighting import build_weighting
from cmtool.models import ConsistencyModel
from cmtool.networks import build_network
from cmtool.networks.truncated import TruncatedNetwork
from cmtool.schedules.times import Uniforms, draw_times, grid_tensor, lognormal_masses
from cmtool.theory.laws import parse_law
from tests.losses.oracles import D, column, gaussian_denoise

PROCESS = ProcessConfig()


def spread(n):
    return (torch.arange(n, dtype=D) + 0.5) / n


# --- Noise levels: iCT's loss scale, ECT's clean targets, MeanFlow's pairs ---


@pytest.mark.parametrize(
    ("points", "median", "above_ten", "mean", "ends", "step_at_one"),
    [
        (11, 0.318, 0.033, 8.42, (0.029, 67.9), 1.605),
        (21, 0.318, 0.033, 17.5, (0.051, 234), 0.641),
        (161, 0.318, 0.040, 141, (0.372, 3017), 0.065),
        (1281, 0.334, 0.042, 1129, (2.94, 25585), 0.0080),
    ],
)
def test_scale_of_the_loss_of_improved_training(points, median, above_ten, mean, ends, step_at_one):
    """Where the cleaner level of a pair lies, and how the weight 1 / (t - r) grows over the curriculum."""
    grid, masses = grid_tensor(points, PROCESS), lognormal_masses(points, PROCESS, -1.1, 2.0)
    weights = build_weighting(WeightingPart(kind="inverse_gap"), PROCESS)(
        torch.ones(points - 1, dtype=D), grid[1:], grid[:-1], None
    )
    t, r = draw_times(TimesPart(kind="grid_lognormal"), GapPart(), spread(40_001), PROCESS, points, 0)
    assert float(r.median()) == pytest.approx(median, abs=6e-4)
    assert float((r > 10).double().mean()) == pytest.approx(above_ten, abs=6e-4)
    assert float((1 / (t - r)).mean()) == pytest.approx(mean, rel=4e-3)
    assert float((masses * weights).sum()) == pytest.approx(mean, rel=4e-3)
    assert [float(weights.min()), float(weights.max())] == pytest.approx(ends, rel=1e-2)
    near = int((grid[:-1] - 1).abs().argmin())
    assert float(grid[near + 1] / grid[near] - 1) == pytest.approx(step_at_one, rel=1e-2)


@pytest.mark.parametrize(
    ("q", "stage", "share", "level"),
    [(2.0, 0, 0.8113, 1.9459), (2.0, 1, 0.5848, 0.5108), (4.0, 0, 0.5848, 0.5108), (2.0, 2, 0.0, 0.0)],
)
def test_share_of_clean_targets_in_easy_tuning(q, stage, share, level):
    """Up to a level r = 0 and the target is the clean image: the first stage is mostly denoising."""
    gap = GapPart(kind="ratio", q=q)
    t, r = draw_times(TimesPart(kind="lognormal", mean=-1.1, std=2.0), gap, spread(40_000), PROCESS, 0, stage)
    assert float((r == 0).double().mean()) == pytest.approx(share, abs=1e-4)
    if share:
        assert float(t[r == 0].max()) == pytest.approx(level, rel=1e-3)
        assert float(t[r > 0].min()) == pytest.approx(level, rel=1e-3)


def test_pairs_of_meanflow():
    """Means and tails of the two rectified-flow times: the paper's law on CIFAR-10."""
    n, g = 400_000, torch.Generator().manual_seed(1)
    u, w = torch.rand(n, generator=g, dtype=D), torch.rand(n, generator=g, dtype=D)
    part = TimesPart(kind="two_lognormal", mean=-2.0, std=2.0, same=0.25)
    t, r = draw_times(part, GapPart(kind="none"), Uniforms(u, w, spread(n)), PROCESS, 0, 0)
    tau_t, tau_r = t / (1 + t), r / (1 + r)
    assert float(tau_r.mean()) == pytest.approx(0.160, abs=1.5e-3)
    assert float((tau_t > 0.9).double().mean()) == pytest.approx(0.036, abs=1e-3)
    assert float((tau_r < 0.05).double().mean()) == pytest.approx(0.426, abs=2e-3)


# --- Why the target of consistency training is the student itself (Song & Dhariwal 2024, on one point at 1) ---


class Bent(torch.nn.Module):
    """f(x, t) = (low / t) x + (1 - low / t) theta: consistent at the boundary for every theta."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=D))

    def forward(self, x, t, label=None):
        share = (PROCESS.sigma_min / t).reshape(-1, 1, 1, 1)
        return share * x + (1 - share) * self.theta


@pytest.mark.parametrize(
    ("lag", "golden"),
    [(0.0, (-7.0015, -6.4760, -5.4346, -5.3295)), (0.01, (-6.9711, -5.5230, 4.3203, 92.32))],
)
def test_a_lagging_target_breaks_the_gradient_on_fine_grids(lag, golden):
    """The gradient per gap settles with the student as target; with a lag of .01 it grows and turns its sign."""
    distance = build_distance(DistancePart(kind="squared_norm"), 1)
    weigh = build_weighting(WeightingPart(kind="inverse_gap"), PROCESS)
    found = []
    for count in (10, 100, 1000, 10_000):
        grid = grid_tensor(count, PROCESS)
        t, r = grid[1:], grid[:-1]
        x0, z = torch.ones(count - 1, 1, 1, 1, dtype=D), torch.full((count - 1, 1, 1, 1), 0.7, dtype=D)
        points = Points(x0, z, x0 + t.reshape(-1, 1, 1, 1) * z, (t, r), None, lambda x, t, x0=x0: x0, euler_step, None)
        student = Bent(0.3)
        pair = build_target(TargetPart())(Nets(student, Bent(0.3 - lag) if lag else student), points)
        loss = weigh(pair.measure(distance), t, r, student).mean()
        found.append(float(torch.autograd.grad(loss, student.theta)[0]))
    assert found == pytest.approx(golden, rel=1e-4)


# --- Theorem 1 of generator-augmented flows: the limit itself, from the continuous-time rule ---


class Lines(torch.nn.Module):
    """f(x, t) = slope(t) x."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x, t, label=None):
        return self.slope(t).reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize(
    ("slope", "power", "golden"),
    [
        (lambda t: 0.5 / (0.25 + t**2).sqrt(), 2, 0.780556),
        (lambda t: 0.5 / (0.25 + t**2).sqrt(), 1, 0.528925),
        (lambda t: (-0.3 * t).exp(), 2, 0.996848),
        (lambda t: (-0.3 * t).exp(), 1, 0.382386),
    ],
)
def test_limit_of_training_minus_distillation(slope, power, golden):
    """T^(a-1) times the integral over [0, 2] of E|df along the sample|^a - E|df along the flow|^a, s = .5."""
    t = (torch.arange(4000, dtype=D) + 0.5) / 2000
    one, nothing = torch.ones(4000, 1, 1, 1, dtype=D), torch.zeros(4000, 1, 1, 1, dtype=D)
    net = Lines(slope)
    at = t.reshape(-1, 1, 1, 1)

    def variance(toward):
        """Second moment of df/dt, which is linear in image and noise: one of each alone."""
        total = torch.zeros_like(t)
        for scale, x0, z in ((0.5, one, nothing), (1.0, nothing, one)):
            denoise = gaussian_denoise(0.5) if toward == "flow" else lambda x, t, x0=x0: x0
            points = Points(x0, z, x0 + at * z, (t, t), None, denoise, None, None)
            total += scale**2 * build_target(TargetPart(rule="tangent"))(Nets(net, net), points).tangent.flatten() ** 2
        return total

    moments = [v if power == 2 else (2 / math.pi * v).sqrt() for v in map(variance, ("sample", "flow"))]
    assert 2 ** (power - 1) * 2 * float((moments[0] - moments[1]).mean()) == pytest.approx(golden, abs=2e-6)


# --- Transport cost: Lemma 1 and the two-mode example of the released notebook, as `--diagnose` measures them ---


def measured(net, data, levels):
    few = Reference(data[:2])  # R over reference images is not asked for here
    return diagnose(Nets(net, net, net), build_coupling(CouplingPart()), data, levels=levels, reference=few)


def test_slope_of_the_transport_cost_on_gaussian_data():
    """c'(t) = -2 s^3 / r^3 with r^2 = s^2 + t^2: from s^2 + 1 at no noise down to (1 - s)^2, optimal transport's."""
    s = 0.5
    data = s * torch.tensor(np.random.default_rng(0).permutation(ndtri(spread(100_000).numpy()))).reshape(-1, 1, 1, 1)
    net = Lines(lambda t: s / (s**2 + t**2).sqrt())
    for t in (0.2, 1.0, 3.0):
        # One noise for both levels, or its scatter would drown the difference.
        z = torch.tensor(np.random.default_rng(1).permutation(ndtri(spread(100_000).numpy()))).reshape(-1, 1, 1, 1)
        cost = [
            float(((net(data + level * z, torch.tensor([level])) - z) ** 2).mean()) for level in (t - 0.01, t + 0.01)
        ]
        assert (cost[1] - cost[0]) / 0.02 == pytest.approx(-2 * s**3 / (s**2 + t**2) ** 1.5, rel=0.02)
    ends = [entry.transport for entry in measured(net, data, (1e-3, 1e3))]
    assert ends == pytest.approx((s**2 + 1, (1 - s) ** 2), rel=0.01)


class TwoModes(torch.nn.Module):
    """The flow's end for two narrow Gaussians at (0, +-.5), std .01: each coordinate's quantiles are carried along."""

    LAWS = (parse_law("gauss:0;.01"), parse_law("gmm:.5,.5;-.5,.5;.01"))

    def forward(self, x, t, label=None):
        made = []
        for axis, law in enumerate(self.LAWS):
            made.append(torch.tensor(law.flow(x[:, axis, 0, 0].numpy(), (1.0, float(t[0])), (1.0, 1e-3))))
        return torch.stack(made, 1)[:, :, None, None]


def test_transport_cost_of_two_modes():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(20_000, 2, 1, 1, generator=g, dtype=D) * 0.01
    data[:, 1] += torch.where(torch.rand(20_000, 1, 1, generator=g) < 0.5, -0.5, 0.5)
    levels = (0.02, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
    golden = (2.232, 2.228, 2.189, 2.038, 1.749, 1.532, 1.462, 1.442)  # sums over both coordinates; 2.268 uncoupled
    # What the flow saves: both sets of numbers are from one draw of the noise, whose scatter falls out.
    saved = [2 * (entry.coupled - entry.transport) for entry in measured(TwoModes(), data, levels)]
    assert saved == pytest.approx([2.268 - cost for cost in golden], abs=0.02)
    # By hand at t = 1, where the end is the sign of the second coordinate: 2 (.01 / sqrt 1.0001 + phi(.5 / 1.0001)).
    assert saved[5] == pytest.approx(2 * (0.01 + math.exp(-0.125) / math.sqrt(2 * math.pi)), abs=0.02)


# --- Derivatives of networks with the parts that only some recipes use ---


@pytest.mark.parametrize("kind", ["adm", "song", "edm2", "mlp", "dit"])
@pytest.mark.parametrize("form", ["two times", "labels", "truncated"])
def test_forward_mode_with_every_part_of_a_network(kind, form):
    width = {"channels": 16, "num_blocks": 2} if kind == "mlp" else {"channels": 16, "head_channels": 8}
    config = network_config(kind=kind, attention=(4,), attention_kernel="math", two_time=form == "two times", **width)
    shape = {"channels": 1, "resolution": 8, "num_classes": 3 if form == "labels" else None}
    network = build_network(config, **shape, seed=1)
    if form == "truncated":
        network = TruncatedNetwork(build_network(config, **shape, seed=2), network, 0.0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    student = ConsistencyModel(network.double(), ProcessConfig(parameterization="edm"), {"data": {}})
    x, t = torch.randn(3, 1, 8, 8, generator=g, dtype=D), column(0.05, 1.5, 20.0)
    label = torch.tensor([0, 2, -1]) if form == "labels" else None
    to = 0.3 * t if form == "two times" else None

    def f(x, t):
        return student(x, t, label, to)

    exact = log_derivative(f, x, t, 0.5 * x, TargetPart(rule="tangent"))[1]
    near = TargetPart(rule="tangent", derivative="difference", difference_step=1e-5)
    assert torch.allclose(exact, log_derivative(f, x, t, 0.5 * x, near)[1], rtol=1e-6, atol=1e-7)
    assert float(exact.detach().abs().max()) > 0.01
