"""Points of a teacher's paths: stored where the exact flow is, and regressed to its end."""

import pytest
import torch

from cmtool.config.parts import CouplingPart, GapPart, TimesPart
from cmtool.config.schema import ProcessConfig
from cmtool.losses.coupling import Pairs, build_coupling
from cmtool.losses.terms import Draw, Nets
from cmtool.schedules.times import draw_times, grid_of
from cmtool.training.setup import make_pairs
from tests.losses.oracles import D, Given, config_of, model, rows

PROCESS = ProcessConfig()


def paths(points, count=40):
    """Paths of the exact denoiser of N(0, .5^2), which EDM's scalings are without any network, on a grid of N points."""
    config = config_of("cmt", f"recipe.curriculum.s1={points}", f"recipe.coupling.pairs={count}", teacher="unused")
    teacher = model(Given(lambda x, c: 0 * x), parameterization="edm")
    teacher.header["data"]["float_samples"] = True
    return make_pairs(config.recipe.coupling, config, teacher)


def exact(noise, level):
    """The flow of N(0, .5^2) from noise at 80 down to a level."""
    return noise * ((0.25 + level**2) / (0.25 + 80.0**2)) ** 0.5


def test_stored_points_follow_the_exact_flow_at_second_order():
    wrong = {}
    for points in (33, 65):
        found = paths(points)
        levels, noisy = found["levels"], found["noisy"]
        assert noisy.shape == (40, points - 1, 1, 1, 1) and float(levels[0]) == 80 and float(levels[-1]) > 0.002
        ratios = levels[:-1] / levels[1:]
        assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-5)  # even in ln t, as published
        ends = exact(noisy[:, 0], 0.0)
        wrong[points] = float((found["clean"] / ends - 1).abs().max())
        assert torch.allclose(noisy, exact(noisy[:, :1], levels.reshape(1, -1, 1, 1, 1)), rtol=0.06)
    assert wrong[65] < 0.01
    assert wrong[33] / wrong[65] == pytest.approx(4, rel=0.3)


def test_a_draw_is_a_point_of_a_path_and_its_end():
    """x0 + t z is the stored point at t, and the clean image is what the exact consistency function makes of it."""
    found = paths(129)
    coupling = build_coupling(CouplingPart(kind="teacher", path=True), Pairs(**found, labels=None))
    u = (torch.arange(256, dtype=D) + 0.5) / 256
    times = draw_times(TimesPart(kind="grid_log"), GapPart(), u, PROCESS, 129, 0)
    levels = tuple(time.float() for time in times)
    blank = torch.zeros(256, 1, 1, 1)
    draw = coupling(Nets(None, None), Draw(blank, blank, levels, None, 0.0, rows(256)))
    t = draw.t.reshape(-1, 1, 1, 1)
    x_t = draw.x0 + t * draw.z
    assert len(set(draw.t.tolist())) == 128
    assert torch.allclose(draw.x0, x_t * 0.5 / (0.25 + t**2).sqrt(), rtol=0.02, atol=1e-4)
    whole = set(found["noisy"].flatten().tolist())
    assert sum(any(abs(x - y) <= 1e-5 * abs(y) for y in whole) for x in x_t[:8].flatten().tolist()) == 8


def test_the_grid_even_in_ln_t_keeps_its_ends():
    grid = grid_of(TimesPart(kind="grid_log"), 17, PROCESS)
    assert (float(grid[0]), float(grid[-1])) == (0.002, 80.0)
    assert torch.allclose(grid[1:] / grid[:-1], torch.full((16,), 40000 ** (1 / 16), dtype=D), rtol=1e-12)
