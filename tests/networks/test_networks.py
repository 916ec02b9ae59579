"""What every network must do: derivatives, labels, independence of images in a batch, and clear refusals."""

import math

import pytest
import torch
from torch.nn import functional

from cmtool.config.networks import network_config
from cmtool.errors import ConfigError, UserError
from cmtool.networks import adm, build_network, dit, edm2, mlp, set_attention_kernel, song
from cmtool.networks.blocks import FourierFeatures, attention, positional_features
from cmtool.networks.convolution import Conv2d, Tape, hold_in, set_backward_dtype
from cmtool.networks.normalization import GroupNorm
from tests.networks.network_helpers import inputs, redraw

ADM = network_config(channels=16, channel_mult=(1, 2), attention=(4,), head_channels=8)
SONG = network_config(
    kind="song", channels=16, channel_mult=(1, 2), attention=(4,), scale_shift=False, group_channels=4
)
BLOCKS = (adm.ResBlock, song.SongBlock, edm2.MpBlock, mlp.ResidualLayer, dit.Block)
NCSNPP = {"embedding": "fourier", "fourier_scale": 1.0, "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
EDM2 = network_config(kind="edm2", channels=16, channel_mult=(1, 2), attention=(4,), head_channels=8)
DIT = network_config(kind="dit", patch=2, width=32, depth=2, heads=4)
NEWER = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "qk_norm": True}
CASES = {
    "adm": (ADM, 1, 8, 10),
    "adm-additive": (
        ADM.model_copy(update={"scale_shift": False, "num_blocks": (1, 2), "group_channels": 4}),
        3,
        8,
        None,
    ),
    "adm-two-time": (
        ADM.model_copy(update={"two_time": True, "log_variance": True, "embedding": "fourier", "fourier_scale": 1.0}),
        1,
        8,
        3,
    ),
    "ddpm++": (SONG, 3, 8, 4),
    "ncsn++": (SONG.model_copy(update=NCSNPP | {"two_time": True, "num_blocks": (1, 2)}), 1, 8, None),
    "edm2": (EDM2, 3, 8, 4),
    "edm2-two-time": (
        EDM2.model_copy(update={"two_time": True, "log_variance": True, "num_blocks": (2, 1)}),
        1,
        8,
        None,
    ),
    "dit": (DIT, 3, 8, 4),
    "dit-two-time": (DIT.model_copy(update=NEWER | {"two_time": True, "log_variance": True}), 1, 8, None),
    "mlp": (network_config(kind="mlp", channels=32, num_blocks=2), 2, 1, 4),
    "mlp-two-time": (
        network_config(kind="mlp", channels=32, num_blocks=1, two_time=True, scale_shift=False),
        1,
        4,
        None,
    ),
}


@pytest.fixture(params=list(CASES))
def network(request):
    config, channels, resolution, classes = CASES[request.param]
    built = build_network(config, channels=channels, resolution=resolution, num_classes=classes)
    return redraw(built).double().eval()


def test_forward_mode_derivative_equals_a_central_difference(network):
    set_attention_kernel(network, "math")
    x, c, label, r = inputs(network)
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    dc = torch.full_like(c, 0.7)

    def along(eps):
        return network(x + eps * dx, c + eps * dc, label, r)

    value, slope = torch.func.jvp(lambda a, b: network(a, b, label, r), (x, c), (dx, dc))
    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    assert value.std() > 0.3
    assert slope.abs().max() > 0.1
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-6)


def test_the_fused_kernel_falls_back_inside_a_forward_mode_derivative(network):
    x, c, label, r = inputs(network)
    tangents = (torch.ones_like(x), torch.zeros_like(c))
    fused = torch.func.jvp(lambda a, b: network(a, b, label, r), (x, c), tangents)
    set_attention_kernel(network, "math")
    explicit = torch.func.jvp(lambda a, b: network(a, b, label, r), (x, c), tangents)
    torch.testing.assert_close(fused, explicit, rtol=1e-10, atol=1e-10)


def test_an_image_does_not_see_the_rest_of_its_batch(network):
    x, c, label, r = inputs(network)
    whole = network(x, c, label, r)
    for row in range(len(x)):
        part = slice(row, row + 1)
        alone = network(x[part], c[part], None if label is None else label[part], None if r is None else r[part])
        torch.testing.assert_close(alone, whole[part], rtol=1e-9, atol=1e-9)


