"""The Triton kernels, run by Triton's interpreter on the CPU, against float64: answers, gradients, and the choice."""

import os

import pytest
import torch
import torch.nn.functional as F

from cmtool.config.load import resolve
from cmtool.networks.build import build_network
from cmtool.networks.normalization import GroupNorm
from tests.networks.test_normalization import by_torch, drawn, layer_of

pytest.importorskip("triton")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture(scope="module")
def fused():
    """The module; without a GPU its kernels are interpreted (tests/conftest.py)."""
    from cmtool.networks import fused as module

    return module


def answers(work, inputs, incoming):
    y = work()
    return [y.detach(), *torch.autograd.grad(y, inputs, incoming.to(y.dtype))]


def check(fused, channels, group_channels, side, *, conditioned, silu, dtype=torch.float32, shift=2.0, batch=2, tol):
    """Compare one call with torch in float64 on the same (rounded) numbers; errors in units of each answer's size."""
    layer = layer_of(channels, group_channels, torch.float32).to(DEVICE)
    x, condition = (one.to(DEVICE) for one in drawn(channels, side, torch.float32, batch))
    x = (x - 2 + shift).to(dtype).detach().requires_grad_()
    condition = condition.to(dtype).detach().requires_grad_() if conditioned else None
    exact_layer = layer_of(channels, group_channels).to(DEVICE)
    exact_layer.load_state_dict(layer.state_dict())
    exact_x = x.detach().double().requires_grad_()
    exact_condition = condition.detach().double().requires_grad_() if conditioned else None
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    given = [x, *layer.parameters(), *([condition] if conditioned else [])]
    wanted = [exact_x, *exact_layer.parameters(), *([exact_condition] if conditioned else [])]

    def exactly():
        y = by_torch(exact_layer, exact_x, exact_condition)
        return F.silu(y) if silu else y

    ours = answers(lambda: fused._apply(layer, x, condition, silu), given, incoming)
    for one, two in zip(ours, answers(exactly, wanted, incoming), strict=True):
        assert (one.double() - two).abs().max() <= tol * two.abs().max()
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(("channels", "group_channels", "side"), [(12, 3, 5), (8, 4, 16), (6, 6, 3), (7, 1, 4)])
def test_answers_and_gradients_are_exact(fused, channels, group_channels, side, conditioned, silu):
    check(fused, channels, group_channels, side, conditioned=conditioned, silu=silu, tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_it_reads_and_writes(fused, dtype):
    check(fused, 12, 3, 5, conditioned=True, silu=True, dtype=dtype, tol=1e-2)


def test_a_mean_of_thirty_deviations_costs_no_digits(fused):
    """The images' deviation is 3; float32 itself keeps 90 to one part in ten million, three in a million of 3."""
    check(fused, 8, 4, 8, conditioned=False, silu=False, shift=90.0, tol=1e-5)


def kinds_of(preset: str) -> set[tuple[int, int, int]]:
    """(channels, groups, side) of every group normalization of a preset's network, without running it."""
    config, found = resolve(preset).config, set()
    with torch.device("meta"):
        data = config.data
        network = build_network(config.network, channels=data.channels, resolution=data.resolution)

    def look(module, inputs):
        found.add((module.num_channels, module.num_groups, inputs[0].shape[-1]))

    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(look)
    x = torch.zeros(1, data.channels, data.resolution, data.resolution, device="meta")
    network(x, torch.zeros(1, device="meta"), None, torch.zeros(1, device="meta") if network.two_time else None)
    return found


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("shapes64", "cifar10", "imagenet64")]


@pytest.mark.parametrize("preset", ["digits", "shapes", *LARGE])
def test_every_shape_of_the_presets(fused, preset):
    kinds = kinds_of(preset)
    assert kinds
    for channels, groups, side in sorted(kinds):
        check(fused, channels, channels // groups, side, conditioned=True, silu=True, batch=1, tol=1e-5)


def test_no_images_no_work(fused):
    layer = layer_of(8, 4, torch.float32).to(DEVICE)
    x = torch.zeros(0, 8, 4, 4, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    y = fused._apply(layer, x, None, True)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    assert not layer.weight.grad


def test_a_second_derivative_is_torchs(fused):
    layer = layer_of(4, 2, torch.float32).to(DEVICE)
    x = drawn(4, 3, torch.float32, 1)[0].to(DEVICE).requires_grad_()

    def penalty(y):
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    torch.testing.assert_close(
        penalty(fused._apply(layer, x, None, True)), penalty(F.silu(by_torch(layer, x, None))), rtol=1e-4, atol=1e-4
    )


def test_kernels_are_taken_only_if_they_agree_and_are_faster(fused, monkeypatch):
    layer = layer_of(8, 4, torch.float32).to(DEVICE)
    x, condition = (one.to(DEVICE) for one in drawn(8, 4, torch.float32))
    ours_first, theirs_first = iter([1.0, 2.0]), iter([2.0, 1.0])
    assert fused.wins(layer, x, condition, True, lambda work: next(ours_first))
    assert not fused.wins(layer, x, condition, True, lambda work: next(theirs_first))
    right = fused._apply
    monkeypatch.setattr(fused, "_apply", lambda *call: right(*call) * 1.01)
    assert not fused.wins(layer, x, condition, True, lambda work: pytest.fail("wrong answers are not timed"))


def test_a_network_uses_them_only_on_a_gpu_and_only_when_asked(fused):
    layer = layer_of(8, 4, torch.float32)
    x, condition = drawn(8, 4, torch.float32)
    plain = layer(x, condition, silu=True)
    assert layer.fused is None
    fused.use(layer)
    assert layer.fused is not None
    assert torch.equal(layer(x, condition, silu=True), plain)  # on the CPU: torch, or our sums
