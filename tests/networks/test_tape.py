"""Two convolutions that share their rounding: what is exact about the difference, and when nothing is rounded."""

import pytest
import torch

from cmtool.networks.convolution import Conv2d, Tape
from cmtool.training.precision import has_fast_bf16

BF16 = torch.bfloat16
# Eight bits: weights, inputs and the answer are each off by up to .002. Processors without bfloat16 round once more.
HALF = 4e-3 if has_fast_bf16(torch.device("cpu")) else 5e-3


def layer_and_points(distance: float, seed: int = 0) -> tuple[Conv2d, torch.Tensor, torch.Tensor]:
    """A convolution in a half, and two inputs (2, 8, 6, 6) that are `distance` apart."""
    g = torch.Generator().manual_seed(seed)
    layer = Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    layer.backward_dtype = BF16
    x = torch.randn(2, 8, 6, 6, generator=g)
    return layer, x, x + distance * torch.randn(x.shape, generator=g)


def both(first, second, x, near, method="__call__"):
    """Answers of the first pass at x and of the second at `near`."""
    tape = Tape()
    with tape.writing():
        y = getattr(first, method)(x)
    with torch.no_grad(), tape.reading():
        after = getattr(second, method)(near)
    assert not tape.notes
    return y.detach(), after


def plain(layer, x, method="__call__"):
    with torch.no_grad():
        return getattr(layer, method)(x)


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", ["__call__", "after_doubling"])
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-3])
def test_a_difference_is_as_exact_as_a_half_however_small_it_is(method, distance):
    layer, x, near = layer_and_points(distance)
    y, after = both(layer, layer, x, near, method)
    exact = plain(layer, near, method) - plain(layer, x, method)
    assert error(after - y, exact) < HALF
    # Rounded on its own the first answer is wrong by more than the whole of a small difference.
    assert 1e-3 < error(y, plain(layer, x, method)) < HALF


@pytest.mark.parametrize("method", ["__call__", "after_doubling"])
def test_the_difference_counts_other_weights_and_another_bias(method):
    layer, x, near = layer_and_points(1e-3)
    other = layer_and_points(0.0)[0]
    with torch.no_grad():
        g = torch.Generator().manual_seed(9)
        for parameter in other.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=g))
    y, after = both(layer, other, x, near, method)
    assert error(after - y, plain(other, near, method) - plain(layer, x, method)) < HALF


def test_another_bias_alone_counts():
    layer, x, _ = layer_and_points(0.0)
    other = layer_and_points(0.0)[0]
    with torch.no_grad():
        other.bias += 1.0
    y, after = both(layer, other, x, x)
    torch.testing.assert_close(after - y, torch.ones_like(y), rtol=0, atol=1e-5)


def test_equal_points_have_equal_answers():
    layer, x, _ = layer_and_points(0.0)
    y, after = both(layer, layer, x, x.clone())
    assert torch.equal(y, after)


def test_without_a_tape_forward_passes_are_exact():
    layer, x, _ = layer_and_points(0.0)
    with_gradients = layer(x).detach()
    layer.backward_dtype = None
    torch.testing.assert_close(with_gradients, plain(layer, x), rtol=0, atol=1e-5)


def test_the_first_pass_has_the_gradients_of_the_convolution():
    layer, x, _ = layer_and_points(0.0)
    answers = []
    for dtype in (None, BF16):
        layer.backward_dtype = dtype
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        with Tape().writing():
            layer(inputs).sin().sum().backward()
        answers.append((inputs.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for found, exact in zip(answers[1], answers[0], strict=True):
        assert found.dtype == torch.float32
        assert error(found, exact) < 3e-2
