"""Distances, their local forms, and weights."""

import math

import pytest
import torch

from cmtool.config.load import resolve
from cmtool.config.parts import DistancePart, TimesPart, WeightingPart
from cmtool.config.schema import ProcessConfig
from cmtool.errors import ConfigError
from cmtool.losses.assemble import build_distance
from cmtool.losses.distance import haar, l1, l2, pseudo_huber
from cmtool.losses.weighting import build_weighting
from tests.losses.oracles import D, column

C = 0.00054 * math.sqrt(3072)


@pytest.mark.parametrize(
    ("norm", "value", "slope"),
    [
        (1e-3, 1.670108e-5, 0.033393),
        (0.01, 1.626385e-3, 0.316895),
        (0.03, 0.012446986, 0.707934),
        (0.1, 0.074453088, 0.958011),
        (1.0, 0.970517959, 0.999552),
        (10.0, 9.970114952, None),
    ],
)
def test_pseudo_huber_golden(norm, value, slope):
    assert pytest.approx(0.0299298380, abs=1e-10) == C
    a = torch.zeros(1, 3, 32, 32, dtype=D, requires_grad=True)
    b = torch.full((1, 3, 32, 32), norm / math.sqrt(3072), dtype=D)
    distance = build_distance(DistancePart(kind="pseudo_huber"), 3072).between(a, b)
    assert float(distance.detach()) == pytest.approx(value, rel=1e-6)
    distance.sum().backward()
    if slope is not None:
        assert float(torch.linalg.vector_norm(a.grad)) == pytest.approx(slope, abs=1e-6)


def test_huber_is_of_the_whole_image_not_of_pixels():
    a, b = torch.zeros(1, 3, 32, 32, dtype=D), torch.full((1, 3, 32, 32), 0.55 / math.sqrt(3072), dtype=D)
    assert float(pseudo_huber(a, b, 0.03)) == pytest.approx(math.sqrt(0.55**2 + 0.03**2) - 0.03, rel=1e-9)
    elementwise = float((((a - b) ** 2 + 0.03**2).sqrt() - 0.03).mean())
    assert elementwise < 0.005 * float(pseudo_huber(a, b, 0.03))


def test_huber_keeps_its_digits_in_float32():
    a, b = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 1e-6)
    assert float(pseudo_huber(a, b, 0.03)) == pytest.approx(64e-12 / 0.06, rel=1e-4)


@pytest.mark.parametrize("kind", ["l1", "l2", "squared_norm", "pseudo_huber"])
@pytest.mark.parametrize("c", [0.0, 0.5])
def test_gradient_at_equal_images_is_zero_and_finite(kind, c):
    a = torch.randn(2, 1, 3, 3, requires_grad=True)
    build_distance(DistancePart(kind=kind, c=c), 9).between(a, a.detach()).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_reductions():
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([[[[1.0, -1], [2, 0]]], [[[0, 0], [0, 4.0]]]])
    assert l2(a, b).tolist() == [1.5, 4.0]
    assert l1(a, b).tolist() == [1.0, 1.0]
    assert build_distance(DistancePart(kind="squared_norm"), 4).between(a, b).tolist() == [6.0, 16.0]


@pytest.mark.parametrize(
    ("kind", "c", "power"),
    [
        ("l2", None, 2),
        ("squared_norm", None, 2),
        ("l1", None, 1),
        ("pseudo_huber", 0.3, 2),
        ("pseudo_huber", 0.0, 1),
        ("cauchy", 0.3, 2),
    ],
)
def test_local_forms_are_the_limits(kind, c, power):
    """d(f, f + h v) / h^power -> form, and the gradient of d(y, f - h v) at y = f -> pull, as h -> 0."""
    g = torch.Generator().manual_seed(0)
    f, v = torch.randn(3, 1, 2, 2, generator=g, dtype=D), torch.randn(3, 1, 2, 2, generator=g, dtype=D)
    distance = build_distance(DistancePart(kind=kind, c=c), 4)
    h = 1e-5
    assert torch.allclose(distance.between(f, f + h * v) / h**power, distance.form(f, v), rtol=1e-4)
    y = f.clone().requires_grad_(True)
    distance.between(y, f - h * v).sum().backward()
    assert torch.allclose(y.grad / h ** (power - 1), distance.pull(f, v), rtol=1e-4, atol=1e-9)


DETAILS = [
    ("l2", None),
    ("l1", None),
    ("squared_norm", None),
    ("pseudo_huber", 0.3),
    ("pseudo_huber", 0.0),
    ("cauchy", 0.3),
]


def test_haar_coefficients_of_a_picture_by_hand():
    """1 2 / 3 5 beside 4 4 / 4 4: the sums are halved, and so are the differences across, down and crosswise."""
    picture = torch.tensor([[1.0, 2, 4, 4], [3, 5, 4, 4]])[None, None]
    assert haar(picture, (2.0,)).flatten().tolist() == [-3.0, 0.0, -5.0, 0.0, 1.0, 0.0, 5.5, 8.0]


