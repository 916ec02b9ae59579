"""Inductive moment matching: closed forms of its kernel loss, its times and weights, and groups that stay whole."""

import math
from dataclasses import replace

import pytest
import torch

from cmtool.config.parts import DistancePart, GapPart, TimesPart, WeightingPart
from cmtool.config.schema import ProcessConfig
from cmtool.errors import ConfigError
from cmtool.losses.assemble import build_distance, build_objective, build_target
from cmtool.losses.moments import Moments
from cmtool.losses.terms import Nets, Points
from cmtool.losses.weighting import build_weighting
from cmtool.machine.world import World
from cmtool.schedules.times import Uniforms, draw_times
from cmtool.training.setup import check_rows
from tests.losses.oracles import D, column, config_of, gaussian_denoise, images, loss_of, model, rows
from tests.losses.test_objective import awake, batch, nets_of, now

PROCESS = ProcessConfig()
NORM = build_distance(DistancePart(kind="pseudo_huber", c=0.0), 1)


def kernel(a, b, width=1.0):
    return math.exp(-abs(a - b) / width)


def test_the_kernel_loss_of_tiny_sets():
    """The V-statistic of two sets of two numbers, written out; the second group has a kernel of its own width."""
    ours, theirs = images(0.3, -0.5, 1.0, 4.0), images(0.1, 0.2, 1.0, 2.0)
    found = Moments(ours, theirs, 2, column(1.0, 1.0, 3.0, 3.0)).measure(NORM)
    for first, (x, y), width in ((0, ((0.3, -0.5), (0.1, 0.2)), 1.0), (2, ((1.0, 4.0), (1.0, 2.0)), 3.0)):
        own = sum(kernel(a, b, width) for a in x for b in x) + sum(kernel(a, b, width) for a in y for b in y)
        expected = own / 4 - 2 * sum(kernel(a, b, width) for a in x for b in y) / 4
        assert found[first : first + 2].tolist() == pytest.approx([expected, expected], abs=1e-14)


def test_sets_of_one_image_are_pairs():
    ours, theirs, width = images(0.3, -0.5), images(0.1, 0.2), column(2.0, 1e-3)
    found = Moments(ours, theirs, 1, width).measure(NORM)
    assert torch.allclose(found, -2 * torch.expm1(-NORM.between(ours, theirs) / width), atol=0, rtol=1e-15)


def test_equal_groups_are_at_distance_zero_in_any_order():
    ours = images(0.3, -0.5, 1.0, 0.2)
    for theirs in (ours, ours[[2, 0, 3, 1]]):
        assert Moments(ours, theirs, 4, torch.ones(4, dtype=D)).measure(NORM).tolist() == pytest.approx(
            [0] * 4, abs=1e-15
        )
    assert float(Moments(ours, ours[[2, 0, 3, 1]], 2, torch.ones(4, dtype=D)).measure(NORM).min()) > 0.01


def test_only_what_moves_the_law_pulls():
    """The gradient is that of the closed form, and the copies of one law have none."""
    ours = images(0.3, -0.5).requires_grad_()
    (pull,) = torch.autograd.grad(Moments(ours, images(0.1, 0.2), 2, column(1.0, 1.0)).measure(NORM).mean(), ours)
    x, y = (0.3, -0.5), (0.1, 0.2)
    for i in range(2):
        towards = sum(math.copysign(kernel(x[i], b), x[i] - b) for b in y)
        apart = math.copysign(kernel(x[i], x[1 - i]), x[i] - x[1 - i])
        assert float(pull[i]) == pytest.approx((towards - apart) / 2, abs=1e-14)
    (still,) = torch.autograd.grad(Moments(ours, images(-0.5, 0.3), 2, column(1.0, 1.0)).measure(NORM).sum(), ours)
    assert float(still.abs().max()) < 1e-15


def test_one_image_to_the_clean_end_is_the_pair_loss():
    """With groups of one and s at zero a jump is f itself, so the loss is that of a consistency pair under the kernel."""
    student = awake(config_of("imm")).double()
    x0, t = batch().double(), torch.linspace(0.2, 9.0, 8, dtype=D)
    r, zero = 0.9 * t, torch.zeros(8, dtype=D)
    x_t = x0 + t[:, None, None, None] * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=D)
    points = Points(x0, x0, x_t, (t, r), None, lambda x, t: x0, build_objective(config_of("imm")).solver, None)
    pair = build_target(config_of("ict").recipe.target)(nets_of(student), points)
    found = build_target(config_of("imm").recipe.target)(nets_of(student), replace(points, times=(t, r, zero)))
    assert torch.allclose(found.prediction, pair.prediction, atol=1e-12)
    assert torch.allclose(found.target, pair.target, atol=1e-12)
    c_out = student.parameterization.coefficients(t).c_out.abs()
    expected = -2 * torch.expm1(-NORM.between(pair.prediction, pair.target) / (64 * c_out))
    assert torch.allclose(found.measure(NORM), expected, rtol=1e-9)


