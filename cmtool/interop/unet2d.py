"""Names and settings of UNet2DModel for the ADM U-Net, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cmtool.config.networks import AdmConfig, network_config
from cmtool.errors import CheckpointError, UserError
from cmtool.interop.layout import take
from cmtool.networks.blocks import per_level

# Keys that an older config.json may lack, and the defaults of that time.
DEFAULTS: dict[str, Any] = {
    "layers_per_block": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_class_embeds": None,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "default",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "time_embedding_type": "positional",
    "center_input_sample": False,
    "attn_norm_num_groups": None,
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "act_fn": "silu",
    "class_embed_type": None,
}
# Our ADM network in diffusers' terms; with any other value it is a different network.
_REQUIRED: dict[str, Any] = {
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "time_embedding_type": "positional",
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "act_fn": "silu",
    "class_embed_type": None,
    "norm_num_groups": 32,
}
_BLOCK_PAIRS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _places(blocks: tuple[int, ...], attends: tuple[bool, ...]) -> Iterator[tuple[str, str, str]]:
    """Yield (our prefix, their prefix, "block" or "attention" or "plain") for every layer of the U."""
    yield from (
        ("time_embed.0", "time_embedding.linear_1", "plain"),
        ("time_embed.2", "time_embedding.linear_2", "plain"),
    )
    yield from (("label_emb", "class_embedding", "plain"), ("input_blocks.0.0", "conv_in", "plain"))
    index, last = 1, len(blocks) - 1
    for level, count in enumerate(blocks):
        for j in range(count):
            yield f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{j}", "block"
            if attends[level]:
                yield f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{j}", "attention"
            index += 1
        if level < last:
            yield f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0", "block"
            index += 1
    yield "middle_block.0", "mid_block.resnets.0", "block"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "block"
    index = 0
    for up, level in enumerate(range(last, -1, -1)):
        for j in range(blocks[level] + 1):
            yield f"output_blocks.{index}.0", f"up_blocks.{up}.resnets.{j}", "block"
            if attends[level]:
                yield f"output_blocks.{index}.1", f"up_blocks.{up}.attentions.{j}", "attention"
            if level and j == blocks[level]:
                yield f"output_blocks.{index}.{2 if attends[level] else 1}", f"up_blocks.{up}.upsamplers.0", "block"
            index += 1
    yield from (("out.0", "conv_norm_out", "plain"), ("out.2", "conv_out", "plain"))


def _layers(config: AdmConfig, side: int) -> Iterator[tuple[str, str, str]]:
    """Yield (our layer, their layer, kind): kinds "copy" and, for attention, "qkv" and "project"."""
    blocks = per_level(config.num_blocks, len(config.channel_mult), "num_blocks")
    attends = tuple(side // 2**level in config.attention for level in range(len(config.channel_mult)))
    for ours, theirs, kind in _places(blocks, attends):
        if kind == "plain":
            yield ours, theirs, "copy"
        elif kind == "block":
            yield from ((f"{ours}.{a}", f"{theirs}.{b}", "copy") for a, b in _BLOCK_PAIRS.items())
        else:
            yield f"{ours}.norm", f"{theirs}.group_norm", "copy"
            yield f"{ours}.qkv", theirs, "qkv"
            yield f"{ours}.proj_out", f"{theirs}.to_out.0", "project"


def to_diffusers(tensors: dict[str, Tensor], config: AdmConfig, side: int) -> dict[str, Tensor]:
    """Translate ADM tensors into UNet2DModel's names; q, k and v become three linear layers."""
    result: dict[str, Tensor] = {}
    for ours, theirs, kind in _layers(config, side):
        for part in ("weight", "bias"):
            tensor = tensors.get(f"{ours}.{part}")
            if tensor is None:
                continue
            if kind != "copy" and part == "weight":
                tensor = tensor[:, :, 0, 0]
            if kind == "qkv":
                for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                    result[f"{theirs}.to_{letter}.{part}"] = rows.contiguous()
            else:
                result[f"{theirs}.{part}"] = tensor.contiguous()
    return result


