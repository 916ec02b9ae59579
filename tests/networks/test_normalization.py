"""Group normalization by channels answers as torch's own does, in every form, and leaves to it what it cannot do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmtool.networks.normalization import GroupNorm


def drawn(channels: int, side: int, dtype: torch.dtype = torch.float64, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Images off zero, channels last, and a condition."""
    g = torch.Generator().manual_seed(11)
    x = 2 + 3 * torch.randn(batch, channels, side, side, generator=g, dtype=torch.float64)
    condition = torch.randn(batch, 2 * channels, 1, 1, generator=g, dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last), condition.to(dtype)


def layer_of(channels: int, group_channels: int, dtype: torch.dtype = torch.float64) -> GroupNorm:
    layer = GroupNorm(channels, group_channels)
    g = torch.Generator().manual_seed(12)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels, generator=g))
        layer.bias.copy_(torch.randn(channels, generator=g))
    return layer.to(dtype)


def by_torch(layer: GroupNorm, x: Tensor, condition: Tensor | None) -> Tensor:
    y = F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    if condition is None:
        return y
    scale, shift = condition.chunk(2, 1)
    return shift + y * (1 + scale)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(("channels", "group_channels", "side"), [(12, 3, 5), (64, 1, 8), (8, 1, 32), (6, 6, 4)])
