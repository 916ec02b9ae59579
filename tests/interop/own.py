"""A small model of ours to be exported."""

import torch

from cmtool.checkpoint import save_model
from cmtool.config.networks import network_config
from cmtool.networks import build_network


def own_model(path, network=None, process=None, kind="consistency", classes=3, side=8, **header):
    """A small model of ours with weights by torch's initialization and a live last layer."""
    config = network or network_config(channels=32, channel_mult=(1, 2), attention=(4,))
    built = build_network(config, channels=3, resolution=side, num_classes=classes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for value in built.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    form = "consistency" if kind == "consistency" else "edm"
    data = {
        "source": "digits",
        "resolution": side,
        "channels": 3,
        "num_classes": classes,
        "class_names": None,
        "fingerprint": "f",
        "float_samples": False,
    }
    save_model(
        path,
        dict(built.state_dict()),
        {
            "kind": kind,
            "preset": "digits",
            "recipe_name": "ct",
            "step": 10,
            "network": config.model_dump(mode="json"),
            "process": {"parameterization": form, "noise_scale": 250.0, **(process or {})},
            "data": data,
            "times": {"1": [80.0], "2": [80.0, 0.8]},
            **header,
        },
    )
    return path
