"""Paths through noise, and images taken back to their noise."""

import math

import pytest
import torch

from cmtool.errors import UserError
from cmtool.samplers.interpolation import decode, dithered, encode, key_noise, path, slerp
from cmtool.samplers.times import solver_times
from tests.samplers.oracle import GaussianConsistency, GaussianDenoiser, streams


def test_slerp_of_right_angles_is_known():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for share in (0.0, 1 / 3, 0.5, 1.0):
        expected = torch.tensor([[math.cos(share * math.pi / 2), math.sin(share * math.pi / 2)]])
        torch.testing.assert_close(slerp(a, b, torch.tensor([share])), expected)


def test_slerp_keeps_the_length_and_takes_a_factor_out():
    a, b = key_noise((1, 2), (3, 8, 8))
    a, b = a[None], b[None] * (a.norm() / b.norm())
    middle = slerp(a, b, torch.tensor([0.3]))
    assert middle.norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    torch.testing.assert_close(slerp(80 * a, 80 * b, torch.tensor([0.3])), 80 * middle)


def test_parallel_and_opposite_vectors_give_finite_answers():
    a = torch.randn(1, 2, 2)
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.4])), a)
    assert torch.isfinite(slerp(a, -a, torch.tensor([0.4]))).all()


def test_a_path_passes_its_keys():
    keys = key_noise((1, 2, 3), (1, 4, 4))
    open_path = path(keys, 9)
    torch.testing.assert_close(open_path[[0, 4, 8]], keys)
    loop = path(keys, 9, loop=True)
    torch.testing.assert_close(loop[[0, 3, 6]], keys)
    # The loop closes: the frame after the last would be the first, so the last is one step short of it.
    torch.testing.assert_close(loop[8], slerp(keys[2:], keys[:1], torch.tensor([2 / 3]))[0])


@pytest.mark.parametrize(("keys", "num"), [(1, 5), (2, 1)])
def test_paths_too_short_are_refused(keys, num):
    with pytest.raises(UserError):
        path(key_noise(range(keys), (1, 2, 2)), num)


def test_key_noise_is_what_sample_uses():
    model = GaussianConsistency()
    from tests.samplers.oracle import sample_multistep

    torch.testing.assert_close(
        decode(model, key_noise((4, 9), (1, 4, 4)), (80.0,)),
        sample_multistep(model, _streams(4, 9), (80.0,), clamp=True),
    )


def _streams(*seeds):
    from cmtool.rng import SampleStreams

    return SampleStreams(seeds)


def test_later_evaluations_share_their_noise():
    noise = key_noise((1,), (1, 4, 4)).expand(3, 1, 4, 4)
    out = decode(GaussianConsistency(), noise, (80.0, 0.5))
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[1], out[2])


def test_encoding_nears_the_exact_noise_at_order_two():
    # x(T) = x(eps) sqrt((s^2 + T^2) / (s^2 + eps^2)) on the probability-flow ODE of Gaussian data.
    x0 = streams(1, dtype=torch.float64).normal((1, 4, 4)) * 0.5
    exact = x0 * math.sqrt((0.25 + 6400) / (0.25 + 0.002**2)) / 80
    errors = [(encode(GaussianDenoiser(), x0, solver_times(n)) - exact).abs().max().item() for n in (20, 80)]
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(2, abs=0.3)


def test_encode_then_decode_gives_the_image_back():
    x0 = streams(3, dtype=torch.float64).normal((1, 4, 4)) * 0.3
    noise = encode(GaussianDenoiser(), x0, solver_times(80))
    back = decode(GaussianConsistency(), noise, (80.0,), clamp=False)
    torch.testing.assert_close(back, x0, rtol=0.02, atol=1e-3)


def test_dither_is_noise_of_the_level_asked_for_and_repeats():
    x0 = torch.zeros(2, 1, 100, 100)
    noisy = dithered(x0, 0.01)
    assert noisy.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(noisy, dithered(x0, 0.01))
    assert not torch.equal(noisy[0], noisy[1])
