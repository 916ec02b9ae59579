"""The transformer: what its settings become, its parts by hand, and that a second time is learned from nothing."""

import pytest
import torch
from torch.nn import functional

from cmtool.config.load import resolve
from cmtool.config.networks import network_config
from cmtool.errors import ConfigError
from cmtool.models import build_model
from cmtool.networks import build_network
from cmtool.networks.convolution import Linear, Tape, set_backward_dtype
from cmtool.networks.dit import Attention, FeedForward, rotary_angles, sincos_positions, turned
from cmtool.training.setup import start_from
from tests.networks.network_helpers import inputs, redraw

DIT = {"kind": "dit", "patch": 2, "width": 32, "depth": 2, "heads": 4}
NEWER = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "qk_norm": True}


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("shapes", {"patch": 2, "width": 64, "depth": 11, "heads": 2}),
        ("imagenet64", {"patch": 4, "width": 768, "depth": 30, "heads": 12}),
        ("cifar10", {"patch": 2, "width": 256, "depth": 29, "heads": 4}),
        ("toy2d", {"patch": 1, "width": 128, "depth": 3, "heads": 2}),
    ],
)
def test_in_place_of_a_preset_s_network_it_is_as_wide_and_as_deep(preset, sizes):
    table = resolve(preset, sets=["network.kind=dit"]).config.network
    side = resolve(preset).config.data.resolution
    found = {"patch": table.patch_for(side), "width": table.width, "depth": table.depth, "heads": table.heads}
    assert found == sizes
    assert network_config(**table.model_dump()) == table
    assert "channels" not in table.model_dump() and "num_blocks" not in table.model_dump()


def test_about_as_many_parameters_as_the_network_that_it_replaces():
    for preset in ("shapes", "cifar10"):
        counts = []
        for sets in ([], ["network.kind=dit"]):
            config = resolve(preset, sets=sets).config
            with torch.device("meta"):
                built = build_network(config.network, channels=3, resolution=config.data.resolution, num_classes=10)
            counts.append(sum(parameter.numel() for parameter in built.parameters()))
        assert 0.4 < counts[1] / counts[0] < 2.5, preset


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["network.patch=3"], "network.patch = 3 does not divide data.resolution = 16: choose 1, 2, 4, 8, 16"),
        (["network.heads=5"], "network.heads = 5 does not divide network.width = 64"),
        (["network.width=66", "network.heads=2"], "needs a network.width divisible by 4, not 66"),
        (
            ["network.width=60", "network.heads=6", "network.positions=rotary"],
            "needs heads of a width divisible by 4, not 10",
        ),
        (["network.norm=batch"], "network.norm"),
    ],
)
def test_settings_that_do_not_fit_are_named(sets, words):
    with pytest.raises(ConfigError, match=words):
        resolve("shapes", sets=["network.kind=dit", *sets])


def test_sizes_that_are_said_are_kept():
    table = resolve("shapes", sets=["network.kind=dit", "network.width=96", "network.depth=3"]).config.network
    assert (table.width, table.depth, table.heads) == (96, 3, 3)


def test_positions_by_hand():
    found = sincos_positions(2, 3, 8)[0]
    row, column = torch.tensor(1.0), torch.tensor(2.0)
    expected = [part(place * freq) for place in (column, row) for part in (torch.sin, torch.cos) for freq in (1, 0.01)]
    torch.testing.assert_close(found[5], torch.stack(expected))


def test_scores_of_rotary_positions_depend_on_distances_alone():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = rotary_angles(5, 6, 16, q)
    at = [turned(part.expand(30, 16), angles) for part in (q, k)]
    scores = (at[0] @ at[1].T).view(5, 6, 5, 6)
    assert scores.std() > 0.1
    torch.testing.assert_close(scores[3, 4, 1, 2], scores[2, 3, 0, 1])
    torch.testing.assert_close(scores[0, 5, 1, 0], scores[3, 5, 4, 0])
    assert (scores[3, 4, 1, 2] - scores[1, 2, 3, 4]).abs() > 1e-3
    torch.testing.assert_close(at[0].norm(dim=1), q.norm().expand(30))


def test_attention_with_normalized_queries_by_hand():
    torch.manual_seed(0)
    layer = Attention(network_config(**DIT | NEWER)).double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 6, 3, 4, 8).unbind(2)
    q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    cos, sin = rotary_angles(2, 3, 8, x)
    q, k = (torch.cat([a * cos[:, None, :4] - b * sin[:, None, :4], b * cos[:, None, :4] + a * sin[:, None, :4]], -1)
            for a, b in (q.split(4, -1), k.split(4, -1)))  # fmt: skip
    weights = torch.einsum("bshd,bthd->bhst", q, k).div(8**0.5).softmax(-1)
    expected = functional.linear(
        torch.einsum("bhst,bthd->bshd", weights, v).flatten(2), layer.proj.weight, layer.proj.bias
    )
    torch.testing.assert_close(layer(x, (2, 3)), expected)


