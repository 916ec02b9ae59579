"""Score distillation on exact Gaussians, where both denoisers are known in closed form."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cmtool.config.parts import ScorePart
from cmtool.losses.assemble import build_objective
from cmtool.losses.score import build_rule, dmd
from cmtool.losses.terms import Nets, Slice
from cmtool.schedules.curriculum import CurriculumState
from tests.losses.oracles import D, config_of, gaussian_denoise

SHAPE = (1, 8, 8)
NOW = CurriculumState(0, 1, 2, 0.0, 0)


def normal(count, seed, shape=SHAPE):
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed), dtype=D)


def pulled(rule, x, t, real, fake):
    """Pull samples `x` noised to the level `t`, between two Gaussian laws (standard deviation, mean)."""
    z, level = normal(len(x), 9), torch.full((len(x),), t, dtype=D)
    noised = {}

    def both(sample):
        noised["x_t"] = sample + t * z
        return tuple(gaussian_denoise(*law)(noised["x_t"], level) for law in (real, fake))

    return rule(x, both), noised["x_t"]


@pytest.mark.parametrize("kind", ["sid", "dmd"])
@pytest.mark.parametrize("t", [0.05, 0.5, 5.0])
def test_nothing_pulls_where_the_laws_are_the_same(kind, t):
    pull, _ = pulled(build_rule(ScorePart(kind=kind)), 0.3 + 0.5 * normal(4, 0), t, (0.5, 0.3), (0.5, 0.3))
    assert not pull.gradient.any() and not pull.distance.any()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize(("s", "m"), [(0.5, -0.2), (0.8, 0.3), (0.3, 0.3)])
def test_sid_pulls_as_the_closed_form_says(alpha, s, m):
    """With T = m0 + a (x_t - m0) and F = m + b (x_t - m) the loss is a quadratic in x."""
    t, s0, m0 = 0.7, 0.5, 0.3
    x = m + s * normal(4, 0)
    pull, x_t = pulled(build_rule(ScorePart(kind="sid", alpha=alpha)), x, t, (s0, m0), (s, m))
    a, b = s0**2 / (s0**2 + t**2), s**2 / (s**2 + t**2)
    real, fake = m0 + a * (x_t - m0), m + b * (x_t - m)
    apart = real - fake
    miss = (x - real).abs().flatten(1).mean(1)
    gradient = (a - b) * (real - x - alpha * apart) + apart * (a - 1 - alpha * (a - b))
    torch.testing.assert_close(pull.gradient, gradient / miss[:, None, None, None])
    other = (1 - alpha) * apart**2 + apart * (fake - x)  # the paper's form
    torch.testing.assert_close(pull.loss, other.flatten(1).sum(1) / miss)


def scale_pull(rule, s, t=0.7, s0=0.5):
    """The mean of gradient times sample: positive where a step downhill makes the samples' deviation smaller."""
    x = s * normal(3000, 1)
    pull, _ = pulled(rule, x, t, (s0, 0.0), (s, 0.0))
    return float((pull.gradient * x).flatten(1).sum(1).mean())


@pytest.mark.parametrize("kind", ["sid", "dmd"])
def test_both_pull_towards_the_true_law(kind):
    rule = build_rule(ScorePart(kind=kind, alpha=1.0))
    assert scale_pull(rule, 0.8) > 0.01 and scale_pull(rule, 0.3) < -0.01
    for m in (-0.4, 0.9):
        pull, _ = pulled(rule, m + 0.5 * normal(64, 2), 0.7, (0.5, 0.3), (0.5, m))
        assert bool(((pull.gradient * (m - 0.3)) > 0).all())


def test_dmd_is_the_difference_of_exact_scores():
    """grad = t^2 (score of the samples' law - score of the data) over the teacher's miss (Yin et al. 2024, Eq. 7, 8)."""
    t, x = 0.7, 0.1 + 0.8 * normal(4, 3)
    pull, x_t = pulled(dmd, x, t, (0.5, 0.3), (0.8, 0.1))
    scores = [-(x_t - m) / (s**2 + t**2) for s, m in ((0.8, 0.1), (0.5, 0.3))]
    miss = (x - gaussian_denoise(0.5, 0.3)(x_t, torch.full((4,), t))).abs().flatten(1).mean(1)
    expected = t**2 * (scores[0] - scores[1]) / miss[:, None, None, None]
    torch.testing.assert_close(pull.gradient, expected)
    torch.testing.assert_close(pull.loss, (expected**2).flatten(1).sum(1) / 2)