def test_the_exact_flow_is_a_fixed_point():
    """On Gaussian data the exact jumps from x_t and, along its flow, from x_r land on one point."""

    class Exact(torch.nn.Module):
        two_time = True

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros((), dtype=D))

        def forward(self, x, c_noise, label=None, r=None):
            t, s = ((4 * c).exp()[:, None, None, None] for c in (c_noise, r))
            x = x * (t**2 + 0.25).sqrt()  # c_in
            end = x * ((0.25 + s**2) / (0.25 + t**2)).sqrt()
            aim = (end - s / t * x) / (1 - s / t)
            skip, out = 0.25 / (t**2 + 0.25), t * 0.5 / (t**2 + 0.25).sqrt()
            return (aim - skip * x) / out + 0 * self.unused

    student = model(Exact(), parameterization="edm")
    t, r, s = column(0.5, 8.0), column(0.4, 2.0), column(0.1, 1.0)
    x_t = images(0.7, -3.0)

    def along_the_flow(denoise, x, t, r):
        return x * ((0.25 + r**2) / (0.25 + t**2)).sqrt()[:, None, None, None]

    points = Points(x_t, x_t, x_t, (t, r, s), None, gaussian_denoise(), along_the_flow, None, group=2)
    found = build_target(config_of("imm").recipe.target)(Nets(student, student), points)
    assert torch.allclose(found.prediction, along_the_flow(None, x_t, t, s), atol=1e-12)
    assert torch.allclose(found.prediction, found.target, atol=1e-12)


def test_times_as_published():
    """t, then s below it, uniform on the flow's clock up to .994; r is a constant step of the noise's share down."""
    g = torch.Generator().manual_seed(0)
    u, w = torch.rand(200_000, generator=g, dtype=D), torch.rand(200_000, generator=g, dtype=D)
    part, gap = TimesPart(kind="flow_pair", group=4), GapPart(kind="decrement", k=12.0)
    t, r, s = draw_times(part, gap, Uniforms(u, w, u), PROCESS, 0, 0)
    assert bool((s <= r).all() and (r <= t).all() and (s >= 0.002 * (1 - 1e-9)).all() and (t <= 80).all())
    tau, to = t / (t + 0.5), s / (s + 0.5)
    assert float(tau.max()) == pytest.approx(160 / 161, abs=1e-4)
    assert float(tau.mean()) == pytest.approx((0.002 / 0.502 + 160 / 161) / 2, abs=2e-3)
    assert float(to.mean()) == pytest.approx(0.25, abs=3e-3)
    stepped = r > s
    assert torch.allclose((t - r)[stepped], torch.full_like(t[stepped], 80 / 4096), rtol=1e-9)
    assert bool((t - s <= 80 / 4096 + 1e-12)[~stepped].all())


@pytest.mark.parametrize(("a", "b"), [(1.0, 5.0), (2.0, 4.0)])
def test_the_weight_as_published(a, b):
    """By finite differences of the log-SNR, at times of the flow whose noise is as wide as the data."""
    tau = torch.linspace(0.01, 0.99, 50, dtype=D)

    def log_snr(tau):
        return 2 * ((1 - tau) / tau).log()

    speed = (log_snr(tau + 1e-6) - log_snr(tau - 1e-6)) / 2e-6
    alpha, sigma = 1 - tau, tau
    expected = 0.5 * torch.sigmoid(b - log_snr(tau)) * -speed * alpha**a / (alpha**2 + sigma**2)
    weigh = build_weighting(WeightingPart(kind="sigmoid", a=a, b=b), PROCESS)
    t = 0.5 * sigma / alpha
    assert torch.allclose(weigh(torch.ones_like(t), t, t, None), expected, rtol=1e-7)


def test_a_group_shares_its_times_and_neighbors_do_not():
    config = config_of("imm")
    draw = build_objective(config).draw(batch(), None, now(config), rows(8))
    assert draw.group == 4
    for times in draw.times:
        assert len(set(times[:4].tolist())) == len(set(times[4:].tolist())) == 1
        assert float(times[0]) != float(times[4])
    assert not torch.equal(draw.z[0], draw.z[1])


def test_a_pass_that_parts_a_group_is_an_error():
    config = config_of("imm")
    objective = build_objective(config)
    for count, start in ((2, 0), (4, 2)):
        with pytest.raises(ConfigError, match="splits groups of 4"):
            objective.draw(batch(count), None, now(config), rows(8, start))
    whole = loss_of(objective, nets_of(awake(config)), batch(), None, now(config), rows(8, step=3))
    assert whole.distance[:4].unique().numel() == whole.distance[4:].unique().numel() == 1


def test_processes_that_part_a_group_are_refused():
    config = config_of("imm", **{"train.batch_size": 12})
    with pytest.raises(ConfigError, match="stay in one process") as refused:
        check_rows(config, World(0, 2))
    assert "--batch-size 16" in str(refused.value.hint)
    check_rows(config, World(0, 3))
    check_rows(config_of("imm", "train.micro_batch=4", **{"train.batch_size": 16}), World(0, 2))
