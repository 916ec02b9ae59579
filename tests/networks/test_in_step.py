"""Both passes of a pair side by side: the answers and gradients of a tape, and no thread left behind."""

import copy
import threading

import pytest
import torch

from cmtool.config.networks import network_config
from cmtool.networks import build_network
from cmtool.networks.convolution import set_backward_dtype
from cmtool.networks.in_step import Race, in_step, on_tape
from tests.networks.test_tape import error, layer_and_points, plain

KINDS = {
    "adm": {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention": [4], "head_channels": 8},
    "dit": {"depth": 2, "channels": 16, "head_channels": 8, "patch": 2},
}


def networks(kind, dtype, half, moved=0.0):
    """A network whose zeros are filled, and another with weights `moved` from its own."""
    table = network_config(kind=kind, **KINDS[kind])
    network = build_network(table, channels=1, resolution=8, num_classes=None, seed=0).to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g, dtype=dtype))
        other = copy.deepcopy(network)
        for parameter in other.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=g, dtype=dtype))
    for one in (network, other):
        assert set_backward_dtype(one, half) > 3
    return network, other


def answers(way, first, second, x, near):
    """Prediction, target, and the gradients of the prediction's weights and input."""
    x, t = x.clone().requires_grad_(), torch.linspace(-0.5, 0.5, len(x), dtype=x.dtype)
    prediction, target = way(lambda: first(x, t), lambda: second(near, t - 0.01))
    assert not target.requires_grad
    given = [x, *(p for p in first.parameters() if p.requires_grad)]
    found = torch.autograd.grad(prediction.sin().sum(), given, allow_unused=True)
    return [prediction.detach(), target, *(gradient for gradient in found if gradient is not None)]


def points(dtype, distance=0.05):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 1, 8, 8, generator=g, dtype=dtype)
    return x, x + distance * torch.randn(x.shape, generator=g, dtype=dtype)


@pytest.mark.parametrize("moved", [0.0, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_answers_as_on_a_tape_gradients_included(kind, moved):
    """In float64, where nothing is rounded; with the same weights and with others."""
    first, second = networks(kind, torch.float64, torch.float64, moved)
    wanted, found = (answers(way, first, second, *points(torch.float64)) for way in (on_tape, in_step))
    assert len(wanted) == len(found) > 10
    for one, two in zip(wanted, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(found[1], second(points(torch.float64)[1], torch.linspace(-0.51, 0.49, 3).double()))


@pytest.mark.parametrize("method", ["__call__", "after_doubling"])
@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_a_difference_is_as_exact_as_on_a_tape(method, distance):
    layer, x, near = layer_and_points(distance)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    exact = plain(other, near, method) - plain(layer, x, method)
    y, after = in_step(lambda: getattr(layer, method)(x), lambda: getattr(other, method)(near))
    assert error(after - y.detach(), exact) < 4e-3
    assert 1e-3 < error(y.detach(), plain(layer, x, method)) < 4e-3


def test_gradients_of_a_whole_network_in_bfloat16_point_where_those_of_a_tape_do():
    first, second = networks("adm", torch.float32, torch.bfloat16, 1e-3)
    wanted, found = (answers(way, first, second, *points(torch.float32)) for way in (on_tape, in_step))
    flat = [torch.cat([gradient.flatten() for gradient in one[2:]]) for one in (wanted, found)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.999
    assert error(found[0] - found[1], wanted[0] - wanted[1]) < 3e-2


def failing(*_):
    raise ValueError("of the pass")


def test_a_pass_that_fails_ends_the_other():
    layer, x, near = layer_and_points(1e-3)
    for predict, reach in (
        (lambda: failing(layer(x)), lambda: layer(layer(near))),
        (lambda: layer(layer(x)), lambda: failing(layer(near))),
    ):
        before = threading.active_count()
        with pytest.raises(ValueError, match="of the pass"):
            in_step(predict, reach)
        assert threading.active_count() == before


def test_passes_with_unlike_convolutions_are_refused():
    layer, x, _ = layer_and_points(1e-3)
    for calls in ((2, 1), (1, 2)):
        once, twice = (lambda: layer(x)), (lambda: layer(layer(x)))
        with pytest.raises(RuntimeError, match="differ in their convolutions"):
            in_step(*((twice, once) if calls == (2, 1) else (once, twice)))


@pytest.mark.parametrize(("times", "won"), [((1.0, 2.0), True), ((2.0, 1.0), False)])
def test_the_faster_way_is_taken_from_then_on(times, won):
    layer, x, near = layer_and_points(1e-3)
    left = list(times)
    race = Race(lambda work: left.pop(0))
    for _ in range(2):
        y, after = race(lambda: layer(x), lambda: layer(near))
        assert y.requires_grad and not after.requires_grad
    assert race.won is won and not left


def test_what_does_not_agree_or_fit_is_not_taken(monkeypatch):
    layer, x, near = layer_and_points(1e-3)

    def far(predict, reach):
        return predict(), reach() + 1

    def large(predict, reach):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for other in (far, large):
        monkeypatch.setattr("cmtool.networks.in_step.in_step", other)
        race = Race(lambda work: 0.0)
        race(lambda: layer(x), lambda: layer(near))
        assert race.won is False
