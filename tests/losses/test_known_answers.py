"""The training code's own pairs, couplings and distances on laws whose answers are known: K12, K14 to K16 and others.

`tests/theory` holds the same numbers against formulas; here they must come out of the parts that training is made of.
Everything linear needs no sampling: images of +-s with noise of +-1, in all four combinations, have the second moments
of N(0, s^2) and N(0, 1).
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from cmtool.config.load import resolve
from cmtool.config.parts import CouplingPart, DistancePart, GapPart, TargetPart
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.grid import karras_grid
from cmtool.diffusion.solvers import euler_step
from cmtool.losses.assemble import build_distance, build_target
from cmtool.losses.coupling import build_coupling
from cmtool.losses.terms import Draw, Nets, Points
from cmtool.losses.weighting import FACTORS
from cmtool.schedules.times import grid_tensor, lognormal_masses, ratio_map
from cmtool.theory.laws import GMM_E
from cmtool.theory.levels import karras
from cmtool.theory.population import train
from tests.losses.oracles import D, gaussian_denoise, images, rows

S, LOW, HIGH = 0.5, 0.002, 80.0


class Lines(torch.nn.Module):
    """f(x, t) = slope(t) x, with the slopes of some levels given."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x, t, label=None):
        return self.slope(float(t[0])) * x


def exact_slope(t, low=LOW):
    return math.sqrt((S**2 + low**2) / (S**2 + t**2))


def four():
    """Images and noise of the second moments of N(0, S^2) and N(0, 1)."""
    return images(S, S, -S, -S), images(1, -1, 1, -1)


def level(t, like):
    return torch.full((len(like),), t, dtype=like.dtype)


def pair_of(net, x0, z, t, r, denoise=None):
    """What the rule of training makes of images and noise at neighbors t > r."""
    x_t = x0 + t * z
    points = Points(x0, z, x_t, (level(t, x0), level(r, x0)), None, denoise or (lambda x, t: x0), euler_step, None)
    return build_target(TargetPart())(Nets(net, net), points), x_t


def least_squares(prediction, target):
    return float((prediction * target).sum() / (prediction**2).sum())


def train_lines(count, couple=lambda net, x0, z, t, r: [(1.0, x0)]):
    """Fit level after level by least squares on what the couplings give; return the slopes and the losses."""
    x0, z = four()
    slopes, losses = {karras_grid(count)[0]: 1.0}, []
    net = Lines(lambda t: slopes.get(t, 0.0))
    for r, t in pairwise(karras_grid(count)):
        top = bottom = 0.0
        found = []
        for share, clean in couple(net, x0, z, t, r):
            pair, x_t = pair_of(net, clean, z, t, r)
            top, bottom = top + share * float((x_t * pair.target).sum()), bottom + share * float((x_t**2).sum())
            found.append((share, x_t, pair.target))
        slopes[t] = top / bottom
        losses.append(sum(share * float(((slopes[t] * x - y) ** 2).mean()) for share, x, y in found))
    return slopes, losses


@pytest.mark.parametrize(("count", "product"), [(18, 5.28797756e-3), (72, 6.00471469e-3)])
def test_training_towards_the_sample_ends_at_the_euler_product(count, product):
    slopes, losses = train_lines(count)
    assert slopes[karras_grid(count)[-1]] == pytest.approx(product, rel=1e-8)
    # What is lost of the variance is what the stages could not fit (K12).
    v = S**2 + LOW**2
    assert sum(losses) == pytest.approx(v - product**2 * (S**2 + HIGH**2), rel=1e-7)
    if count == 18:
        assert sum(losses) == pytest.approx(0.0710356865, abs=1e-10)


