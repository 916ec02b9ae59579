"""The state dicts of DiT (facebookresearch/DiT) and SiT (willisma/SiT), in both directions.

Our transformer has their names. Both files look alike, with a second half of output channels for a learned variance,
but DiT predicts the noise at one of 1,000 steps, and SiT the velocity from noise at time 0 to images at time 1.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import torch
from torch import Tensor

from cmtool.config.headers import missing_in_header, wrong_in_header
from cmtool.config.networks import DitConfig, network_config
from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.parameterization import ddpm_levels
from cmtool.errors import CheckpointError, UserError
from cmtool.interop.layout import Foreign, Shapes, shapes_of
from cmtool.networks.dit import FEATURES, frequencies

# The key under which our own exports keep the model's header, which the state dict has no place for.
HEADER = "cmtool_header"
NOISE_SCALE = 0.25  # nothing that these files know is fed ln t
# Heads of the published sizes by width; the files do not tell them.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
HEAD_WIDTH = 64
DROPOUT = 0.1  # of labels, in both trainings
TABLE, LINEAR = "y_embedder.embedding_table.weight", "final_layer.linear"


def recognizes(shapes: Shapes) -> bool:
    """Whether the names are those of DiT."""
    return {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", f"{LINEAR}.weight"} <= set(shapes)


def detect(shapes: Shapes, head_channels: int | None) -> tuple[DitConfig, int, int]:
    """Return (network table, image side, channels of an image) from names and shapes.

    Raises:
        CheckpointError: if names are missing or the sizes do not go together.
    """
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        tokens, hidden = shapes["pos_embed"][1], shapes["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"the weights look like a DiT but lack {error}.") from None
    depth = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name)))
    heads = width // head_channels if head_channels else HEADS.get(width, max(1, width // HEAD_WIDTH))
    side = math.isqrt(tokens) * patch
    if side * side != tokens * patch * patch or width % heads or width % 4:
        raise CheckpointError(f"a DiT of width {width} with {heads} heads and {tokens} tokens is not known here.")
    sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads, "mlp_ratio": hidden / width}
    return network_config(kind="dit", **sizes), side, channels


def read(tensors: dict[str, Tensor], name: str, head_channels: int | None, header: str | None) -> Foreign:
    """Translate a state dict; `name` is its file's, and `header` what one of our own exports says of itself.

    Raises:
        CheckpointError: for a network of another shape, or an unreadable header.
    """
    shapes = shapes_of(tensors)
    table, side, channels = detect(shapes, head_channels)
    notes = []
    own = None
    if header is not None:
        own, table, parameterization = _own_header(header)
    else:
        velocity = "sit" in name.lower()
        what = "the velocity, as SiT does" if velocity else "the noise of 1,000 steps, as DiT does"
        notes.append(f"the file does not say what it predicts; {what}, was assumed by its name (SiT-... or another).")
        parameterization = "flow" if velocity else "ddpm"
        if table.width not in HEADS and not head_channels:
            notes.append(f"{table.heads} attention heads were assumed (--head-channels).")
    if math.prod(shapes[f"{LINEAR}.bias"]) == 2 * channels * shapes["x_embedder.proj.weight"][2] ** 2:
        _drop_variance(tensors, channels)
        if own is None:
            notes.append(f"the learned-variance half of its {2 * channels} output channels was dropped.")
    if parameterization == "flow":
        reverse_time(tensors)
    classes: int | None = shapes[TABLE][0] - 1 if TABLE in shapes else None
    if classes == 0:
        # A network without classes: its one row is added to every embedding of a noise level.
        tensors["t_embedder.mlp.2.bias"] = tensors["t_embedder.mlp.2.bias"] + tensors.pop(TABLE)[0]
    foreign = Foreign("dit", table, channels, side, classes or None, NOISE_SCALE, dict(tensors), notes=notes)
    foreign.form, foreign.parameterization, foreign.header = "edm", parameterization, own
    if own is None:
        foreign.unbounded, foreign.label_dropout = channels == 4, DROPOUT if classes else 0.0
        foreign.sigma_data = 1.0 if channels == 4 else None
        if parameterization == "ddpm":
            foreign.sigma_min, foreign.sigma_max = float(ddpm_levels()[0]), float(ddpm_levels()[-1])
    return foreign


def _own_header(text: str) -> tuple[dict[str, Any], DitConfig, str]:
    """Return the header of one of our exports, its network table and its parameterization."""
    try:
        header = dict(json.loads(text))
        wrong = wrong_in_header(header) or missing_in_header(header)
        if wrong is None:
            table, process = network_config(**header["network"]), ProcessConfig(**header["process"])
            return header, table, process.parameterization
    except (ValueError, TypeError, KeyError, RecursionError, UserError) as error:
        wrong = " ".join(str(error).split())[:80]
    raise CheckpointError(f"the header of this export cannot be understood: {wrong}.")


def _drop_variance(tensors: dict[str, Tensor], channels: int) -> None:
    """Keep the first half of the channels, which are the fastest axis of the last layer's outputs."""
    for name in (f"{LINEAR}.weight", f"{LINEAR}.bias"):
        whole = tensors[name]
        tensors[name] = whole.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1).clone()


def reverse_time(tensors: dict[str, Tensor]) -> None:
    """Let a network that is told 1 - tau be told tau, and give the opposite velocity; twice is the identity.

    cos((1 - tau) w) and sin((1 - tau) w) are linear in cos(tau w) and sin(tau w), so the first layer takes it over.
    """
    name, freqs = "t_embedder.mlp.0.weight", frequencies(FEATURES // 2)
    cos, sin = tensors[name].double().chunk(2, dim=1)
    turned = [cos * freqs.cos() + sin * freqs.sin(), cos * freqs.sin() - sin * freqs.cos()]
    tensors[name] = torch.cat(turned, dim=1).to(tensors[name].dtype)
    for last in (f"{LINEAR}.weight", f"{LINEAR}.bias"):
        tensors[last] = -tensors[last]


def to_dit(tensors: dict[str, Tensor], parameterization: str, channels: int) -> dict[str, Tensor]:
    """Return our tensors as DiT's or SiT's code takes them.

    Noise and velocity get the second half of output channels that their classes make unless told not to: zeros.
    """
    result = dict(tensors)
    if parameterization == "flow":
        reverse_time(result)
    if parameterization in ("ddpm", "flow"):
        for name in (f"{LINEAR}.weight", f"{LINEAR}.bias"):
            own = result[name].unflatten(0, (-1, channels))
            result[name] = torch.cat([own, torch.zeros_like(own)], dim=1).flatten(0, 1)
    if TABLE not in result:
        result[TABLE] = torch.zeros(1, result["x_embedder.proj.bias"].shape[0])
    return result
