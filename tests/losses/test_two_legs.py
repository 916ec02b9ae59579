"""The two-leg rule against closed forms: Gaussian data, SoFlow's identity, flow matching and MeanFlow as its ends."""

import math
from dataclasses import replace

import pytest
import torch

from cmtool.config.parts import DistancePart, GapPart, LegsPart, RecipeConfig, TargetPart, TimesPart, WeightingPart
from cmtool.config.schema import ProcessConfig
from cmtool.data.load import load_dataset
from cmtool.diffusion.process import RectifiedFlow
from cmtool.diffusion.solvers import build_solver, euler_step
from cmtool.losses.assemble import build_distance, build_objective, build_target
from cmtool.losses.legs import at_end, build_middle, leg_share, middle_level
from cmtool.losses.terms import Nets, Points, Slice
from cmtool.losses.weighting import build_weighting
from cmtool.samplers.solvers import jumps, no_noise
from cmtool.schedules.times import Uniforms, draw_times
from cmtool.training.setup import prepare
from tests.losses.oracles import D, Given, column, config_of, gaussian_denoise, images, loss_of, model, rows

FLOW = RectifiedFlow()
S = 0.5


def slope(tau, s=S):
    """m of Gaussian data: the exact velocity at rectified flow's time tau is m x."""
    return (tau - (1 - tau) * s**2) / ((1 - tau) ** 2 * s**2 + tau**2)


def kept(tau, sigma, a, s=S, short=1e-12):
    """What x is multiplied with from tau to sigma by the exact minimizer of the two-leg rule: ever shorter Euler legs."""
    scale = 1.0
    while tau - sigma > short:
        leg = a * (tau - sigma)
        scale *= 1 - leg * slope(tau, s)
        tau -= leg
    return scale


def map_of(a, s=S):
    """The network of that minimizer, u(x, tau, sigma)."""

    def u(x, tau, sigma):
        gaps = [
            (1 - kept(float(t), float(r), a, s)) / float(t - r) if t > r else slope(float(t), s)
            for t, r in zip(tau.flatten(), sigma.flatten(), strict=True)
        ]
        return column(*gaps).reshape(-1, 1, 1, 1) * x

    network = Given(u)
    network.two_time = True
    return model(network, parameterization="flow", kind="flow")


def points_of(tau, sigma, a, denoise=None, x=0.7, solver=euler_step, shortest=1e-9):
    """Points from tau to sigma of rectified flow, x in its coordinates."""
    t, r = FLOW.level(tau), FLOW.level(sigma)
    middle = middle_level(LegsPart(shortest=shortest), t, r, a)
    at = torch.full_like(t, x).reshape(-1, 1, 1, 1) * (1 + t).reshape(-1, 1, 1, 1)
    return Points(at, at, at, (t, middle, r), None, denoise or gaussian_denoise(S), solver, None)


@pytest.mark.parametrize(
    ("s", "a", "golden"),
    [
        (0.5, 0.5, 0.364790),
        (0.5, 0.1, 0.477021),
        (0.5, 0.02, 0.495511),
        (0.5, 0.002, 0.499553),
        (0.3, 0.5, 0.231956),
        (0.3, 0.1, 0.288594),
        (0.3, 0.005, 0.299447),
    ],
)
def test_the_exact_minimizer_on_gaussian_data(s, a, golden):
    """A law of fixed length is Euler's method with geometric steps; the standard deviation of one jump from tau = 1."""
    assert kept(1.0, 0.0, a, s) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("a", [0.5, 0.1])
def test_the_rule_is_content_with_the_exact_minimizer(a):
    tau, sigma = column(0.95, 0.8, 0.8, 0.3), column(0.0, 0.0, 0.5, 0.3)
    student = map_of(a)
    pair = build_target(TargetPart(rule="two_leg"))(Nets(student, student), points_of(tau, sigma, a))
    assert torch.allclose(pair.prediction, pair.target, atol=1e-10)
    other = build_target(TargetPart(rule="two_leg"))(Nets(student, student), points_of(tau, sigma, a / 2))
    assert float((other.prediction - other.target)[:3].abs().min()) > 1e-4