def test_every_input_matters(network):
    x, c, label, r = inputs(network)
    base = network(x, c, label, r)
    assert (network(x + 0.1, c, label, r) - base).abs().max() > 1e-2
    assert (network(x, c + 0.3, label, r) - base).abs().max() > 1e-3
    if label is not None:
        assert (network(x, c, (label + 1) % network.num_classes, r) - base).abs().max() > 1e-3
    if r is not None:
        assert (network(x, c, label, r + 0.3) - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_minus_one_and_no_label_are_the_null_class(name):
    config, channels, resolution, classes = CASES[name]
    network = (
        redraw(build_network(config, channels=channels, resolution=resolution, num_classes=classes)).double().eval()
    )
    x, c, label, r = inputs(network)
    without = network(x, c, None, r)
    torch.testing.assert_close(network(x, c, torch.full_like(label, -1), r), without)
    mixed = label.clone()
    mixed[0] = -1
    torch.testing.assert_close(network(x, c, mixed, r)[0], without[0])
    torch.testing.assert_close(network(x, c, mixed, r)[1:], network(x, c, label, r)[1:])


def test_half_precision_weights_stay_close_and_keep_the_input_dtype(network):
    x, c, label, r = inputs(network, dtype=torch.float32)
    exact = network(x.double(), c.double(), label, None if r is None else r.double())
    half = network.to(torch.bfloat16)(x, c, label, r)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() / exact.std() < 0.25


def test_the_first_output_is_zero_and_seeds_decide_the_weights():
    config, channels, resolution, classes = CASES["adm"]
    sizes = {"channels": channels, "resolution": resolution, "num_classes": classes}
    torch.manual_seed(3)
    one, same, other = (build_network(config, seed=seed, **sizes) for seed in (0, 0, 1))
    x, c, label, _ = inputs(one, dtype=torch.float32)
    assert one(x, c, label).abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.input_blocks[0][0].weight, other.input_blocks[0][0].weight)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)), "building a network must leave the global generator alone"


def test_a_second_time_changes_nothing_before_it_is_learned():
    config, *_ = CASES["adm"]
    plain = redraw(build_network(config, channels=1, resolution=8, num_classes=10))
    double = build_network(config.model_copy(update={"two_time": True}), channels=1, resolution=8, num_classes=10)
    absent = double.load_state_dict(plain.state_dict(), strict=False)
    assert [name.split(".")[0] for name in absent.missing_keys] == ["time_embed_r"] * 4
    x, c, label, _ = inputs(plain, dtype=torch.float32)
    torch.testing.assert_close(double(x, c, label, c - 1), plain(x, c, label))


def test_any_side_that_the_down_sampling_divides():
    network = redraw(build_network(ADM, channels=1, resolution=8, num_classes=None)).double()
    for height, width in ((8, 12), (2, 2), (14, 6)):
        x = torch.randn(2, 1, height, width, dtype=torch.float64)
        assert network(x, torch.zeros(2, dtype=torch.float64)).shape == x.shape


def test_recomputing_activations_changes_no_gradient():
    config, channels, resolution, classes = CASES["adm"]
    gradients = []
    for on in (False, True):
        made = config.model_copy(update={"checkpointing": on, "dropout": 0.3})
        network = redraw(build_network(made, channels=channels, resolution=resolution, num_classes=classes)).train()
        x, c, label, _ = inputs(network, dtype=torch.float32)
        torch.manual_seed(0)
        network(x, c, label).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_dropout_acts_in_training_mode_only():
    network = redraw(
        build_network(ADM.model_copy(update={"dropout": (0.0, 0.5)}), channels=1, resolution=8, num_classes=None)
    )
    x, c, *_ = inputs(network, dtype=torch.float32)
    torch.manual_seed(0)
    assert not torch.equal(network.train()(x, c), network(x, c))
    assert torch.equal(network.eval()(x, c), network(x, c))