def test_the_first_output_is_zero_and_so_is_every_branch():
    network = build_network(network_config(**DIT), channels=3, resolution=8, num_classes=2)
    x, c, label, _ = inputs(network, dtype=torch.float32)
    assert network(x, c, label).abs().max() == 0
    tokens = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.blocks[0](tokens, torch.randn(2, 32), (4, 4)), tokens)


def test_a_one_time_network_starts_a_two_time_one():
    header = {
        "kind": "diffusion",
        "network": network_config(**DIT).model_dump(),
        "process": {"parameterization": "flow"},
        "data": {"resolution": 8, "channels": 3, "num_classes": 4},
    }
    one = build_model(header)
    redraw(one.network)
    two = build_model({**header, "network": {**header["network"], "two_time": True}})
    start_from(two, one)
    x, _, label, _ = inputs(one.network, dtype=torch.float32)
    t = torch.tensor([0.01, 1.0, 60.0])
    expected = one(x, t, label)
    assert expected.std() > 0.3
    torch.testing.assert_close(two(x, t, label, t / 2), expected)


def test_other_sides_get_positions_of_their_own():
    network = redraw(build_network(network_config(**DIT), channels=1, resolution=8)).double()
    x, c = torch.randn(2, 1, 12, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    wide = build_network(network_config(**DIT), channels=1, resolution=4).double()
    assert network(x, c).shape == x.shape
    names = {name: value for name, value in network.state_dict().items() if name != "pos_embed"}
    wide.load_state_dict(names, strict=False)
    torch.testing.assert_close(network(x[..., :4, :], c), wide(x[..., :4, :], c))


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for on in (False, True):
        table = network_config(**DIT, checkpointing=on, dropout=0.3)
        network = redraw(build_network(table, channels=3, resolution=8, num_classes=4)).train()
        x, c, label, _ = inputs(network, dtype=torch.float32)
        torch.manual_seed(0)
        network(x, c, label).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_linear_layers_round_their_gradients_alone_and_pairs_their_difference():
    torch.manual_seed(0)
    layer, other = Linear(64, 48), Linear(64, 48)
    x, step = torch.randn(4, 10, 64), 1e-3 * torch.randn(4, 10, 64)
    exact = layer(x)
    (by_weight,) = torch.autograd.grad(exact.sin().sum(), [layer.weight])
    layer.backward_dtype = torch.bfloat16
    half = layer(x)
    assert torch.equal(half, exact) or (half - exact).abs().max() < 1e-5
    (rounded,) = torch.autograd.grad(half.sin().sum(), [layer.weight])
    assert 1e-4 < (rounded - by_weight).norm() / by_weight.norm() < 1e-2
    tape = Tape()
    with tape.writing():
        first = layer(x)
    with torch.no_grad(), tape.reading():
        second = layer(x + step)
    assert (first - exact).abs().max() > 1e-3
    true = functional.linear(step, layer.weight)
    assert ((second - first) - true).norm() / true.norm() < 1e-2
    assert other.backward_dtype is None


def test_only_the_inner_layers_are_rounded():
    network = build_network(network_config(**DIT), channels=3, resolution=8, num_classes=4)
    assert set_backward_dtype(network, torch.bfloat16) == 4 * 2


@pytest.mark.parametrize(("mlp", "least", "most"), [("gelu_erf", 0.0, 1e-6), ("gelu", 1e-4, 5e-4)])
def test_the_exact_gelu_is_x_times_the_normal_law_and_that_of_dit_is_not_quite(mlp, least, most):
    layer = FeedForward(network_config(**DIT | {"mlp": mlp, "mlp_ratio": 1.0}))
    for linear in (layer.fc1, layer.fc2):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.linspace(-6, 6, 3200).reshape(1, 100, 32)
    apart = float((layer(x) - x * torch.special.ndtr(x)).detach().abs().max())
    assert least <= apart <= most


def test_an_input_gate_starts_as_nothing_and_scales_and_shifts_the_tokens_by_the_level():
    def built(**more):
        torch.manual_seed(0)
        return build_network(network_config(**DIT, **more), channels=3, resolution=8, num_classes=None)

    plain, gated = redraw(built()), built(input_gate=True)
    gated.load_state_dict(plain.state_dict(), strict=False)
    x, c = torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 1.0])
    assert torch.equal(gated(x, c, None), plain(x, c, None))
    linear = gated.input_gate[1]
    with torch.no_grad():
        linear.bias[: DIT["width"]], linear.bias[DIT["width"] :] = 0.25, -1.0
    closed = gated(x, c, None)  # nothing of the picture is left, in any network of the level alone
    assert torch.equal(closed, gated(torch.randn(2, 3, 8, 8), c, None))
    with torch.no_grad():
        linear.bias[: DIT["width"]], linear.bias[DIT["width"] :] = 0.0, 1.0
        plain.x_embedder.proj.weight *= 2
        plain.x_embedder.proj.bias *= 2
    torch.testing.assert_close(gated(x, c, None), plain(x, c, None))
