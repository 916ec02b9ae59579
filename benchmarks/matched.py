"""One network in several programs: ours with random weights, and peers with the same weights."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pairs import peers_there
from cmtool.config.load import resolve
from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset, from_tensors
from cmtool.models import Model

TOLERANCE = 1e-5
Raw = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A peer's network with our weights: `raw(x, c_noise)` is F."""

    name: str
    network: nn.Module
    raw: Raw
    note: str = ""


def matched_config(asked: argparse.Namespace, recipe: str, *sets: str, **flags: Any) -> RunConfig:
    """The settings of a published-style U-Net on pictures of shapes: attention at half the side, two levels."""
    sizes = (
        f"network.channels={asked.channels}",
        "network.channel_mult=[1, 2]" if asked.side <= 16 else "network.channel_mult=[1, 2, 2]",
        f"network.num_blocks={asked.blocks}",
        f"network.attention=[{asked.side // 2}]",
        "network.head_channels=32",
        "network.group_channels=1",
        "process.noise_scale=250",
        f"data.resolution={asked.side}",
        "data.labels=false",
        "train.optimizer=radam",
        "train.log_every=1000000",
    )
    given = {"train.batch_size": asked.batch, "train.steps": 100_000, "train.precision": "fp32", **flags}
    return resolve("shapes", recipe=recipe, sets=(*sizes, *sets), flags=given).config


def pictures(asked: argparse.Namespace, count: int = 512) -> Dataset:
    """Random bytes as a data set: reading them costs as much as reading pictures."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, asked.side, asked.side), dtype=torch.uint8, generator=g)
    return from_tensors(images, None, "random bytes")


def enliven(network: nn.Module, seed: int = 0) -> None:
    """Give the layers that start at zero random weights, so that outputs are informative."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                drawn = torch.randn(parameter.shape, generator=g) / math.sqrt(parameter[0].numel())
                parameter.copy_(drawn.to(parameter.device))


def diffusers_peer(model: Model) -> Peer:
    """UNet2DModel with the weights of `model`; raises ImportError without diffusers."""
    from diffusers import UNet2DModel

    from cmtool.config.networks import network_config
    from cmtool.interop.unet2d import to_diffusers, unet_config

    channels, side, _ = model.image_shape
    table = network_config(**model.header["network"])
    network = UNet2DModel(**unet_config(table, channels, side, model.num_classes))
    network.load_state_dict(to_diffusers(dict(model.network.state_dict()), table, side))
    network = network.to(model.device)
    return Peer("diffusers UNet2DModel", network, lambda x, c: network(x, c, return_dict=False)[0])


class FusedAttention(nn.Module):
    """Stands in for flash_attn in OpenAI's network: torch's fused attention, kinder to it than its own fallback."""

    def __init__(self, embed_dim: int, num_heads: int, **_: Any) -> None:
        super().__init__()
        self.heads = num_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """Map (B, 3 H D, S), ordered three, head, channel, to (B, H D, S)."""
        parts = qkv.unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        return F.scaled_dot_product_attention(*parts).transpose(-1, -2).flatten(1, 2)


def checkout(path: str | None, option: str, variable: str) -> None:
    """Put a peer's checkout on the search path; raises ImportError without one."""
    if path is None:
        raise ImportError(f"no checkout: {option} DIR or ${variable}")
    if path not in sys.path:
        sys.path.append(path)


def openai_peer(model: Model, path: str | None, fused: bool = True) -> Peer:
    """The released UNetModel with the weights of `model`, from a checkout; raises ImportError without one.

    It requires flash_attn, which needs a GPU and half precision. In its place runs torch's fused attention, or (`fused`
    false) the float32 class from the same file, which is what its code offers on a machine without flash_attn.
    """
    checkout(path, "--openai-path", "OPENAI_CM_PATH")
    unet = importlib.import_module("cm.unet")
    unet.QKVFlashAttention = FusedAttention if fused else lambda channels, heads: unet.QKVAttention(heads)
    channels, side, _ = model.image_shape
    table = model.header["network"]
    network = unet.UNetModel(
        image_size=side,
        in_channels=channels,
        model_channels=table["channels"],
        out_channels=channels,
        num_res_blocks=table["num_blocks"],
        attention_resolutions=tuple(side // at for at in table["attention"]),
        channel_mult=tuple(table["channel_mult"]),
        num_head_channels=table["head_channels"],
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    theirs = network.state_dict()
    network.load_state_dict({name: t.view(theirs[name].shape) for name, t in model.network.state_dict().items()})
    network = network.to(model.device)
    if fused:
        return Peer("openai UNetModel", network, network, "torch's fused attention in place of flash_attn")
    return Peer("openai UNetModel, own attention", network, network, "its own float32 attention in place of flash_attn")


def peers_of(model: Model, asked: argparse.Namespace) -> tuple[list[Peer], dict[str, str]]:
    """Return the available peers, checked to give the same answers as `model`, and why the others are absent.

    Raises:
        AssertionError: if a peer with the same weights gives other answers: the comparison would mean nothing.
    """
    makers = {
        "diffusers": lambda: diffusers_peer(model),
        "openai": lambda: openai_peer(model, asked.openai_path),
        "openai-own": lambda: openai_peer(model, asked.openai_path, fused=False),
    }
    found, absent = peers_there(asked, makers)
    for peer in found.values():
        difference = disagreement(model, peer)
        if difference > TOLERANCE:
            raise AssertionError(f"{peer.name} with the same weights differs by {difference:.2e}")
    return list(found.values()), absent


def disagreement(model: Model, peer: Peer) -> float:
    """Largest difference between our raw network and the peer's on random inputs, relative to the largest output."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(2, *model.image_shape, generator=g).to(model.device)
    c = torch.tensor([250 * math.log(80.0), 250 * math.log(0.3)], device=model.device)
    # A GPU would round the operands of convolutions to ten bits.
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        ours, theirs = model.network(x, c), peer.raw(x, c)
    return float((ours - theirs).abs().max() / theirs.abs().max())