def test_both_attention_kernels_agree():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) / 8**0.5
    by_hand = torch.einsum("bhst,bhtd->bhsd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)
    for kernel in ("auto", "math"):
        torch.testing.assert_close(attention(q, k, v, kernel), by_hand)


def test_positional_features_by_hand():
    features = positional_features(torch.tensor([250.0 * -1.0], dtype=torch.float64), 4)
    expected = torch.tensor([[-250.0, -2.5]], dtype=torch.float64)
    torch.testing.assert_close(features, torch.cat([expected.cos(), expected.sin()], dim=1))


@pytest.mark.parametrize(
    ("channels", "group_channels", "groups"),
    [(192, 1, 32), (192, 4, 32), (32, 1, 32), (32, 4, 8), (48, 1, 16), (6, 1, 6), (3, 4, 1)],
)
def test_group_counts(channels, group_channels, groups):
    assert GroupNorm(channels, group_channels).num_groups == groups


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, "shape \\(B, 1, H, W\\)"),
        ({"x": torch.zeros(2, 1, 8, 7)}, "multiples of 2"),
        ({"c": torch.zeros(3)}, "one noise level an image"),
        ({"label": torch.tensor([0])}, "one label an image"),
        ({"label": torch.tensor([0, 10])}, "label 10 is outside 0..9"),
        ({"r": torch.zeros(2)}, "takes no second time"),
    ],
)
def test_wrong_inputs_are_named(change, words):
    network = build_network(ADM, channels=1, resolution=8, num_classes=10)
    given = {"x": torch.zeros(2, 1, 8, 8), "c": torch.zeros(2), "label": None, "r": None} | change
    with pytest.raises(UserError, match=words):
        network(given["x"], given["c"], given["label"], given["r"])


def test_an_unknown_label_is_named_by_every_conditional_kind():
    for name in ("adm", "ddpm++", "edm2", "mlp"):
        config, channels, resolution, classes = CASES[name]
        network = build_network(config, channels=channels, resolution=resolution, num_classes=classes)
        x, c, label, r = inputs(network, dtype=torch.float32)
        with pytest.raises(UserError, match=f"label {classes} is outside 0..{classes - 1}"):
            network(x, c, torch.full_like(label, classes), r)


