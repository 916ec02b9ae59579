"""Algorithm 4: agreement with its matrix form, the exact answer on Gaussian data, and what stays to the bit."""

import math

import pytest
import torch

from cmtool.diffusion.grid import karras_grid
from cmtool.editing import loop as ed
from cmtool.rng import SampleStreams
from tests.samplers.oracle import GaussianConsistency, streams

TIMES = {1: (80.0,), 2: (80.0, 0.8), 5: (80.0, 10.0, 2.0, 0.5, 0.1)}


class Wave:
    """A stand-in for a model: any nonlinear map that couples pixels and channels."""

    sigma_min = 0.002

    def __init__(self, shape=(3, 8, 8)):
        self.image_shape = shape

    def __call__(self, x, t, label=None):
        mixed = x + x.roll(1, -1) + x.roll(1, -2) + x.mean(dim=1, keepdim=True)
        return torch.sin(mixed / t.reshape(-1, 1, 1, 1).clamp_min(1.0))


def basis(first):
    """An orthogonal matrix whose first column is `first`, by QR, its sign as in the paper."""
    full = torch.eye(len(first), dtype=torch.float64)
    full[:, 0] = first / first.norm()
    q, _ = torch.linalg.qr(full)
    return -q if q[:, 0].sum() < 0 else q


def by_matrix(forward, backward, omega, model, y, draws, times):
    """Algorithm 4 word by word: forward is A, backward its inverse, omega is 1 where the model generates."""
    known = forward(y) * (1 - omega)
    x = backward(known) + times[0] * draws.normal(y.shape[1:])
    for index, level in enumerate(times):
        if index:
            x = x + math.sqrt(max(level**2 - model.sigma_min**2, 0.0)) * draws.normal(y.shape[1:])
        f = model(x, torch.full((len(x),), level, dtype=x.dtype)).clamp(-1, 1)
        x = backward(known + forward(f) * omega)
    return x


def colors(y):
    q = basis(torch.tensor(ed.LUMA, dtype=torch.float64)).to(y.dtype)
    omega = torch.tensor([0.0, 1.0, 1.0], dtype=y.dtype).reshape(1, 3, 1, 1)
    return lambda v: torch.einsum("bchw,cd->bdhw", v, q), lambda v: torch.einsum("bdhw,cd->bchw", v, q), omega


