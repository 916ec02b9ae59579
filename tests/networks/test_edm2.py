"""The magnitude-preserving U-Net: its published size, and that its parts keep unit magnitude."""

import math

import pytest
import torch

from cmtool.config.networks import network_config
from cmtool.networks import build_network, parameter_count
from cmtool.networks.edm2 import MpFourier, MpLayer, mp_cat, mp_silu, mp_sum, normalize
from tests.networks.network_helpers import inputs

SMALL = network_config(kind="edm2", channels=16, channel_mult=(1, 2), attention=(4,), head_channels=8)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_published_small_network_has_its_size():
    config = network_config(
        kind="edm2",
        channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attention=(16, 8),
        head_channels=64,
        log_variance=True,
    )
    with torch.device("meta"):
        network = build_network(config, channels=3, resolution=64, num_classes=1000)
    assert parameter_count(network) == 280_209_381
    assert len(network.state_dict()) == 203


def test_parts_keep_unit_magnitude():
    a, b = noise(400, 32), noise(400, 96, seed=1)
    assert mp_silu(a).square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    assert mp_sum(a, b[:, :32], 0.3).square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    assert mp_cat(a, b, 0.5).square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    joined = mp_cat(a, b, 0.5)
    shares = joined[:, :32].square().sum() / joined.square().sum()
    assert shares.item() == pytest.approx(0.5, abs=0.02), "both sides contribute alike although one is wider"
    features = MpFourier(2000).double()(torch.tensor([0.3, -1.2], dtype=torch.float64))
    assert features.square().mean(1).sqrt().tolist() == pytest.approx([1, 1], abs=0.05)
    assert MpLayer(32, 50).double()(a).square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def test_normalize_by_hand():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(normalize(x), x / (1e-4 + 5 / math.sqrt(2)))


def test_the_scale_of_weights_does_not_matter_and_forced_normalization_changes_nothing():
    network = build_network(SMALL, channels=1, resolution=8, num_classes=3).double()
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.fill_(0.7) if name.endswith("gain") else value.mul_(1)
    x, c, label, _ = inputs(network)
    before = network(x, c, label)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, MpLayer):
                module.weight.mul_(5)
    torch.testing.assert_close(network(x, c, label), before, rtol=1e-3, atol=1e-3)
    network.normalize_weights()
    torch.testing.assert_close(network(x, c, label), before, rtol=1e-3, atol=1e-3)
    rows = network.enc["8x8_block0"].conv_res0.weight.flatten(1)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(len(rows), dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_a_layer_after_doubling_is_that_of_the_enlarged_image():
    layer = MpLayer(6, 4, 3).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x, 0.7, doubled=True), layer(large, 0.7))