def test_a_shortcut_model_takes_128_euler_steps_in_one():
    """Its exact minimizer: the jump over 2^-j of the way is that of two jumps over half of it, the shortest Euler's."""

    def jump(tau, gap, base):
        if gap <= base * 1.001:
            return 1 - gap * slope(tau)
        return jump(tau, gap / 2, base) * jump(tau - gap / 2, gap / 2, base)

    assert jump(1.0, 1.0, 1 / 128) == pytest.approx(0.494245, abs=1e-6)

    whole = 80 / 81

    def u(x, tau, sigma):
        scales = [
            jump(float(t), float(t - r), whole / 128) for t, r in zip(tau.flatten(), sigma.flatten(), strict=True)
        ]
        return ((1 - column(*scales)) / (tau - sigma).flatten()).reshape(-1, 1, 1, 1) * x

    network = Given(u)
    network.two_time = True
    student = model(network, parameterization="flow", kind="flow")
    part = TimesPart(kind="dyadic", same=0.5)
    u01 = (torch.arange(64, dtype=D) + 0.5) / 64
    draws = draw_times(part, GapPart(kind="none"), Uniforms(u01, u01.flip(0) * 7 % 1, u01), ProcessConfig(), 2, 0)
    recipe = RecipeConfig(
        method="shortcut",
        family="ct",
        times=part,
        legs=LegsPart(start=0.5),
        target=TargetPart(rule="two_leg", first="own"),
    )
    t, middle, r = build_middle(recipe, ProcessConfig())(draws, 0.0, rows(64))
    assert bool((middle[u01 < 0.5] == r[u01 < 0.5]).all()) and bool((middle > r).any())
    # 80 / 81 of the way in halves: every time is a multiple of the shortest gap.
    assert torch.allclose(FLOW.time(t) / whole * 128, (FLOW.time(t) / whole * 128).round(), atol=1e-9)
    at = (0.7 * (1 + t)).reshape(-1, 1, 1, 1)
    pts = Points(at, at, at, (t, middle, r), None, gaussian_denoise(S), euler_step, None)
    pair = build_target(recipe.target)(Nets(student, student), pts)
    assert torch.allclose(pair.prediction, pair.target, atol=1e-9)


class Curved(torch.nn.Module):
    """A small smooth network of two times in float64."""

    two_time = True

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(8, 6, generator=g, dtype=D) * 0.5)
        self.last = torch.nn.Parameter(torch.randn(4, 8, generator=g, dtype=D) * 0.5)

    def forward(self, x, c_noise, label=None, r=None):
        h = torch.cat([x.flatten(1), c_noise[:, None], r[:, None]], 1)
        return (torch.tanh(h @ self.first.T) @ self.last.T).reshape(x.shape)


def curved(parameterization="flow"):
    return model(Curved(), parameterization=parameterization)


def some_points(a, count=6):
    g = torch.Generator().manual_seed(3)
    x0, z = (torch.randn(count, 1, 2, 2, generator=g, dtype=D) for _ in range(2))
    tau = torch.rand(count, generator=g, dtype=D) * 0.6 + 0.3
    sigma = tau * torch.rand(count, generator=g, dtype=D)
    t, r = FLOW.level(tau), FLOW.level(sigma)
    times = (t, r) if a is None else (t, middle_level(LegsPart(shortest=1e-9), t, r, a), r)
    return Points(x0, z, x0 + t.reshape(-1, 1, 1, 1) * z, times, None, lambda x, t: x0, euler_step, None)


@pytest.mark.parametrize("a", [0.7, 0.1, 0.01])
def test_the_residual_is_that_of_soflow(a):
    """(f(x_t, t, r) - f(x_m, m, r)) / (t - m) = -(u - u*) / a, where f is the point that is reached."""
    student, pts = curved(), some_points(a)
    pair = build_target(TargetPart(rule="two_leg"))(Nets(student, student), pts)
    t, m, r = pts.times

    def reached(tau_level, x_own):
        u = student.network(x_own, FLOW.time(tau_level), None, FLOW.time(r))
        return x_own - (FLOW.time(tau_level) - FLOW.time(r)).reshape(-1, 1, 1, 1) * u

    def own(level):
        return (pts.x0 + level.reshape(-1, 1, 1, 1) * pts.z) / (1 + level).reshape(-1, 1, 1, 1)

    change = (reached(t, own(t)) - reached(m, own(m))) / (FLOW.time(t) - FLOW.time(m)).reshape(-1, 1, 1, 1)
    assert torch.allclose(change, -(pair.prediction - pair.target) / a, atol=1e-9)
    rate = build_target(TargetPart(rule="two_leg", residual="rate"))(Nets(student, student), pts)
    assert torch.allclose(rate.prediction - rate.target, -change, atol=1e-9)
    assert not rate.target.requires_grad


def test_a_whole_first_leg_is_flow_matching():
    student, pts = curved(), some_points(1.0)
    for residual in ("whole", "rate", "step"):
        pair = build_target(TargetPart(rule="two_leg", residual=residual))(Nets(student, student), pts)
        assert torch.allclose(pair.target, pts.z - pts.x0, atol=1e-12)
        assert torch.equal(pair.prediction, student.raw(pts.x_t, pts.t, None, pts.r))