def patches(y, p):
    q = basis(torch.full((p * p,), 1.0 / p, dtype=torch.float64)).to(y.dtype)
    b, c, h, w = y.shape

    def forward(v):
        cut = v.reshape(b, c, h // p, p, w // p, p).permute(0, 1, 2, 4, 3, 5).reshape(b, c, h // p, w // p, p * p)
        return cut @ q

    def backward(v):
        cut = (v @ q.T).reshape(b, c, h // p, w // p, p, p)
        return cut.permute(0, 1, 2, 4, 3, 5).reshape(b, c, h, w)

    omega = torch.ones(p * p, dtype=y.dtype)
    omega[0] = 0
    return forward, backward, omega


def case(name, y):
    mask = (torch.arange(8) % 3 == 0).to(y.dtype).expand(1, 1, 8, 8)
    same = lambda v: v  # noqa: E731
    return {
        "inpaint": lambda: (ed.known_pixels(mask), (same, same, mask)),
        "colorize": lambda: (ed.known_luma(), colors(y)),
        "superres2": lambda: (ed.known_patch_means(2), patches(y, 2)),
        "superres4": lambda: (ed.known_patch_means(4), patches(y, 4)),
    }[name]()


@pytest.mark.parametrize("steps", TIMES)
@pytest.mark.parametrize("name", ["inpaint", "colorize", "superres2", "superres4"])
def test_every_operator_agrees_with_the_algorithm_as_matrices(name, steps):
    y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    operator, (forward, backward, omega) = case(name, y)
    got = ed.edit(Wave(), operator, y, streams(3, dtype=torch.float64), TIMES[steps]).image
    expected = by_matrix(forward, backward, omega, Wave(), y, streams(3, dtype=torch.float64), TIMES[steps])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_color_matrix_is_the_papers():
    q = basis(torch.tensor(ed.LUMA, dtype=torch.float64))
    assert q[:, 0].tolist() == pytest.approx([0.4471, 0.8781, 0.1705], abs=1e-4)
    assert ed.luma_vector(q).flatten().tolist() == pytest.approx(q[:, 0].tolist(), abs=1e-12)


@pytest.mark.parametrize("name", ["inpaint", "colorize", "superres2"])
def test_projections_are_projections(name):
    y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    operator, _ = case(name, y)
    once = operator.project(y)
    torch.testing.assert_close(operator.project(once), once)
    torch.testing.assert_close((once * (y - once)).sum(), torch.zeros((), dtype=y.dtype), atol=1e-10, rtol=0)


class TwoPixels(GaussianConsistency):
    """The exact f of two correlated Gaussian pixels: U sqrt((l + eps^2) / (l + t^2)) U^T."""

    def __init__(self, s=0.5, correlation=0.9):
        super().__init__(s, (1, 1, 2))
        self.values, self.vectors = torch.linalg.eigh(
            s**2 * torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)
        )

    def __call__(self, x, t, label=None):
        self.calls.append(float(t[0]))
        scale = ((self.values + self.sigma_min**2) / (self.values + float(t[0]) ** 2)).sqrt()
        return (x.double() @ (self.vectors * scale) @ self.vectors.T).to(x.dtype)


def two_pixels(times, count=20_000, guidance=0.0):
    """Mean and standard deviation of the unknown pixel when the other is 1."""
    y = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(count, 1, 1, 2)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    draws = _Fast(count)
    out = ed.edit(TwoPixels(), ed.known_pixels(mask), y, draws, times, clamp=False, guidance=guidance).image
    assert torch.equal(out[..., 0], y[..., 0])
    return out[..., 1].mean().item(), out[..., 1].std().item()


class _Fast(SampleStreams):
    """Many streams at once from one generator, for tests of distributions."""

    def __init__(self, count):
        self.count, self._generator = count, torch.Generator().manual_seed(5)

    def normal(self, shape):
        return torch.randn((self.count, *shape), generator=self._generator, dtype=torch.float64)


def test_the_oracle_on_the_karras_grid():
    # Closed form: mean .70777, sd .27236; the posterior itself has .9 and .21794.
    mean, sd = two_pixels(tuple(reversed(karras_grid(40)))[:-1])
    assert mean == pytest.approx(0.70777, abs=4 * 0.27236 / math.sqrt(20_000))
    assert sd == pytest.approx(0.27236, rel=4 / math.sqrt(2 * 20_000))


def test_known_pixels_come_back_to_the_bit_in_float_and_in_bytes():
    from cmtool.data.images import from_uint8, to_uint8

    original = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    y = from_uint8(original)
    out = ed.edit(Wave(), ed.known_pixels(mask), y, streams(4), TIMES[2], guidance=0.7).image
    known = (mask == 0).expand_as(y)
    assert torch.equal(out[known], y[known])
    assert torch.equal(to_uint8(out)[known], original[known])
    assert not torch.equal(out[~known], y[~known])


def test_soft_masks_blend_only_at_the_seam():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4], mask[..., 5:] = 0.5, 1.0
    y = torch.full((2, 3, 8, 8), 0.25)
    edited = ed.edit(Wave(), ed.known_pixels(mask), y, streams(2), TIMES[1])
    assert torch.equal(edited.image[..., :4], y[..., :4])
    torch.testing.assert_close(edited.image[..., 4], (edited.answer[..., 4] + 0.25) / 2)
    assert torch.equal(edited.image[..., 5:], edited.answer[..., 5:])


def test_stroke_editing_starts_from_the_guide_and_keeps_nothing_of_it():
    model = GaussianConsistency(shape=(3, 8, 8))
    guide = torch.full((2, 3, 8, 8), 0.5)
    seen = []
    spy = type(
        "Spy", (), {"sigma_min": 0.002, "__call__": lambda self, x, t, label=None: seen.append(x) or model(x, t)}
    )()
    out = ed.edit(spy, ed.nothing_known(), guide, streams(2), (5.38, 2.24))
    torch.testing.assert_close(seen[0], guide + 5.38 * streams(2).normal((3, 8, 8)))
    assert torch.equal(out.image, out.answer)
    assert len(seen) == 2


def test_the_start_is_the_known_part_plus_noise_of_the_first_time():
    seen = []
    spy = type("Spy", (), {"sigma_min": 0.002, "__call__": lambda self, x, t, label=None: seen.append(x) or x * 0})()
    y = torch.ones(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0] = 1
    ed.edit(spy, ed.known_pixels(mask), y, streams(1), (3.0,))
    torch.testing.assert_close(seen[0], y * (1 - mask) + 3 * streams(1).normal((1, 4, 4)))


