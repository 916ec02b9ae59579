"""The NCSN++ / DDPM++ U-Net: published sizes, its FIR filters against sums by hand, and its names."""

import pytest
import torch

from cmtool.config.networks import network_config
from cmtool.networks import build_network, parameter_count
from cmtool.networks.song import Conv
from tests.networks.network_helpers import redraw

DDPMPP = network_config(
    kind="song",
    channels=128,
    channel_mult=(2, 2, 2),
    num_blocks=4,
    attention=(16,),
    head_channels=256,
    scale_shift=False,
    group_channels=4,
)
NCSNPP = DDPMPP.model_copy(update={"embedding": "fourier", "encoder": "residual", "resample_filter": (1, 3, 3, 1)})


@pytest.mark.parametrize(
    ("config", "side", "classes", "count", "tensors"),
    [
        (NCSNPP, 32, None, 56_395_523, 431),
        (DDPMPP, 32, None, 55_732_739, 424),
        (DDPMPP, 32, 10, 55_732_739 + 11 * 128, 426),
        (DDPMPP.model_copy(update={"channel_mult": (1, 2, 2, 2)}), 64, None, 61_804_419, 552),
    ],
    ids=["ncsn++", "ddpm++", "ddpm++ conditional", "ffhq"],
)
def test_published_parameter_counts(config, side, classes, count, tensors):
    with torch.device("meta"):
        network = build_network(config, channels=3, resolution=side, num_classes=classes)
    assert parameter_count(network) == count
    assert len(network.state_dict()) == tensors


def test_fourier_frequencies_are_frozen_and_kept():
    network = build_network(NCSNPP.model_copy(update={"channels": 16, "head_channels": 32}), channels=3, resolution=32)
    assert network.state_dict()["map_noise.freqs"].shape == (16,)
    assert "map_noise.freqs" not in dict(network.named_parameters())


def only_resamples(resample, fir=(1, 3, 3, 1), fused=False):
    """A convolution whose own weight is the identity: what is left is its filter."""
    conv = Conv(1, 1, 1, resample, fir, fused=fused)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    return conv


def test_fir_filters_by_hand():
    row = torch.zeros(1, 1, 6, 6)
    row[0, 0, 2, 3] = 64.0
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    down = only_resamples("down")(row)
    # Output j takes inputs 2j-1 .. 2j+2 with the four taps: input 2 falls on the 4th tap of j = 0 and the 2nd of j = 1.
    by_hand = 64 * torch.outer(torch.tensor([taps[3], taps[1], 0]), torch.tensor([0, taps[2], taps[0]]))
    torch.testing.assert_close(down[0, 0], by_hand)
    up = only_resamples("up")(row)
    spread = torch.zeros(12, 12)
    # Input i reaches outputs 2i-1 .. 2i+2, and the sum is kept at four times the input (twice per axis).
    spread[3:7, 5:9] = 64 * 4 * torch.outer(taps, taps)
    torch.testing.assert_close(up[0, 0], spread)
    assert up.sum() == 4 * row.sum()


def test_a_fused_filter_is_convolution_then_filter():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    fused = Conv(3, 4, 3, "down", (1, 3, 3, 1), fused=True).double()
    wide = torch.nn.functional.conv2d(x, fused.weight, padding=2)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    kernel = (taps.outer(taps) / 64).expand(4, 1, 4, 4)
    torch.testing.assert_close(fused(x), torch.nn.functional.conv2d(wide, kernel, stride=2, groups=4, padding=0))


def test_box_filters_are_pooling_and_repetition():
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(only_resamples("down", (1, 1))(x), x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))
    torch.testing.assert_close(only_resamples("up", (1, 1))(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_box_filter_before_a_convolution_enlarges_its_input(kernel):
    layer = Conv(6, 4, kernel, "up", (1, 1)).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    by_hand = torch.nn.functional.conv2d(large, layer.weight, layer.bias, padding=kernel // 2)
    torch.testing.assert_close(layer(x), by_hand)


def test_the_input_pyramid_reaches_the_output():
    config = NCSNPP.model_copy(update={"channels": 8, "num_blocks": 1, "channel_mult": (1, 1)})
    network = redraw(build_network(config, channels=1, resolution=8)).double()
    x, c = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    before = network(x, c)
    with torch.no_grad():
        network.enc["4x4_aux_residual"].weight.zero_()
    assert (network(x, c) - before).abs().max() > 1e-3
