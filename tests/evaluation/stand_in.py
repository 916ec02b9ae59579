"""A TorchScript with the form of the Inception network (named layers, an output matrix) and random weights."""

import torch
from torch import nn


class First(nn.Module):
    """Down to a 17 x 17 map of 192 channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 192, 27, stride=17)

    def forward(self, x):
        return self.conv(x).relu()


class Pool(nn.Module):
    """To 2,048 features."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(192, 2048, 1)

    def forward(self, x):
        return self.mix(x.mean((2, 3), keepdim=True)).relu()


class StandIn(nn.Module):
    """Called as the published script is: (images, return_features, use_fp16, no_output_bias)."""

    def __init__(self, spatial=True):
        super().__init__()
        names = ("mixed_6", "pool2") if spatial else ("early", "late")
        self.layers = nn.Sequential()
        self.layers.add_module(names[0], First())
        self.layers.add_module(names[1], Pool())
        self.output = nn.Linear(2048, 1008)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ):
        x = nn.functional.interpolate(img.float(), size=[299, 299])
        features = self.layers((x - 128) / 128).flatten(1)
        if return_features:
            return features
        if no_output_bias:
            return torch.softmax(features @ self.output.weight.t(), dim=1)
        return torch.softmax(self.output(features), dim=1)


def write_stand_in(path, spatial=True):
    """Write it where the published file belongs; returns the eager network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = StandIn(spatial).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(network).save(str(path))
    return network
