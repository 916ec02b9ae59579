"""From a [network] table to a network."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cmtool.config.networks import NetworkConfig
from cmtool.errors import ConfigError
from cmtool.networks.blocks import RawNetwork
from cmtool.rng import derive


class _Unfilled(TorchFunctionMode):
    """Skips torch's initializations, since the meta device has nothing to fill.

    torch before 2.13 imports sympy to find that out, which costs every start a third of a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def network_class(cfg: NetworkConfig) -> Callable[..., RawNetwork]:
    """Return the class that a table names."""
    module, name = cfg.builds.split(":")
    found: Callable[..., RawNetwork] = getattr(importlib.import_module(f"cmtool.networks.{module}"), name)
    return found


def build_network(
    cfg: NetworkConfig, *, channels: int, resolution: int, num_classes: int | None = None, seed: int = 0
) -> RawNetwork:
    """Build the raw network F that `cfg` describes.

    `channels`: of an image; `resolution`: its nominal side in pixels, which places the attention layers; `num_classes`:
    None for an unconditional network. The initial weights depend only on `seed`. Under `torch.device("meta")`
    nothing is allocated. Raises `ConfigError` for settings that do not fit together.
    """
    try:
        cfg.check(resolution)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    unfilled = torch.get_default_device().type == "meta"
    with torch.random.fork_rng(devices=[]), _Unfilled() if unfilled else contextlib.nullcontext():
        torch.default_generator.manual_seed(derive(seed, "network"))
        network = network_class(cfg)(cfg, channels=channels, resolution=resolution, num_classes=num_classes)
    # Convolutions run 5 to 35 % faster with channels last, and a single weight in that layout is enough to switch them.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def parameter_count(network: torch.nn.Module) -> int:
    """Return the number of trained values (buffers such as frozen frequencies do not count)."""
    return sum(parameter.numel() for parameter in network.parameters())
