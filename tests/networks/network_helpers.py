"""Weights and inputs that the tests of networks share."""

import math

import torch


def redraw(network, seed=0, scale=1.0):
    """Give every weight a random value: zero-initialized layers would hide the layers before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.ndim > 1:
                drawn *= scale / math.sqrt(value[0].numel())
            elif name.endswith(("weight", "gain", "gain_r")):
                drawn = 1 + 0.2 * drawn
            else:
                drawn *= 0.2
            value.copy_(drawn)
    return network


def inputs(network, batch=3, seed=1, dtype=torch.float64, side=None):
    """Return x, c_noise, label and r (None where the network takes none)."""
    generator = torch.Generator().manual_seed(seed)
    side = side or network.resolution
    x = torch.randn((batch, network.channels, side, side), generator=generator, dtype=torch.float64).to(dtype)
    c = torch.linspace(-1.5, 1.1, batch, dtype=torch.float64).to(dtype)
    label = None if network.num_classes is None else torch.arange(batch) % network.num_classes
    return x, c, label, (c - 0.3 if network.two_time else None)