def test_256_edits_in_one_batch_equal_256_single_ones():
    y = torch.rand(256, 1, 4, 4, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    model = GaussianConsistency()
    whole = ed.edit(model, ed.known_pixels(mask), y, streams(256), TIMES[2]).image
    single = [
        ed.edit(model, ed.known_pixels(mask), y[i : i + 1], streams(1, first=i), TIMES[2]).image for i in range(256)
    ]
    torch.testing.assert_close(whole, torch.cat(single), rtol=0, atol=1e-6)


def test_256_edits_of_a_network_in_one_batch_equal_256_single_ones(tmp_path):
    from cmtool.models import load
    from tests.cli.tiny import write_model

    # An exact f could not mix up rows; a network with normalization and attention could.
    model = load(write_model(tmp_path, num_classes=3))
    y = torch.rand(256, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    label = torch.arange(256) % 3
    whole = ed.edit(model, ed.known_luma(), y, streams(256), TIMES[2], label, guidance=0.5).image
    for i in range(256):
        row = slice(i, i + 1)
        single = ed.edit(model, ed.known_luma(), y[row], streams(1, first=i), TIMES[2], label[row], guidance=0.5).image
        torch.testing.assert_close(whole[row], single, rtol=0, atol=1e-4)


def test_the_best_of_several_candidates_is_kept_for_every_image():
    y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    operator, seeds = ed.known_pixels(mask), list(range(6))
    single = ed.edit(Wave(), operator, y, streams(6), TIMES[2])
    best = [ed.edit_best(Wave(), operator, y, seeds, TIMES[2], candidates=count) for count in (1, 4)]
    assert torch.equal(best[0].image, single.image)
    assert (best[1].residual <= single.residual).all()
    assert (best[1].residual < single.residual).any()
    # The residual is that of the answer that comes with it, and each image's choice depends on its own seed alone.
    torch.testing.assert_close(best[1].residual, operator.project(best[1].answer - y).square().flatten(1).mean(1))
    alone = ed.edit_best(Wave(), operator, y[2:3], seeds[2:3], TIMES[2], candidates=4)
    torch.testing.assert_close(alone.image, best[1].image[2:3])


def test_denoising_is_one_evaluation_without_added_noise():
    model = GaussianConsistency(s=0.5)
    noisy = torch.full((2, 1, 4, 4), 0.4)
    out = ed.denoise(model, noisy, 0.3)
    torch.testing.assert_close(out, torch.full_like(noisy, 0.4 * math.sqrt((0.25 + 4e-6) / (0.25 + 0.09))))
    assert model.calls == [pytest.approx(0.3)]


def test_bringing_into_range_keeps_luma_and_patch_means():
    g = torch.Generator().manual_seed(6)
    y = ed.luma_image(torch.rand(4, 3, 8, 8, generator=g, dtype=torch.float64) * 2 - 1)
    wild = ed.known_luma().replace(torch.rand(4, 3, 8, 8, generator=g, dtype=torch.float64) * 4 - 2, y)
    assert wild.abs().max() > 1
    legal = ed.into_range(wild, y, ed.by_pixel)
    assert legal.abs().max() <= 1 + 1e-12
    unit = ed.luma_vector(y)
    torch.testing.assert_close((legal * unit).sum(1), (y * unit).sum(1))

    flat = ed.repeat_patches(torch.rand(4, 3, 4, 4, generator=g, dtype=torch.float64) * 2 - 1, 2)
    wild = ed.known_patch_means(2).replace(torch.rand(4, 3, 8, 8, generator=g, dtype=torch.float64) * 4 - 2, flat)
    legal = ed.into_range(wild, flat, ed.by_patch(2))
    assert legal.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(ed.patch_means(legal, 2), ed.patch_means(flat, 2))


def test_what_is_in_range_already_is_left_alone():
    y = torch.zeros(1, 3, 4, 4)
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(7)) - 0.5
    torch.testing.assert_close(ed.into_range(x, y, ed.by_pixel), x)


def test_gray_is_its_own_luma():
    gray = torch.rand(1, 1, 4, 4, dtype=torch.float64).expand(1, 3, 4, 4)
    torch.testing.assert_close(ed.luma_image(gray), gray)
