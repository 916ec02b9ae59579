"""The composition: which randomness is shared, what splits of a batch change, what couplings exchange."""

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from cmtool.config.parts import CouplingPart, TargetPart
from cmtool.data.load import load_dataset
from cmtool.errors import ConfigError
from cmtool.losses.assemble import build_objective, build_target
from cmtool.losses.coupling import Pairs, assignment, build_coupling, predict
from cmtool.losses.terms import Draw, Nets, Points
from cmtool.schedules.curriculum import curriculum_at
from cmtool.schedules.times import draw_times
from cmtool.training.setup import fresh_student
from tests.losses.oracles import D, column, config_of, gaussian_denoise, images, loss_of, rows


def awake(config, seed=0):
    """A student whose answer is not trivial: fresh networks end in zeros."""
    student = fresh_student(config, load_dataset(config.data)).train()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    return student


def now(config, step=3):
    recipe = config.recipe
    return curriculum_at(recipe.curriculum, recipe.target, recipe.gap, step, config.train.steps)


def batch(count=8, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def nets_of(student):
    return Nets(student, student, student)


@pytest.mark.parametrize("recipe", ["ct", "ict", "ict-gc", "meanflow", "imm", "edm", "rf"])
def test_loss_of_a_batch_does_not_depend_on_its_split(recipe):
    config = config_of(recipe)
    student, objective, x0 = awake(config), build_objective(config), batch()
    whole = loss_of(objective, nets_of(student), x0, None, now(config), rows(8, step=3))
    parts = [loss_of(objective, nets_of(student), x0[i : i + 4], None, now(config), rows(8, i, 3)) for i in (0, 4)]
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    assert torch.allclose(whole.weighted, torch.cat([part.weighted for part in parts]), rtol=2e-4, atol=1e-5)


def test_gc_without_generated_images_is_ict_to_the_bit():
    plain, mixed = config_of("ict"), config_of("ict-gc", "recipe.coupling.mix=0.0")
    student = awake(plain)
    losses = [
        loss_of(build_objective(c), nets_of(student), batch(), None, now(c), rows(8, step=3)).weighted
        for c in (plain, mixed)
    ]
    assert torch.equal(*losses)


def test_gc_replaces_the_share_it_says_and_keeps_the_noise():
    config = config_of("ict-gc", "recipe.coupling.mix=0.3")
    student, x0 = awake(config).eval(), batch(64).repeat(20, 1, 1, 1)
    z, t, r = torch.randn_like(x0), torch.full((len(x0),), 1.0), torch.full((len(x0),), 0.7)
    draw = Draw(x0, z, (t, r), None, 0.3, rows(len(x0)))
    coupled = build_coupling(config.recipe.coupling)(nets_of(student), draw)
    made = (coupled.x0 != x0).flatten(1).any(1)
    assert float(made.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert coupled.z is z
    answer = student(x0 + 0.7 * z, r).detach()  # from the cleaner point with the same noise
    assert torch.allclose(coupled.x0[made], answer[made], atol=1e-6)
    assert not coupled.x0.requires_grad


@pytest.mark.parametrize("predictor", ["online", "ema", "frozen"])
def test_gc_asks_the_predictor_that_is_named(predictor):
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, x, t, label=None):
            return self.value.expand_as(x)

    nets = Nets(Constant(1.0), Constant(9.0), Constant(2.0), None, Constant(3.0))
    x0 = batch(4)
    draw = Draw(x0, x0, (torch.ones(4), torch.ones(4)), None, 1.0, rows(4))
    coupled = build_coupling(CouplingPart(kind="generator", predictor=predictor))(nets, draw)
    assert set(coupled.x0.flatten().tolist()) == {{"online": 1.0, "ema": 2.0, "frozen": 3.0}[predictor]}


def test_gc_without_its_predictor_is_refused():
    draw = Draw(batch(2), batch(2), (torch.ones(2), torch.ones(2)), None, 1.0, rows(2))
    with pytest.raises(ConfigError, match="frozen"):
        build_coupling(CouplingPart(kind="generator", predictor="frozen", model="x"))(Nets(None, None), draw)


def test_prediction_for_a_coupling_is_without_dropout_and_leaves_the_mode():
    net = torch.nn.Sequential(torch.nn.Dropout(0.5)).train()
    net.forward = lambda x, t, label: net[0](x)
    x0 = batch(4)
    draw = Draw(x0, 0 * x0, (torch.ones(4), torch.ones(4)), None, 1.0, rows(4))
    assert torch.equal(predict(net, draw), x0)
    assert net.training
    assert net[0].training


def test_ot_is_the_best_permutation():
    g = torch.Generator().manual_seed(0)
    x0, z = torch.randn(12, 1, 2, 2, generator=g), torch.randn(12, 1, 2, 2, generator=g)
    chosen = assignment(x0, z)
    assert sorted(chosen.tolist()) == list(range(12))
    cost = torch.cdist(x0.flatten(1), z.flatten(1)) ** 2
    best = linear_sum_assignment(cost.numpy())
    assert float(cost[torch.arange(12), chosen].sum()) == pytest.approx(float(cost[best[0], best[1]].sum()), rel=1e-6)
    draw = Draw(x0, z, (torch.ones(12), torch.ones(12)), None, 0.0, rows(12))
    coupled = build_coupling(CouplingPart(kind="ot"))(Nets(None, None), draw)
    assert torch.equal(coupled.z, z[chosen])
    assert float(((coupled.z - x0) ** 2).sum()) < float(((z - x0) ** 2).sum())


def test_ot_of_one_image_is_refused():
    draw = Draw(batch(1), batch(1), (torch.ones(1), torch.ones(1)), None, 0.0, rows(1))
    with pytest.raises(ConfigError, match="at least 2"):
        build_coupling(CouplingPart(kind="ot"))(Nets(None, None), draw)


def test_stored_pairs_lie_on_the_line_to_their_noise():
    pairs = Pairs(batch(5, 1)[:, None] * 80, batch(5, 2), torch.arange(5), torch.tensor([80.0]))
    draw = Draw(batch(4), batch(4), (torch.full((4,), 80.0), torch.ones(4)), None, 0.0, rows(4))
    coupled = build_coupling(CouplingPart(kind="teacher"), pairs)(Nets(None, None), draw)
    index = coupled.label
    assert torch.allclose(coupled.x0 + 80 * coupled.z, pairs.noisy[index, 0], atol=1e-4)
    assert torch.equal(coupled.x0, pairs.clean[index])
    with pytest.raises(ConfigError, match="pairs"):
        build_coupling(CouplingPart(kind="teacher"))


def test_student_and_target_see_one_dropout_mask():
    """The same point on both sides must give the same answer, or the loss carries mask noise over the gap."""
    config = config_of("ict", "network.dropout=0.5")
    student, x = awake(config), batch(4)
    t = torch.full((4,), 0.9)
    points = Points(x, x, x, (t, t), None, lambda x, t: x, lambda d, x, t, r: x, 11)
    pair = build_target(TargetPart())(nets_of(student), points)
    assert torch.equal(pair.prediction, pair.target)
    other = build_target(TargetPart())(nets_of(student), replace(points, dropout_seed=12))
    assert not torch.equal(pair.prediction, other.prediction)


def test_noise_of_both_points_is_the_same():
    """On exact pairs the two points differ by (t - r) z and nothing else."""
    config = config_of("ict")
    objective = build_objective(config)
    seen = {}

    def rule(nets, points):
        seen["gap"] = points.x_t - points.solver(points.denoise, points.x_t, points.t, points.r)
        seen["expected"] = (points.t - points.r).reshape(-1, 1, 1, 1) * points.z
        return build_target(TargetPart())(nets, points)

    loss_of(replace(objective, target=rule), nets_of(awake(config)), batch(), None, now(config), rows(8))
    assert torch.allclose(seen["gap"], seen["expected"], atol=2e-5)


@pytest.mark.parametrize("recipe", ["ict", "ct", "cd-euler", "sct", "ct-inf", "meanflow", "imm"])
def test_no_gradient_reaches_the_student_through_the_target(recipe):
    """Scaling the gradient of the target's side would change the update: it must not be there at all."""
    config = config_of(recipe) if recipe not in ("cd-euler",) else config_of("cd-euler", teacher="unused")
    student = awake(config)
    target = config.recipe.target
    x, t = batch(4), torch.tensor([0.1, 0.5, 2.0, 9.0])
    times = (t, t * 0.9, t * 0.8) if target.rule == "moments" else (t, t * 0.8)
    points = Points(x, x, x, times, None, lambda x, t: 0.1 * x, lambda d, x, t, r: 0.9 * x, None)
    rule = build_target(target)
    comparison = rule(nets_of(student), points)
    held = comparison.tangent if target.rule == "tangent" else comparison.target
    assert not held.requires_grad
    moving = comparison.value if target.rule == "tangent" else comparison.prediction
    assert moving.requires_grad


def test_stop_gradient_detector():
    """With both sides trained the loss of N(0, s^2) pulls the slope to shrink (K13); with it held, to the Euler value."""
    t, r, s = 2.0, 1.0, 0.5
    slope = torch.tensor(0.5, dtype=D, requires_grad=True)
    g = torch.Generator().manual_seed(0)
    x0, z = torch.randn(4000, generator=g, dtype=D) * s, torch.randn(4000, generator=g, dtype=D)

    class Line(torch.nn.Module):
        def forward(self, x, t, label=None):
            return slope * x

    x0, z = x0.reshape(-1, 1, 1, 1), z.reshape(-1, 1, 1, 1)
    ones = torch.ones(4000, dtype=D)
    points = Points(x0, z, x0 + t * z, (t * ones, r * ones), None, lambda x, t: x0, None, None)
    from cmtool.diffusion.solvers import euler_step

    pair = build_target(TargetPart())(nets_of(Line()), replace(points, solver=euler_step))
    (held,) = torch.autograd.grad(((pair.prediction - pair.target) ** 2).mean(), slope)
    v, c = s**2 + t**2, s**2 + t * r
    assert float(held) == pytest.approx(2 * 0.5 * (v - c), rel=0.1)
    both = 2 * 0.5 * (v - 2 * c + s**2 + r**2)
    assert abs(float(held) - both) > 0.5


def test_leap_is_the_clean_image_that_one_euler_step_needs():
    from cmtool.diffusion.solvers import build_solver, euler_step

    x, t, r = images(0.7, -3.0), column(1.0, 10.0), column(0.4, 2.0)
    teacher = gaussian_denoise()
    two = build_solver("euler", 2)
    points = Points(x, x, x, (t, r), None, teacher, two, None)

    class Student(torch.nn.Module):
        def forward(self, x, t, label=None):
            return 0 * x

    clean = build_target(TargetPart(rule="leap", update="stage"))(nets_of(Student()), points).target
    assert torch.allclose(euler_step(lambda x, t: clean, x, t, r), two(teacher, x, t, r), atol=1e-12)


def test_distances_reported_are_without_weights():
    config = config_of("ict")
    loss = loss_of(build_objective(config), nets_of(awake(config)), batch(), None, now(config), rows(8))
    assert bool((loss.weighted > loss.distance).any())
    assert not loss.distance.requires_grad


def test_a_model_truncated_at_the_lowest_level_is_tuned_as_ect_does():
    """With all levels trained and no share of the batch held at the lowest one, stage two is easy tuning."""
    same = (
        'recipe.times={kind="lognormal",mean=-1.1,std=2.0}',
        'recipe.gap={kind="ratio",map="sigmoid",q=4.0,stages=4,first=0,cap=1.0}',
    )
    plain = config_of("ect", *same)
    truncated = config_of("tcm", *same, "process.truncated_at=0.002", 'process.parameterization="edm"')
    one, two = awake(plain), fresh_student(truncated, load_dataset(truncated.data)).train()
    two.network.late.load_state_dict(one.network.state_dict())
    found = []
    for config, student, network in ((plain, one, one.network), (truncated, two, two.network.late)):
        loss = loss_of(build_objective(config), nets_of(student), batch(), None, now(config), rows(8, step=3))
        assert float(loss.t.min()) > 0.01  # r stays above the threshold: only the trained half is asked
        loss.weighted.mean().backward()
        found.append((loss.weighted, torch.cat([p.grad.flatten() for p in network.parameters()])))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert all(p.grad is None for p in two.network.early.parameters())


def test_a_rule_gets_as_many_times_as_were_drawn_and_the_size_of_the_groups(monkeypatch):
    """A method of three times (from t by way of s to r) or of groups of samples edits no list of fields."""
    config, seen = config_of("ict"), {}

    def three(*arguments):
        t, r = draw_times(*arguments)
        return t, (t + r) / 2, r

    def rule(nets, points):
        seen["times"], seen["group"] = points.times, points.group
        return build_target(TargetPart())(nets, points)

    monkeypatch.setattr("cmtool.losses.objective.draw_times", three)
    objective = replace(build_objective(config), target=rule)
    draw = replace(objective.draw(batch(), None, now(config), rows(8)), group=4)
    loss = objective.loss(nets_of(awake(config)), draw)
    t, s, r = seen["times"]
    assert torch.equal(t, loss.t) and torch.equal(t, draw.t) and torch.equal(r, draw.r)
    assert torch.allclose(s, (t + r) / 2) and bool((t > s).all())
    assert seen["group"] == 4
    monkeypatch.undo()
    plain = loss_of(build_objective(config), nets_of(awake(config)), batch(), None, now(config), rows(8))
    assert torch.equal(loss.weighted, plain.weighted)


def test_a_draw_settles_everything_that_needs_no_network():
    """What `loss` adds to a draw are answers of networks alone: the mask of a generator's images is drawn before."""
    config = config_of("ict-gc", "recipe.coupling.mix=0.5")
    objective, x0 = build_objective(config), batch()
    draw = objective.draw(x0, None, now(config), rows(8))
    assert draw.made is not None and 0 < int(draw.made.sum()) < 8
    assert torch.equal(draw.x0, x0)
    unmixed = build_objective(config_of("ict-gc", "recipe.coupling.mix=0.0"))
    assert unmixed.draw(x0, None, now(config), rows(8)).made is None