@pytest.mark.parametrize(("kind", "c"), DETAILS)
def test_weights_of_one_change_nothing_but_l1_and_heavier_ones_count_grain_more(kind, c):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 2, 8, 8, generator=g, dtype=D) for _ in range(2))
    flat, grainy = torch.ones(1, 1, 4, 4, dtype=D), torch.tensor([[1.0, -1], [-1, 1]], dtype=D).repeat(2, 2)[None, None]

    def measured(details, x, y):
        return build_distance(DistancePart(kind=kind, c=c, details=details), x[0].numel()).between(x, y)

    if kind != "l1":
        torch.testing.assert_close(measured((1.0, 1.0), a, b), measured((), a, b))
    assert float(measured((4.0, 2.0), flat, 0 * flat)) <= float(measured((), flat, 0 * flat)) + 1e-12
    assert float(measured((4.0, 2.0), grainy, 0 * flat)) > 1.5 * float(measured((), grainy, 0 * flat))
    exact = measured((4.0, 2.0), grainy, 0 * flat)
    if kind != "l1":
        torch.testing.assert_close(exact, measured((), 4 * grainy, 0 * flat))


@pytest.mark.parametrize(("kind", "c"), DETAILS)
def test_local_forms_in_details_are_the_limits(kind, c):
    g = torch.Generator().manual_seed(0)
    f, v = (torch.randn(3, 1, 4, 4, generator=g, dtype=D) for _ in range(2))
    distance = build_distance(DistancePart(kind=kind, c=c, details=(3.0, 2.0)), 16)
    h, power = 1e-5, 1 if kind == "l1" or c == 0 else 2
    torch.testing.assert_close(distance.between(f, f + h * v) / h**power, distance.form(f, v), rtol=1e-4, atol=0)
    y = f.clone().requires_grad_(True)
    distance.between(y, f - h * v).sum().backward()
    torch.testing.assert_close(y.grad / h ** (power - 1), distance.pull(f, v), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["recipe.distance.details=[4,2,2,2,2]"], "has 5 levels, and data.resolution = 8 cannot be halved as often"),
        (["recipe.distance.details=[4,-1]"], "details"),
        (["recipe.distance.details=[4]", "recipe.distance.kind=lpips"], "weighs differences of pixels"),
    ],
)
def test_details_that_do_not_fit_are_refused(sets, words):
    with pytest.raises(ConfigError, match=words):
        resolve("digits", sets=sets)


PROCESS = ProcessConfig()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("uniform", 1.0),
        ("inverse_gap", 4.0),
        ("snr", 4.0),
        ("snr_plus_one", 5.0),
        ("karras", 8.0),
        ("truncated_snr", 4.0),
        ("c_out", math.sqrt(8.0)),
        ("flow", 9.0),
    ],
)
def test_weights(kind, expected):
    weigh = build_weighting(WeightingPart(kind=kind), PROCESS)
    assert float(weigh(column(1.0), column(0.5), column(0.25), None)) == pytest.approx(expected)


def test_truncated_snr_stops_at_one_and_grid_speed_is_the_slope_of_the_grid():
    assert (
        float(build_weighting(WeightingPart(kind="truncated_snr"), PROCESS)(column(1), column(9.0), column(8), 0)) == 1
    )
    from cmtool.diffusion.grid import karras_grid

    grid = karras_grid(100_001)
    speed = (grid[50_001] - grid[49_999]) * 50_000
    weigh = build_weighting(WeightingPart(kind="grid_speed"), PROCESS)
    assert float(weigh(column(1.0), column(grid[50_000]), column(1.0), None)) == pytest.approx(speed, rel=1e-6)


@pytest.mark.parametrize(
    ("p", "golden"),
    [(1.0, (0.909, 0.999, 0.9999, 1.0)), (0.75, (0.294, 0.9993, 1.778, 3.162)), (0.5, (0.0953, 0.9995, 3.162, 10.0))],
)
def test_adaptive_weight_of_meanflow(p, golden):
    """e / (e + c)^p for e = .01, 1, 10, 100: constant for p = 1, so that the loss itself tells nothing."""
    weigh = build_weighting(WeightingPart(kind="adaptive", p=p, c=1e-3), PROCESS)
    e = column(0.01, 1.0, 10.0, 100.0)
    assert weigh(e, e, e, None).tolist() == pytest.approx(golden, rel=2e-3)


def test_adaptive_weight_is_held_fixed():
    e = column(2.0).requires_grad_(True)
    build_weighting(WeightingPart(kind="adaptive", p=1.0, c=1e-3), PROCESS)(e, e, e, None).sum().backward()
    assert float(e.grad) == pytest.approx(1 / 2.001)


def test_learned_weight_is_best_at_the_logarithm_of_the_distance():
    class Student(torch.nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = w

        def log_variance(self, t):
            return self.w.expand(len(t))

    w = torch.tensor(-math.log(3.0), requires_grad=True)
    loss = build_weighting(WeightingPart(kind="learned"), PROCESS)(
        torch.tensor([2.0, 4.0]), column(1, 1), None, Student(w)
    )
    loss.mean().backward()
    assert float(w.grad) == pytest.approx(0.0, abs=1e-6)


def test_atom_weight_is_two_separate_means():
    times = TimesPart(kind="student_t", low=1.0, atom=0.25)
    weigh = build_weighting(WeightingPart(kind="uniform", atom=0.1), PROCESS, times)
    d, t = column(5.0, 1.0, 2.0, 3.0), column(1.0, 2.0, 3.0, 4.0)
    assert float(weigh(d, t, t, None).mean()) == pytest.approx(2.0 + 0.1 * 5.0)