def gradient(student, comparison, distance, weigh, pts):
    loss = weigh(comparison.measure(distance), pts.t, pts.r, student).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


@pytest.mark.parametrize("parameterization", ["flow", "edm"])
def test_meanflow_is_the_limit_of_short_legs(parameterization):
    """Gradients at a and a / 2, continued to a = 0, are those of the derivative; the error of each falls with a."""
    student, distance = curved(parameterization), build_distance(DistancePart(kind="l2"), 4)
    weigh = build_weighting(WeightingPart(kind="adaptive", p=0.75, c=1e-3), ProcessConfig())
    part = TargetPart(rule="two_leg", residual="rate")
    exact = gradient(
        student, build_target(TargetPart(rule="average_velocity"))(Nets(student, student), some_points(None)),
        distance, weigh, some_points(None),
    )  # fmt: skip
    found = [
        gradient(student, build_target(part)(Nets(student, student), some_points(a)), distance, weigh, some_points(a))
        for a in (2e-3, 1e-3)
    ]
    errors = [float((g - exact).norm() / exact.norm()) for g in (*found, 2 * found[1] - found[0])]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] < 1e-2 and errors[2] < 1e-4


def test_alpha_flow_pulls_by_the_length_of_the_leg():
    """a e^2 / (sg e^2 + c): half of the gradient of the whole residual where a is half, reported unchanged."""
    student, distance = curved(), build_distance(DistancePart(kind="l2"), 4)
    weigh = build_weighting(WeightingPart(kind="adaptive", p=1.0, c=1e-3), ProcessConfig())
    pts = some_points(0.5)
    whole, step = (
        build_target(TargetPart(rule="two_leg", residual=r))(Nets(student, student), pts) for r in ("whole", "step")
    )
    assert torch.equal(whole.measure(distance), step.measure(distance))
    half = gradient(student, step, distance, weigh, pts)
    assert torch.allclose(half, 0.5 * gradient(student, whole, distance, weigh, pts), rtol=1e-9)


def test_a_rule_at_its_limit_is_meanflow_to_the_bit():
    student, pts = curved(), some_points(None)
    part = TargetPart(rule="two_leg", limit=True)
    one, other = (build_target(p)(Nets(student, student), pts) for p in (part, TargetPart(rule="average_velocity")))
    assert torch.equal(one.target, other.target) and torch.equal(one.prediction, other.prediction)


def test_a_teachers_leg_of_several_steps():
    """Heun's method along the exact slope: the map of the flow is content, as far as the solver is exact."""
    s = S

    def exact(x, tau, sigma):
        def deviation(at):
            return ((1 - at) ** 2 * s**2 + at**2) ** 0.5

        return (x - x * deviation(sigma) / deviation(tau)) / torch.where(tau > sigma, tau - sigma, torch.ones_like(tau))

    network = Given(exact)
    network.two_time = True
    student = model(network, parameterization="flow")
    tau, sigma = column(0.95, 0.8, 0.5), column(0.1, 0.3, 0.2)
    errors = []
    for substeps in (16, 32):
        pts = points_of(tau, sigma, 0.5, solver=build_solver("heun", substeps))
        pair = build_target(TargetPart(rule="two_leg"))(Nets(student, student), pts)
        errors.append(float((pair.prediction - pair.target).abs().max()))
    assert errors[1] < 5e-4 and 3 < errors[0] / errors[1] < 6
    # Where the gap is nothing, the teacher's slope at the point itself, to the length that rounding allows.
    pts = points_of(tau, tau, 0.5, solver=build_solver("heun", 2))
    target = build_target(TargetPart(rule="two_leg"))(Nets(student, student), pts).target
    assert torch.allclose(target.flatten(), slope(tau) * 0.7, atol=1e-3)


def test_laws_of_the_first_leg():
    soflow = LegsPart(law="exponential", start=1.0, end=0.0003125)
    assert [leg_share(soflow, done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.0003125**0.5, 0.0003125])
    aflow = LegsPart(law="sigmoid")  # 1 - 1 / (1 + exp(-25 (k - mid) / (end - init))), cut off at .005
    for done, golden in ((0.0, 1.0), (0.4, 1 - 1 / (1 + math.exp(2.5))), (0.5, 0.5), (0.7, 0.0066929), (0.72, 0.005)):
        assert leg_share(aflow, done) == pytest.approx(golden, rel=1e-4)
    assert [at_end(aflow, done) for done in (0.0, 0.7, 0.72, 1.0)] == [False, False, True, True]
    xl = LegsPart(law="sigmoid", begins=0.5, ends=10 / 12)
    assert leg_share(xl, 2 / 3) == pytest.approx(0.5) and leg_share(xl, 0.5) == 1.0 and at_end(xl, 1.0)
    assert leg_share(LegsPart(start=0.25), 0.9) == 0.25 and not at_end(LegsPart(), 1.0)