class Affine(nn.Module):
    """x -> a x + b, whatever the noise level: a generator from noise, or a denoiser at one level."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=D)) for value in (a, b))
        self.calls = []

    def forward(self, x, t, label=None, r=None):
        self.calls.append((x, t, r))
        return self.a * x + self.b


def objective_of(*sets, recipe="sid", teacher=(0.5, 0.0)):
    config = config_of(recipe, *sets)
    exact = gaussian_denoise(*teacher)
    model = SimpleNamespace(process=config.process)
    objective = build_objective(config, teacher=model)
    return replace(objective, direction=lambda nets, x0, label, augment=None: exact)


def pass_of(objective, student, fake, count=8, seed=0):
    nets = Nets(student, student, fake=fake)
    draw = objective.draw(torch.zeros(count, *SHAPE, dtype=D), None, NOW, Slice(seed, 0, 0, count))
    return nets, draw


def test_the_best_fake_network_is_the_denoiser_of_the_models_law():
    """At one noise level the loss is a quadratic in a and b: its minimum is found by one Newton step."""
    objective = objective_of("recipe.score.levels=[2.0]", "recipe.score.fake_mean=-0.5", "recipe.score.fake_std=1e-6")
    student, fake, t = Affine(0.4, 0.2), Affine(0.0, 0.0), torch.tensor(-0.5).exp().item()
    nets, _ = pass_of(objective, student, fake)
    empty = torch.zeros(4000, *SHAPE, dtype=D)

    def loss(values):
        fake.a.data, fake.b.data = values
        value = objective.follow(nets, empty, None, Slice(3, 0, 0, 4000)).mean()
        return torch.stack(torch.autograd.grad(value, (fake.a, fake.b))).detach()

    zero, e1, e2 = torch.zeros(2, dtype=D), torch.tensor([1.0, 0.0], dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    base = loss(zero)
    hessian = torch.stack([loss(e1) - base, loss(e2) - base], dim=1)
    a, b = torch.linalg.solve(hessian, -base).tolist()
    s, m = 0.8, 0.2  # 0.4 times noise of level 2
    assert a == pytest.approx(s**2 / (s**2 + t**2), abs=3e-3)
    assert b == pytest.approx(m * (1 - a), abs=3e-3)


def test_each_network_learns_from_its_own_loss_alone():
    objective = objective_of("recipe.score.levels=[2.0]")
    student, fake = Affine(0.4, 0.2), Affine(0.5, 0.1)
    nets, draw = pass_of(objective, student, fake)
    loss = objective.loss(nets, draw)
    assert loss.weighted.shape == loss.distance.shape == loss.fake.shape == loss.t.shape == (8,)
    assert len(student.calls) == 1, "samples are made once"
    loss.fake.sum().backward(retain_graph=True)
    assert student.a.grad is None and fake.a.grad is not None
    fake.zero_grad()
    loss.weighted.sum().backward()
    assert fake.a.grad is None and student.a.grad is not None
    z, t = draw.probe

    def both(sample):
        x_t = sample + t[:, None, None, None] * z
        return gaussian_denoise(0.5)(x_t, t), fake(x_t, t)

    x = student(2.0 * draw.starts[0], t)
    pull = objective.rule(x.detach(), both)
    expected = torch.autograd.grad((x * pull.gradient).sum(), student.a)[0]
    torch.testing.assert_close(student.a.grad, expected)
    torch.testing.assert_close(loss.weighted.detach(), pull.loss)


@pytest.mark.parametrize("recipe", ["sid", "dmd2"])
def test_a_generator_finds_the_law_of_the_data(recipe):
    """With exact scores of its own law at hand, descent ends at the data's deviation and mean."""
    objective = objective_of("recipe.score.levels=[2.0]", recipe=recipe, teacher=(0.5, 0.3))
    student = Affine(0.45, -0.3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for step in range(150):

        def own(x, t, label=None):
            return gaussian_denoise(2 * student.a.item(), student.b.item())(x, t)

        nets, draw = pass_of(objective, student, own, count=16, seed=step)
        optimizer.zero_grad()
        objective.loss(nets, draw).weighted.mean().backward()
        optimizer.step()
    assert 2 * student.a.item() == pytest.approx(0.5, abs=0.05)
    assert student.b.item() == pytest.approx(0.3, abs=0.05)


def test_later_levels_start_from_the_models_own_answers():
    """Backward simulation: sampled as multistep sampling would, with no gradient through the steps before."""
    objective = objective_of("recipe.score.levels=[20.0, 2.0, 0.5]")
    student, fake = Affine(0.4, 0.2), Affine(0.5, 0.1)
    nets, draw = pass_of(objective, student, fake, count=7)
    assert draw.at.tolist() == [0, 1, 2, 0, 1, 2, 0]
    x, level = objective.samples(student, draw)
    assert level.tolist() == [20.0, 2.0, 0.5, 20.0, 2.0, 0.5, 20.0]
    expected, start = [], 20.0 * draw.starts[0]
    for target, noise in zip((2.0, 0.5, None), (*draw.starts[1:], None), strict=True):
        expected.append(0.4 * start + 0.2)
        start = (
            None
            if target is None
            else objective.process.renoise(expected[-1], noise, torch.full((7,), target, dtype=D))
        )
    wanted = torch.stack([expected[at][row] for row, at in enumerate(draw.at.tolist())])
    torch.testing.assert_close(x.detach(), wanted)
    (slope,) = torch.autograd.grad(x.sum(), student.a)
    torch.testing.assert_close(slope, ((wanted - 0.2) / 0.4).sum())
    fake.calls.clear()
    objective.loss(nets, draw)
    assert all(torch.equal(r, level) for _, _, r in fake.calls), "the fake network is told the level"


def test_levels_of_comparison_are_uniform_within_reach():
    objective = objective_of("recipe.score.reach=[0.1, 0.8]")
    _, draw = pass_of(objective, Affine(0.4, 0.0), None, count=2000)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    share = (draw.probe[1] ** (1 / 7) - low) / (high - low)
    assert 0.1 <= float(share.min()) < 0.11 and 0.79 < float(share.max()) <= 0.8
    assert float(share.mean()) == pytest.approx(0.45, abs=0.01)


def test_what_is_kept_is_the_other_parts_of_the_recipe():
    config = config_of("polish")
    parts = config.recipe.model_copy(update={"score": ScorePart()})
    alone = build_objective(
        config.model_copy(update={"recipe": parts}), teacher=SimpleNamespace(process=config.process)
    )
    exact = gaussian_denoise(0.5)
    alone = replace(alone, direction=lambda nets, x0, label, augment=None: exact)
    both = objective_of(recipe="polish")
    student, fake = Affine(0.4, 0.2), Affine(0.5, 0.1)
    x0, rows = normal(8, 5), Slice(0, 0, 0, 8)
    nets = Nets(student, student, fake=fake)
    losses = []
    for weight in (0.0, 0.5):
        changed = replace(both, part=both.part.model_copy(update={"keep": weight}))
        losses.append(changed.loss(nets, changed.draw(x0, None, NOW, rows)).weighted)
    kept = alone.loss(nets, alone.draw(x0, None, NOW, rows)).weighted
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * kept)
    rare = replace(both, part=both.part.model_copy(update={"keep": 0.5, "keep_every": 3}))
    third = rare.loss(nets, rare.draw(x0, None, NOW, rows)).weighted
    torch.testing.assert_close(third - losses[0], 1.5 * kept)
    later = replace(rows, step=1)
    plain = replace(both, part=both.part.model_copy(update={"keep": 0.0}))
    between = [part.loss(nets, part.draw(x0, None, NOW, later)).weighted for part in (rare, plain)]
    torch.testing.assert_close(*between)