def test_k12_on_a_mixture():
    """The least losses of all stages add up to the variance that the trained map has lost, here with any function."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    x0 = torch.tensor(np.add.outer(GMM_E.means, GMM_E.stds[:, None] * nodes[None]).diagonal(0, 0, 1).T.reshape(-1))
    share = torch.tensor(np.outer(GMM_E.weights, weights).reshape(-1))
    x0, z = (a.reshape(-1, 1, 1, 1) for a in torch.meshgrid(x0, torch.tensor(nodes), indexing="ij"))
    weight = torch.outer(share, torch.tensor(weights)).reshape(-1)
    grid, functions = karras_grid(18), train(GMM_E, karras(18), 3001)
    at = dict(zip(grid, functions, strict=True))

    class Splines(torch.nn.Module):
        def forward(self, x, t, label=None):
            return torch.as_tensor(at[float(t[0])](x.numpy()))

    total = 0.0
    for r, t in pairwise(grid):
        pair, _ = pair_of(Splines(), x0, z, t, r)
        total += float((weight * pair.measure(build_distance(DistancePart(kind="l2"), 1))).sum())
    assert total == pytest.approx(0.08239077, abs=2e-7)


def generated(net, x0, z, t, r, mix=1.0):
    """The images after the coupling of generator-augmented flows with `net` as its predictor."""
    part = CouplingPart(kind="generator", predictor="online", mix=1.0)
    draw = Draw(x0, z, (level(t, x0), level(r, x0)), None, mix, rows(len(x0)))
    return build_coupling(part)(Nets(net, net), draw).x0


@pytest.mark.parametrize(
    ("t", "mix", "golden", "digits"),
    [(1.0, 0.0, 0.2, 1e-12), (1.0, 1.0, 0.0233165015, 1e-10), (5.0, 1.0, 8.18947e-5, 5e-11)],
)
def test_k14_discrepancy_of_coupled_pairs(t, mix, golden, digits):
    x0, z = four()
    x_t = generated(Lines(exact_slope), x0, z, t, t, mix) + t * z
    residual = float(((z - least_squares(x_t, z) * x_t) ** 2).mean())
    assert residual == pytest.approx(golden, abs=digits)


@pytest.mark.parametrize(
    ("count", "mix", "predictor", "ratio"),
    [
        (18, 1.0, "ideal", 1.197392),
        (1280, 0.5, "own", 1.127302),
        (18, 0.0, "own", 0.846070),
        (18, 0.5, "own", 0.991157),
    ],
)
def test_k15_spread_after_training_on_generated_pairs(count, mix, predictor, ratio):
    ideal = Lines(exact_slope)

    def couple(net, x0, z, t, r):
        made = generated(ideal if predictor == "ideal" else net, x0, z, t, r)
        return [(mix, made), (1 - mix, x0)]

    slopes, _ = train_lines(count, couple)
    found = slopes[karras_grid(count)[-1]] * HIGH / math.hypot(S, LOW)
    assert found == pytest.approx(ratio, abs=1e-6)


def test_k16_the_l1_distance_sends_too_little_to_the_rare_mode():
    """Two points at -1 (share .3) and +1 (.7): the least expected l1 distance is at the likelier of the two targets."""
    distance = build_distance(DistancePart(kind="l1"), 1)
    grid, low, high = karras_grid(2561), -1.5, -1.0
    for _ in range(3):
        starts = torch.linspace(low, high, 41, dtype=D)
        x = (HIGH * starts).reshape(-1, 1, 1, 1)
        for t, r in zip(grid[:0:-1], grid[-2::-1], strict=True):
            at = (level(t, x), level(r, x))
            ends = [euler_step(lambda x, t, c=c: torch.full_like(x, c), x, *at) for c in (-1.0, 1.0)]
            share = torch.sigmoid(math.log(0.7 / 0.3) + 2 * x.flatten() / t**2)
            costs = [(1 - share) * distance.between(y, ends[0]) + share * distance.between(y, ends[1]) for y in ends]
            x = torch.where((costs[0] < costs[1])[:, None, None, None], ends[0], ends[1])
        last = int((x < 0).sum()) - 1
        assert 0 <= last < 40
        low, high = float(starts[last]), float(starts[last + 1])
    mass = float(ndtr((low + high) / 2))
    assert mass == pytest.approx(0.0986527, abs=1e-5)
    assert 2 * (0.3 - mass) == pytest.approx(0.407, abs=5e-3)  # the gap in W1; .407003742 for sigma_max without end


@pytest.mark.parametrize(
    ("slope", "power", "golden"),
    [
        (lambda t: exact_slope(t, 0.0), 2, {10: 0.750358, 100: 0.780242, 1000: 0.780553}),
        (lambda t: exact_slope(t, 0.0), 1, {10: 0.466023, 100: 0.522682, 1000: 0.528302}),
        (lambda t: math.exp(-0.3 * t), 2, {10: 0.906822, 100: 0.989038, 1000: 0.996078}),
        (lambda t: math.exp(-0.3 * t), 1, {10: 0.324965, 100: 0.377791, 1000: 0.381932}),
    ],
)
def test_losses_of_training_and_distillation_differ_by_the_discrepancy(slope, power, golden):
    """N^a (L_CT - L_CD) on N even steps of [0, 2]: Theorem 1 of Issenhuth et al. 2025 at finite N."""
    net, one, nothing = Lines(slope), images(1.0), images(0.0)

    def size(t, r, denoise=None):
        """E|difference|^a of a difference that is linear in image and noise."""
        by_image, by_noise = (pair_of(net, a, b, t, r, denoise)[0] for a, b in ((one, nothing), (nothing, one)))
        variance = sum(
            scale**2 * float(pair.prediction - pair.target) ** 2 for scale, pair in ((S, by_image), (1.0, by_noise))
        )
        return variance if power == 2 else math.sqrt(2 / math.pi * variance)

    for count, value in golden.items():
        times = np.linspace(0, 2, count + 1).tolist()
        gaps = [size(t, r) - size(t, r, gaussian_denoise(S)) for r, t in pairwise(times)]
        assert count**power * sum(gaps) / count == pytest.approx(value, abs=2e-6)


def test_weights_of_the_coarsest_grid():
    weights = [67.931307, 14.627058, 4.288237, 1.545276, 0.645244, 0.300867, 0.152844, 0.083148, 0.047835, 0.02883]
    t = grid_tensor(11, ProcessConfig())
    assert FACTORS["inverse_gap"](t[1:], t[:-1], ProcessConfig()).tolist() == pytest.approx(weights, abs=6e-7)
    inside = ndtr((math.log(HIGH) + 1.1) / 2) - ndtr((math.log(LOW) + 1.1) / 2)
    assert inside == pytest.approx(0.99166315, abs=1e-8)
    # The law in closed form: the masses are cuts of the normal in ln t, and they add up to one.
    cuts = ndtr((t.log().numpy() + 1.1) / 2)
    assert lognormal_masses(11, ProcessConfig(), -1.1, 2.0).numpy() == pytest.approx(np.diff(cuts) / inside, rel=1e-9)


def test_a_fine_grid_is_nearly_a_constant_ratio():
    """On the grid of N points (t - r) / t is 7 h t^(-1/7), h its step in t^(1/7): nearly ECT's constant map."""
    t = grid_tensor(1281, ProcessConfig())
    h = (HIGH ** (1 / 7) - LOW ** (1 / 7)) / 1280
    ratio = (t[1:] - t[:-1]) / t[1:]
    assert torch.allclose(ratio, 7 * h * t[1:] ** (-1 / 7), rtol=1e-2)
    constant = 1 - ratio_map(GapPart(kind="ratio", map="constant", q=2.0), t[1:], 6) / t[1:]
    assert float(constant[0]) == 1 / 128
    near = (t[1:] > 0.3) & (t[1:] < 3)
    assert torch.allclose(ratio[near], constant[near], rtol=0.3)


@pytest.mark.parametrize("preset", ["imagenet32", "celeba64"])
def test_the_average_of_the_released_runs_as_one_decay_a_step(preset):
    """Nominally .9999 every 5 steps; with its warm-up 1 - (1 + k)^(-2/3) it has come to .999646 after 150,000."""
    decay = {k: 1 - (1 + k) ** (-2 / 3) for k in (1000, 10_000, 100_000, 150_000)}
    assert list(decay.values()) == pytest.approx([0.990007, 0.997846, 0.999536, 0.999646], abs=1e-6)
    half = [5 * math.log(0.5) / math.log(value) for value in decay.values()]
    assert half == pytest.approx([345, 1607, 7465, 9782], abs=1)
    train = resolve(preset).config.train
    assert train.ema.decay == pytest.approx(decay[train.steps] ** (1 / 5), abs=5e-6)