def test_a_leg_has_a_shortest_length():
    t, r = FLOW.level(column(0.8, 0.8, 0.8)), FLOW.level(column(0.3, 0.79995, 0.8))
    middle = FLOW.time(middle_level(LegsPart(shortest=1e-4), t, r, 1e-6))
    assert middle.tolist() == pytest.approx([0.7999, 0.79995, 0.8], abs=1e-12)
    assert middle[1] == FLOW.time(r)[1]


def test_a_second_law_of_times_stays_below_the_first():
    part = TimesPart(kind="two_lognormal", mean=-0.9, std=1.6, mean_r=-4.0, same=0.1)
    g = torch.Generator().manual_seed(0)
    first, second = (torch.rand(20_000, generator=g, dtype=D) for _ in range(2))
    rank = (torch.arange(20_000, dtype=D) + 0.5) / 20_000
    t, r = draw_times(
        part, GapPart(kind="none"), Uniforms(first, second, rank), ProcessConfig(parameterization="flow"), 2, 0
    )
    assert bool((r <= t).all()) and torch.equal(t[:2000], r[:2000])
    assert float(t.log().mean()) == pytest.approx(-0.9, abs=0.05) and float(t.log().std()) == pytest.approx(
        1.6, abs=0.05
    )
    below = part.model_copy(update={"mean": 50.0, "same": 0.0})
    r = draw_times(
        below, GapPart(kind="none"), Uniforms(first, second, rank), ProcessConfig(parameterization="flow"), 2, 0
    )[1]
    assert float(r.log().mean()) == pytest.approx(-4.0, abs=0.05)
    equal = part.model_copy(update={"mean_same": 1.0, "std_same": 0.5, "same": 0.5})
    alone, same = draw_times(
        equal, GapPart(kind="none"), Uniforms(first, second, rank), ProcessConfig(parameterization="flow"), 2, 0
    )
    assert torch.equal(alone[:10_000], same[:10_000]) and torch.equal(alone[10_000:], t[10_000:])
    assert float(alone[:10_000].log().mean()) == pytest.approx(1.0, abs=0.02)
    assert float(alone[:10_000].log().std()) == pytest.approx(0.5, abs=0.02)


def test_a_uniform_law_depends_on_the_row_alone():
    recipe = RecipeConfig(
        method="ctm",
        family="cd",
        legs=LegsPart(law="uniform", end=0.2, shortest=1e-9),
        target=TargetPart(rule="two_leg"),
    )
    middle = build_middle(recipe, ProcessConfig())
    t, r = torch.full((400,), 4.0, dtype=D), torch.full((400,), 0.25, dtype=D)
    whole = middle((t, r), 0.5, Slice(1, 3, 0, 400))[1]
    part = middle((t[:100], r[:100]), 0.9, Slice(1, 3, 200, 400))[1]
    assert torch.equal(whole[200:300], part)
    a = (0.8 - FLOW.time(whole)) / 0.6
    assert float(a.min()) >= 0.2 - 1e-9 and float(a.max()) <= 1.0 and float(a.mean()) == pytest.approx(0.6, abs=0.04)


def test_alpha_flow_reaches_its_limit_on_the_way():
    """A draw carries the middle time until the law is at its end, and then the two times of MeanFlow."""
    config = config_of("aflow")
    trainer = prepare(config, load_dataset(config.data), torch.device("cpu"))
    counts = []
    for step in (0, 20, 39):
        trainer.state.step = step
        x0, label, _ = trainer.batches.take(step, 0, 8)
        draw = trainer.objective.draw(x0, label, trainer.curriculum(), rows(8, step=step))
        counts.append(len(draw.times))
        assert bool(torch.isfinite(trainer.objective.loss(trainer.nets, draw).weighted).all())
    assert counts == [3, 3, 2]


@pytest.mark.parametrize("recipe", ["soflow", "shortcut", "tfm"])
def test_a_loss_does_not_depend_on_the_split_of_a_batch(recipe):
    config = config_of(recipe, "train.precision=fp64")
    trainer = prepare(config, load_dataset(config.data), torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.state.student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g, dtype=D) * 0.1)
    x0 = torch.rand(8, 1, 8, 8, generator=g, dtype=D) * 2 - 1
    objective = build_objective(config)
    whole = loss_of(objective, trainer.nets, x0, None, trainer.curriculum(), rows(8))
    parts = [loss_of(objective, trainer.nets, x0[i : i + 4], None, trainer.curriculum(), rows(8, i)) for i in (0, 4)]
    assert torch.allclose(whole.weighted, torch.cat([part.weighted for part in parts]), rtol=1e-9)