def test_labels_for_an_unconditional_network_and_a_missing_second_time_are_refused():
    network = build_network(ADM, channels=1, resolution=8, num_classes=None)
    with pytest.raises(UserError, match="knows no labels"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    two_time = build_network(ADM.model_copy(update={"two_time": True}), channels=1, resolution=8, num_classes=None)
    with pytest.raises(UserError, match="needs a second time"):
        two_time(torch.zeros(1, 1, 8, 8), torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "resolution", "words"),
    [
        ({"channel_mult": (1, 2, 2)}, 10, "multiple of 4"),
        ({"num_blocks": (1, 2, 3)}, 8, "num_blocks has 3 values"),
        ({"head_channels": 12}, 8, "does not divide"),
        ({"kind": "song", "channel_mult": (1, 2, 2)}, 10, "multiple of 4"),
        ({"kind": "song", "resample_filter": (1, 2, 1)}, 8, "even number of taps"),
        ({"kind": "mlp", "num_blocks": (1, 1)}, 8, "an mlp has no levels"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, resolution, words):
    with pytest.raises(ConfigError, match=words):
        build_network(network_config(**(ADM.model_dump() | change)), channels=1, resolution=resolution)


def test_an_mlp_takes_its_own_side_only():
    network = build_network(CASES["mlp-two-time"][0], channels=1, resolution=4)
    with pytest.raises(UserError, match="4x4 images"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1), None, torch.zeros(1))


def test_log_variance_starts_at_zero_and_is_refused_without_a_head():
    config, channels, resolution, classes = CASES["adm-two-time"]
    network = build_network(config, channels=channels, resolution=resolution, num_classes=classes)
    assert torch.equal(network.log_variance(torch.linspace(-1, 1, 5)), torch.zeros(5))
    with pytest.raises(ConfigError, match="log_variance"):
        build_network(ADM, channels=1, resolution=8).log_variance(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_convolution_after_doubling_is_that_of_the_enlarged_image(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    layer = Conv2d(6, 5, 3, padding=1).to(dtype)
    x = torch.randn(3, 6, 4, 6, dtype=dtype, generator=g, requires_grad=True)
    ours, plain = layer.after_doubling(x), layer(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    close = {"rtol": 0, "atol": 1e-13 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(ours, plain, **close)
    wanted = [x, *layer.parameters()]
    for own, other in zip(
        torch.autograd.grad(ours.sin().sum(), wanted), torch.autograd.grad(plain.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-11 if dtype == torch.float64 else 1e-3)


def test_a_convolution_after_doubling_rounds_its_gradients_alone() -> None:
    layer = Conv2d(16, 16, 3, padding=1)
    x = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(4))
    exact = layer.after_doubling(x)
    (by_weight,) = torch.autograd.grad(exact.sin().sum(), [layer.weight])
    layer.backward_dtype = torch.bfloat16
    rounded = layer.after_doubling(x)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=1e-6)
    (half,) = torch.autograd.grad(rounded.sin().sum(), [layer.weight])
    assert 1e-6 < float((half - by_weight).norm() / by_weight.norm()) < 1e-2


def test_weights_held_in_a_half_change_no_bit_of_an_autocast_pass() -> None:
    """Every convolution but those after doubling, whose sums of weights are rounded once more."""
    config = network_config(kind="adm", channels=32, channel_mult=[1], num_blocks=1, attention=[8], head_channels=32)
    network = build_network(config, channels=3, resolution=8, num_classes=None, seed=0).requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    x, c = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6)), torch.tensor([0.3, -0.2])
    with torch.autocast("cpu", torch.bfloat16):
        before = network(x, c)
        hold_in(network, torch.bfloat16)
        after = network(x, c)
    assert {p.dtype for p in network.parameters()} == {torch.float32, torch.bfloat16}
    assert torch.equal(before, after)


@pytest.mark.parametrize("side", [8, 32])
def test_normalization_of_halves_is_that_of_float32_rounded_once(side: int) -> None:
    layer = GroupNorm(64)
    x = (3 + torch.randn(2, 64, side, side, generator=torch.Generator().manual_seed(7))).bfloat16()
    for form in (torch.contiguous_format, torch.channels_last):
        ours = layer(x.to(memory_format=form)).float()
        torch.testing.assert_close(ours, layer(x.float()), rtol=2**-7, atol=2**-7)


def test_a_network_without_memory_draws_nothing_and_keeps_its_shapes():
    """On the meta device there is nothing to fill; elsewhere weights are drawn as ever."""
    cfg = network_config(kind="adm", channels=16, channel_mult=[1, 2], num_blocks=1, attention=[4], head_channels=16)
    with torch.device("meta"):
        shell = build_network(cfg, channels=3, resolution=8)
    full = build_network(cfg, channels=3, resolution=8)
    assert all(tensor.is_meta for tensor in shell.state_dict().values())
    assert {k: v.shape for k, v in shell.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}
    assert full.time_embed["0"].weight.std() > 0 and full.time_embed["0"].bias.std() > 0


def embeddings_of(network, *given, grad=False):
    """What the network's blocks are told about the noise level, in one pass."""
    seen = []
    first = next(module for module in network.modules() if isinstance(module, BLOCKS))
    hook = first.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    with torch.set_grad_enabled(grad):
        network(*given)
    hook.remove()
    return seen[0].detach()


def noise_levels(network):
    """x, c_noise = 250 ln t and r at levels whose difference a half cannot hold, and labels."""
    x, _, label, r = inputs(network, batch=4, dtype=torch.float32)
    c = 250 * torch.tensor([80.0, 79.99, 1.5, 0.002]).log()
    return x, c, label, None if r is None else c - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_time_embedding_in_float32_to_the_bit(network, dtype):
    given = noise_levels(network.float())
    exact = embeddings_of(network, *given)
    hold_in(network, dtype)
    with torch.autocast("cpu", dtype):
        half = embeddings_of(network, *given)
    assert half.dtype == torch.float32
    assert torch.equal(half, exact)


def test_a_pair_of_passes_in_halves_embeds_the_time_in_float32_to_the_bit(network):
    """Consistency training in bfloat16: convolutions are rounded in both passes, what they are told is not."""
    given = noise_levels(network.float())
    exact = embeddings_of(network, *given)
    set_backward_dtype(network, torch.bfloat16)
    tape = Tape()
    for passing in (tape.writing, tape.reading):
        with passing():
            half = embeddings_of(network, *given, grad=True)
        assert half.dtype == torch.float32
        assert torch.equal(half, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_half_weights_embeds_the_time_in_float32(network, dtype):
    """The embedding is to the bit that of the rounded weights in float32, but for the one rounding at its end."""
    given = noise_levels(network.float().to(dtype))
    assert all(buffer.dtype == torch.float32 for name, buffer in network.named_buffers() if "resample" not in name)
    half = embeddings_of(network, *given)
    assert half.dtype == dtype
    exact = embeddings_of(network.float(), *given)
    assert torch.equal(half, exact.to(dtype))
    assert not torch.equal(exact[0], exact[1]), "two levels that a half cannot tell apart"


def test_features_are_never_narrower_than_float32():
    """Given 250 ln t as a half they take it as it is; their frequencies are never rounded."""
    c = torch.tensor([250 * math.log(80), 3.0])
    for features in (FourierFeatures(32), edm2.MpFourier(32), lambda c: positional_features(c, 32)):
        exact = features(c.bfloat16().float())
        rounded = features.bfloat16() if isinstance(features, torch.nn.Module) else features
        assert torch.equal(rounded(c.bfloat16()), exact)
