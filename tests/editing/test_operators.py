"""Blurs and reductions against their dense matrices; few evaluations with the found noise negated."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.editing import loop as ed
from cmtool.editing.operators import CUT, blur, reduction
from tests.editing.test_loop import Wave
from tests.samplers.oracle import streams

D = torch.float64
WAYS = {
    "blur": blur(8, 6, 1.5, 0.7),
    "weak blur": blur(8, 8, 0.3, 0.3),
    "bicubic": reduction(8, 12, 2, "bicubic"),
    "mean": reduction(8, 12, 4, "mean"),
}


def line(parts):
    u, s, v = parts
    return (u * s) @ v.T


def dense(way):
    """The whole map on flattened pictures (rows first)."""
    return torch.kron(line(way.rows), line(way.columns))


def picture(height, width, seed=0, channels=3):
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=D) * 2 - 1


@pytest.mark.parametrize("name", WAYS)
def test_everything_is_what_the_dense_matrix_says(name):
    way = WAYS[name]
    a = dense(way)
    u, s, vh = torch.linalg.svd(a)
    kept = s >= CUT * s.max()
    assert int(kept.sum()) == int((way.values > 0).sum())
    cut = (u[:, : len(s)] * (s * kept)) @ vh[: len(s)]
    inverse = torch.linalg.pinv(a, rtol=CUT)
    x = picture(len(way.rows[2]), len(way.columns[2]))
    m = picture(len(way.rows[0]), len(way.columns[0]), 1)

    def close(found, matrix, given, tolerance=1e-9):
        expected = given.flatten(2) @ matrix.T
        assert torch.allclose(found.flatten(2), expected, atol=tolerance * float(expected.abs().max()))

    close(way.measure(x), cut, x)
    close(way.restore(m), inverse, m)
    close(way.known().project(x), inverse @ a, x)
    for ratio in (1e-4, 0.3):
        soft = cut.T @ torch.linalg.inv(cut @ cut.T + ratio * torch.eye(len(cut), dtype=D)) @ cut
        close(way.known(ratio).project(x), soft, x)


def test_they_are_what_image_programs_do():
    x = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
    for kernel, rule in (("bicubic", Image.Resampling.BICUBIC), ("mean", Image.Resampling.BOX)):
        theirs = np.asarray(Image.fromarray(x).resize((4, 4), rule))
        ours = reduction(12, 12, 3, kernel).measure(torch.from_numpy(x)[None, None].double())[0, 0]
        assert np.abs(ours.numpy() - theirs).max() < 1e-5
    flat = torch.full((1, 1, 16, 16), 0.4, dtype=D)
    assert torch.allclose(blur(16, 16, 2.0, 2.0).measure(flat), flat, atol=1e-3)
    dot = torch.zeros(1, 1, 33, 33, dtype=D)
    dot[..., 16, 16] = 1
    spread = blur(33, 33, 1.5, 1.5).measure(dot)[0, 0].sum(0)
    place = torch.arange(33, dtype=D) - 16
    assert float((spread * place**2).sum()) == pytest.approx(1.5**2, rel=0.01)


@pytest.mark.parametrize("fresh", [1.0, 0.3])
@pytest.mark.parametrize("name", ["blur", "bicubic", "mean"])
def test_without_noise_an_edit_measures_as_given(name, fresh):
    way = WAYS[name]
    x = picture(len(way.rows[2]), len(way.columns[2]))
    m = way.measure(x)
    model = Wave(tuple(x.shape[1:]))
    draws = streams(2, dtype=D)
    made = ed.edit(model, way.known(), way.restore(m), draws, (5.0, 1.0, 0.2), guidance=0.4, fresh=fresh)
    assert torch.allclose(way.measure(made.image), m, atol=1e-10)
    assert float((made.image - way.restore(m)).abs().max()) > 0.05


def test_random_masks_keep_every_known_pixel():
    mask = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.8).to(D)
    y = picture(8, 8) * (1 - mask)
    made = ed.edit(Wave(), ed.known_pixels(mask), y, streams(2, dtype=D), (5.0, 0.2), guidance=0.4, fresh=0.1)
    assert torch.equal(made.image * (1 - mask), y)


def test_found_noise_is_negated_as_published():
    """The loop of CM4IR written out: x' = x0 + t' (e z + sqrt(1 - e^2) (f - x) / t)."""
    model, operator, y, times, fresh = Wave(), WAYS["weak blur"].known(1e-3), picture(8, 8), (4.0, 1.0, 0.3), 0.4
    draws = streams(2, dtype=D)
    x = operator.start(y) + times[0] * draws.normal((3, 8, 8))
    for index, t in enumerate(times):
        answer = model(x, torch.full((2,), t, dtype=D)).clamp(-1, 1)
        found = (answer - x) / t
        x = operator.replace(answer, y, 1.0 if index == 2 else 1.4)
        if index < 2:
            level = math.sqrt(times[index + 1] ** 2 - model.sigma_min**2)
            x = x + level * (fresh * draws.normal((3, 8, 8)) + math.sqrt(1 - fresh**2) * found)
    made = ed.edit(model, operator, y, streams(2, dtype=D), times, guidance=0.4, fresh=fresh)
    assert torch.allclose(made.image, x, atol=1e-12)


def test_an_exact_model_of_noisy_data_gets_the_posterior_mean():
    """On Gaussian data N(0, .03^2), whose model answers 0 where much noise is, one evaluation is Wiener's filter."""
    way, noise, spread = WAYS["blur"], 0.05, 0.03
    a = dense(way)
    m = picture(8, 6, 3)
    wiener = spread**2 * a.T @ torch.linalg.inv(spread**2 * a @ a.T + noise**2 * torch.eye(48, dtype=D))

    class Zero(Wave):
        def __call__(self, x, t, label=None):
            return 0 * x

    made = ed.edit(Zero((3, 8, 6)), way.known((noise / spread) ** 2), way.restore(m), streams(2, dtype=D), (1.0,))
    expected = (m.flatten(2) @ wiener.T).reshape(m.shape)
    assert torch.allclose(made.image, expected, atol=2e-3)