def test_jumps_of_the_minimizer_halve_the_way():
    """Two jumps over halves are the network's own legs one after the other."""
    student = map_of(0.5)
    x = images(0.7) * 81
    with torch.no_grad():
        made = jumps(lambda x, t, r: student(x, t, None, r), x, (80.0, 0.9756, 0.0), no_noise)
    middle = 0.9756 / 1.9756
    assert float(made) == pytest.approx(0.7 * kept(80 / 81, middle, 0.5) * kept(middle, 0.0, 0.5), rel=1e-9)


def deviation(tau, s=S):
    return ((1 - tau) ** 2 * s**2 + tau**2) ** 0.5


def exact_velocity(x, tau, sigma):
    """The average velocity of Gaussian data."""
    gap = torch.where(tau > sigma, tau - sigma, torch.ones_like(tau))
    return torch.where(tau > sigma, x * (1 - deviation(sigma) / deviation(tau)) / gap, slope(tau) * x)


def exact_image(x_in, c, to):
    """F of EDM's scalings for the image that the exact average velocity aims at."""
    t, r = (4 * c).exp(), (4 * to).exp()
    root = (t**2 + 0.25).sqrt()
    x = x_in * root
    tau, sigma = t / (1 + t), r / (1 + r)
    aim = x / (1 + t) - tau * exact_velocity(x / (1 + t), tau, sigma)
    return (aim - 0.25 / root**2 * x) / (0.5 * t / root)


@pytest.mark.parametrize("rule", ["average_velocity", "two_leg"])
def test_a_network_that_gives_the_image_knows_the_same_velocities(rule):
    """Pixel MeanFlow's prediction of x: MeanFlow's identity on Gaussian data through EDM's scalings."""
    network = Given(exact_image)
    network.two_time = True
    student = model(network, parameterization="edm")
    t, r = column(0.05, 0.9, 4.0, 60.0), column(0.004, 0.1, 0.9, 0.3)
    x = images(0.4, -0.5, 3.0, -40.0)
    exact = exact_velocity(x / (1 + t.reshape(-1, 1, 1, 1)), *(FLOW.time(v).reshape(-1, 1, 1, 1) for v in (t, r)))
    # Short legs of the exact slope: what the network says of the rest follows to second order.
    times = (t, r) if rule == "average_velocity" else (t, middle_level(LegsPart(shortest=1e-12), t, r, 1e-5), r)
    pts = Points(x, x, x, times, None, gaussian_denoise(S), euler_step, None)
    pair = build_target(TargetPart(rule=rule))(Nets(student, student), pts)
    assert torch.allclose(pair.prediction, exact, atol=1e-10)
    assert torch.allclose(pair.target, exact, atol=1e-9 if rule == "average_velocity" else 1e-6)


def test_improved_meanflow_differentiates_along_its_own_flow():
    """The sample's noise is in the velocity alone: target - v is that of the exact flow, whatever the sample."""
    network = Given(exact_velocity)
    network.two_time = True
    student = model(network, parameterization="flow")
    t, r = FLOW.level(column(0.9, 0.8, 0.4)), FLOW.level(column(0.1, 0.8, 0.2))
    x0, z = images(0.4, -0.3, 0.1), images(1.0, -2.0, 0.3)
    pts = Points(x0, z, x0 + t.reshape(-1, 1, 1, 1) * z, (t, r), None, lambda x, t: x0, euler_step, None)
    part = TargetPart(rule="average_velocity", tangent="own")
    own = build_target(part)(Nets(student, student), pts)
    flow = build_target(TargetPart(rule="average_velocity"))(
        Nets(student, student), replace(pts, denoise=gaussian_denoise(S))
    )
    x_own = pts.x_t / (1 + t.reshape(-1, 1, 1, 1))
    v = exact_velocity(x_own, *[FLOW.time(t).reshape(-1, 1, 1, 1)] * 2)
    assert torch.allclose(own.target - (z - x0), flow.target - v, atol=1e-10)
    assert torch.allclose(flow.target, flow.prediction, atol=1e-10)
    sample = build_target(TargetPart(rule="average_velocity"))(Nets(student, student), pts)
    assert float((sample.target - own.target)[[0, 2]].abs().min()) > 1e-3