def from_diffusers(tensors: dict[str, Tensor], config: AdmConfig, side: int) -> dict[str, Tensor]:
    """Translate UNet2DModel's tensors into ours; `tensors` is consumed."""
    for name in [name for name in tensors if any(f".{old}." in name for old in _OLD_ATTENTION)]:
        new = name
        for old, modern in _OLD_ATTENTION.items():
            new = new.replace(f".{old}.", f".{modern}.")
        tensors[new] = tensors.pop(name)
    result: dict[str, Tensor] = {}
    for ours, theirs, kind in _layers(config, side):
        for part in ("weight", "bias"):
            if kind == "qkv":
                tensor = torch.cat([take(tensors, f"{theirs}.to_{letter}.{part}") for letter in "qkv"])
            elif f"{theirs}.{part}" in tensors:
                tensor = tensors.pop(f"{theirs}.{part}")
            else:
                continue
            one_by_one = kind != "copy" and part == "weight"
            result[f"{ours}.{part}"] = tensor[:, :, None, None] if one_by_one else tensor
    # Leftovers keep their own names, and the check of names reports them.
    result.update(tensors)
    return result


def network_of(config: dict[str, Any]) -> tuple[AdmConfig, int]:
    """Return (network table, image side) of a UNet2DModel's config.json.

    Raises:
        CheckpointError: if the UNet2DModel is not an ADM U-Net; the message lists the settings that differ.
    """
    filled = DEFAULTS | config
    differing = [f"{key} = {filled[key]!r}" for key, wanted in _REQUIRED.items() if filled[key] != wanted]
    if differing:
        raise CheckpointError(f"this UNet2DModel is no ADM U-Net: {', '.join(differing)}.")
    try:
        side, widths, down = (
            int(filled["sample_size"]),
            list(filled["block_out_channels"]),
            list(filled["down_block_types"]),
        )
        if any(kind not in ("ResnetDownsampleBlock2D", "AttnDownBlock2D") for kind in down) or len(down) != len(widths):
            raise CheckpointError(f"this UNet2DModel is no ADM U-Net: down_block_types = {down}.")
        if any(width % widths[0] for width in widths):
            raise CheckpointError(f"level widths {widths} are no multiples of the first, which is not known here.")
        attends = tuple(side // 2**level for level, kind in enumerate(down) if kind == "AttnDownBlock2D")
        table = network_config(
            kind="adm",
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_blocks=int(filled["layers_per_block"]),
            attention=attends,
            head_channels=int(filled["attention_head_dim"]),
            scale_shift=filled["resnet_time_scale_shift"] == "scale_shift",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the folder's config.json cannot be understood: {error}.") from None
    return table, side


def unet_config(table: AdmConfig, channels: int, side: int, num_classes: int | None) -> dict[str, Any]:
    """Return the config.json of the UNet2DModel that equals our ADM network.

    Raises:
        UserError: for settings that UNet2DModel does not have.
    """
    levels = len(table.channel_mult)
    blocks = set(per_level(table.num_blocks, levels, "num_blocks"))
    widths = [table.channels * mult for mult in table.channel_mult]
    if len(blocks) > 1:
        raise UserError("diffusers' UNet2DModel has one number of blocks for all levels; this network has several.")
    if any(width % 32 for width in widths) or (table.group_channels > 1 and min(widths) // table.group_channels < 32):
        raise UserError(
            f"diffusers' UNet2DModel normalizes 32 groups everywhere; this network's widths {widths} do not."
        )
    attends = [side // 2**level in table.attention for level in range(levels)]
    return {
        "_class_name": "UNet2DModel",
        **{key: value for key, value in DEFAULTS.items() if key not in ("in_channels", "out_channels")},
        **_REQUIRED,
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": blocks.pop(),
        "num_class_embeds": num_classes,
        "block_out_channels": widths,
        "attention_head_dim": table.head_channels,
        "attn_norm_num_groups": 32,
        "down_block_types": ["AttnDownBlock2D" if yes else "ResnetDownsampleBlock2D" for yes in attends],
        "up_block_types": ["AttnUpBlock2D" if yes else "ResnetUpsampleBlock2D" for yes in attends[::-1]],
        "resnet_time_scale_shift": "scale_shift" if table.scale_shift else "default",
    }