def test_answer_and_gradients_are_those_of_torch(channels, group_channels, side, conditioned):
    """By our sums below 1,024 pixels, by torch's kernel and our backward pass from there on."""
    layer = layer_of(channels, group_channels)
    x, condition = drawn(channels, side)
    assert layer._ours_pays(x, condition if conditioned else None)
    inputs = [x.requires_grad_(), *layer.parameters(), *([condition.requires_grad_()] if conditioned else [])]
    ours, theirs = layer(x, condition if conditioned else None), by_torch(layer, x, condition if conditioned else None)
    assert "Normalize" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    incoming = torch.randn(ours.shape, generator=torch.Generator().manual_seed(13), dtype=x.dtype)
    for one, two in zip(
        torch.autograd.grad(ours, inputs, incoming), torch.autograd.grad(theirs, inputs, incoming), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("conditioned", [False, True])
def test_gradients_are_the_slopes(conditioned):
    layer = layer_of(8, 2)
    x, condition = drawn(8, 3, batch=2)
    given = (x.requires_grad_(), condition.requires_grad_()) if conditioned else (x.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda *inputs: layer(*inputs), given)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("conditioned", [False, True])
def test_in_float32_it_is_as_exact_as_torch(side, conditioned):
    layer = layer_of(64, 1, torch.float32)
    x, condition = drawn(64, side, torch.float32)
    given = condition if conditioned else None
    exact = by_torch(layer_of(64, 1), x.double(), None if given is None else given.double())
    torch.testing.assert_close(layer(x, given).double(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", [8, 32])
def test_gradients_of_halves_are_added_up_in_float32(side):
    layer, wide = layer_of(64, 1, torch.float32), layer_of(64, 1)
    x, condition = drawn(64, side, torch.bfloat16, batch=8)
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(14)).bfloat16()
    given = [x.requires_grad_(), *layer.parameters(), condition.requires_grad_()]
    found = torch.autograd.grad(layer(x, condition), given, incoming)
    widened = [t.detach().double().requires_grad_() for t in (x, condition)]
    exact = torch.autograd.grad(
        by_torch(wide, *widened), [widened[0], *wide.parameters(), widened[1]], incoming.double()
    )
    for one, two in zip(found, exact, strict=True):
        cosine = F.cosine_similarity(one.double().flatten(), two.flatten(), dim=0)
        assert cosine > 1 - 1e-4, cosine
        assert one.dtype == (torch.float32 if one.ndim == 1 else torch.bfloat16)


def test_a_float_condition_of_halves_is_not_rounded():
    layer = layer_of(64, 1, torch.float32)
    x, condition = drawn(64, 8, torch.bfloat16)
    assert layer(x, condition.float()).dtype == torch.float32
    assert layer(x, condition).dtype == torch.bfloat16


def test_forward_derivatives_and_transforms_are_torch_s():
    layer = layer_of(12, 3)
    x, condition = drawn(12, 5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(15), dtype=x.dtype)
    _, slope = torch.func.jvp(lambda moved: layer(moved, condition), (x,), (direction,))
    h = 1e-6
    central = (layer(x + h * direction, condition) - layer(x - h * direction, condition)) / (2 * h)
    torch.testing.assert_close(slope, central, rtol=1e-6, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(layer(dual, condition)).tangent, slope)


def test_second_derivatives_of_a_forward_derivative_are_there():
    """Continuous-time recipes without a stop-gradient go backward through a forward derivative."""
    layer = layer_of(12, 3)
    x, _ = drawn(12, 5)
    direction = torch.ones_like(x)
    _, slope = torch.func.jvp(layer, (x.requires_grad_(),), (direction,))
    (found,) = torch.autograd.grad(slope.square().sum(), layer.weight)
    _, doubled = torch.func.jvp(
        lambda moved: by_torch(layer, moved, None), (x.contiguous(),), (direction.contiguous(),)
    )
    (wanted,) = torch.autograd.grad(doubled.square().sum(), layer.weight)
    torch.testing.assert_close(found, wanted)
    assert wanted.isfinite().all()


def test_other_layouts_and_traces_are_torch_s():
    layer = layer_of(12, 3)
    x, condition = drawn(12, 5)
    assert not layer._ours_pays(x.contiguous(), condition)
    assert not layer._ours_pays(x.flatten(2), None)
    torch.testing.assert_close(layer(x.contiguous(), condition), layer(x, condition), rtol=1e-12, atol=1e-12)
    traced = torch.jit.trace(layer.requires_grad_(False), (x, condition))
    assert "PythonOp" not in str(traced.graph) and "_Normalize" not in str(traced.graph)


@pytest.mark.parametrize(("channels", "side"), [(64, 8), (256, 16), (512, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_is_normalized_alike_in_every_batch(channels, side, dtype):
    layer = layer_of(channels, 1, torch.float32)
    x, condition = drawn(channels, side, dtype, batch=17)
    whole = layer(x, condition)
    parts = torch.cat([layer(x[row : row + 1], condition[row : row + 1]) for row in range(17)])
    assert torch.equal(whole, parts)


def test_a_mean_far_from_zero_costs_no_digits():
    """Below 1,024 pixels, where the sums are ours: the mean is taken off before squares are."""
    layer = layer_of(64, 1, torch.float32)
    x = 300 + 3 * drawn(64, 16, torch.float32)[0]
    exact = by_torch(layer_of(64, 1), x.double(), None)
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("side", [3, 32])
def test_derivatives_of_the_gradient_are_torch_s(side):
    layer = layer_of(4, 1)
    x, condition = drawn(4, side, batch=1)
    given = (x.requires_grad_(), condition.requires_grad_())
    if side == 3:
        assert torch.autograd.gradgradcheck(lambda *inputs: layer(*inputs), given)
    v = torch.ones_like(x)
    _, found = torch.autograd.functional.hvp(lambda image: layer(image, condition).pow(3).sum(), x, v)
    _, wanted = torch.autograd.functional.hvp(lambda image: by_torch(layer, image, condition).pow(3).sum(), x, v)
    torch.testing.assert_close(found, wanted)
    assert found.abs().max() > 0


def test_many_gradients_and_many_inputs_at_once_are_torch_s():
    layer = layer_of(12, 3)
    x, condition = drawn(12, 3)
    many = torch.stack([x, x + 1])
    torch.testing.assert_close(
        torch.vmap(lambda image: layer(image, condition))(many),
        torch.stack([layer(x, condition), layer(x + 1, condition)]),
    )
    y = layer(x.requires_grad_(), condition)
    incoming = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    (found,) = torch.autograd.grad(y, x, incoming, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(y, x, incoming[0])
    torch.testing.assert_close(found, torch.stack([one, 2 * one]), atol=1e-9, rtol=1e-9)


def test_what_follows_may_be_done_in_place():
    layer = layer_of(12, 3)
    x, _ = drawn(12, 5)
    for side in (5, 32):
        x, _ = drawn(12, side)
        F.silu(layer(x.requires_grad_()), inplace=True).sum().backward()
        assert x.grad is not None
