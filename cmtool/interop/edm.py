"""NVlabs EDM's networks, from their pickles or from bare state dicts: SongUNet and DhariwalUNet.

Our SongUNet uses EDM's names; DhariwalUNet is the ADM U-Net under other names, with q, k, v interleaved per channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from cmtool.config.networks import AdmConfig, SongConfig, network_config
from cmtool.errors import CheckpointError, UserError
from cmtool.interop.layout import Foreign, QkvOrder, Shapes, reorder_qkv, shapes_of
from cmtool.interop.openai import HEAD_CHANNELS
from cmtool.networks.blocks import number_of_heads, per_level

NOISE_SCALE = 0.25
ONE_HEAD = 1 << 20
EDM_QKV: QkvOrder = "heads-channels-three"
_BLOCK_PAIRS = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION_PAIRS = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix with the prefix removed, or all tensors if none has it."""
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inner or tensors


def recognizes(shapes: Shapes) -> bool:
    """Whether the names are those of EDM's networks, with or without the `model.` prefix."""
    return any(re.match(r"(model\.)?enc\.\d+x\d+_conv\.weight$", name) for name in shapes) and any(
        name.removeprefix("model.") == "map_layer0.weight" for name in shapes
    )


def _sides(shapes: Shapes) -> list[int]:
    """Sides of the levels, largest first."""
    found = {int(match[1]) for name in shapes if (match := re.match(r"enc\.(\d+)x\1_", name))}
    return sorted(found, reverse=True)


def _blocks(shapes: Shapes, side: int) -> int:
    return sum(bool(re.fullmatch(rf"enc\.{side}x{side}_block\d+\.conv0\.weight", name)) for name in shapes)


def detect(tensors: dict[str, Tensor], head_channels: int = HEAD_CHANNELS) -> tuple[AdmConfig | SongConfig, int, bool]:
    """Return (network table, image side, whether it is a DhariwalUNet) from names, shapes and the stored FIR filter.

    Raises:
        CheckpointError: if names are missing or belong to an unknown variant.
    """
    shapes = shapes_of(tensors)
    variants = [name for name in shapes if re.search(r"_aux_(down|skip|up)\.", name)]
    if variants:
        raise CheckpointError(
            f"this EDM network has skip-type encoders or decoders ({variants[0]}), which are not known here."
        )
    dhariwal = "out_conv.weight" in shapes
    sides = _sides(shapes)
    try:
        base = shapes[f"enc.{sides[0]}x{sides[0]}_conv.weight"][0]
        widths = [shapes[f"enc.{side}x{side}_block0.conv1.weight"][0] for side in sides]
        affine = shapes[f"enc.{sides[0]}x{sides[0]}_block0.affine.weight"][0]
        told = shapes.get("map_augment.weight", (base, 0))[1]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"the weights look like an EDM network but lack {error}.") from None
    if any(width % base for width in widths):
        raise CheckpointError(
            f"level widths {widths} are no multiples of the base width {base}, which is not known here."
        )
    blocks = [_blocks(shapes, side) for side in sides]
    config = network_config(
        kind="adm" if dhariwal else "song",
        channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_blocks=blocks[0] if len(set(blocks)) == 1 else tuple(blocks),
        attention=tuple(
            side for side in sides if any(name.startswith(f"enc.{side}x{side}_block0.qkv") for name in shapes)
        ),
        head_channels=head_channels if dhariwal else ONE_HEAD,
        group_channels=4,
        scale_shift=affine == 2 * widths[0],
        embedding="fourier" if "map_noise.freqs" in shapes else "positional",
        encoder="residual" if any("_aux_residual." in name for name in shapes) else "standard",
        resample_filter=_filter(tensors),
        augment_labels=told,
    )
    return config, sides[0], dhariwal


def _filter(tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """The taps of the stored FIR filter as the smallest whole numbers, e.g. (1, 3, 3, 1)."""
    stored = next((tensor for name, tensor in tensors.items() if name.endswith("resample_filter")), None)
    if stored is None:
        return (1, 1)
    row = stored.float().reshape(stored.shape[-2:]).sum(0)
    return tuple(round(float(value / row.abs().min())) for value in row)


def _dhariwal_layers(config: AdmConfig | SongConfig, side: int) -> Iterator[tuple[str, str, str | None]]:
    """Yield (their block, our block, our attention layer or None) in any order."""
    levels = len(config.channel_mult)
    blocks = per_level(config.num_blocks, levels, "num_blocks")
    index = 1
    for level in range(levels):
        size = f"{side // 2**level}x{side // 2**level}"
        attends = side // 2**level in config.attention
        if level:
            yield f"enc.{size}_down", f"input_blocks.{index}.0", None
            index += 1
        for j in range(blocks[level]):
            yield f"enc.{size}_block{j}", f"input_blocks.{index}.0", f"input_blocks.{index}.1" if attends else None
            index += 1
    index = 0
    for level in reversed(range(levels)):
        size = f"{side // 2**level}x{side // 2**level}"
        attends = side // 2**level in config.attention
        if level == levels - 1:
            yield f"dec.{size}_in0", "middle_block.0", "middle_block.1"
            yield f"dec.{size}_in1", "middle_block.2", None
        for j in range(blocks[level] + 1):
            yield f"dec.{size}_block{j}", f"output_blocks.{index}.0", f"output_blocks.{index}.1" if attends else None
            index += 1
        if level:
            above = f"{side // 2 ** (level - 1)}x{side // 2 ** (level - 1)}"
            yield f"dec.{above}_up", f"output_blocks.{index - 1}.{2 if attends else 1}", None


def dhariwal_names(config: AdmConfig | SongConfig, side: int) -> dict[str, str]:
    """Return DhariwalUNet layer -> ADM layer, both without `.weight` and `.bias`."""
    names = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}
    names["map_augment"] = "map_augment"
    names[f"enc.{side}x{side}_conv"] = "input_blocks.0.0"
    for theirs, ours, attention in _dhariwal_layers(config, side):
        names |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in _BLOCK_PAIRS.items()}
        if attention:
            names |= {f"{theirs}.{a}": f"{attention}.{b}" for a, b in _ATTENTION_PAIRS.items()}
    return names


def _reorder(name: str, tensor: Tensor, config: AdmConfig | SongConfig, source: QkvOrder, target: QkvOrder) -> Tensor:
    if ".qkv." not in f".{name}.":
        return tensor
    return reorder_qkv(tensor, number_of_heads(tensor.shape[0] // 3, config.head_channels), source, target)


def from_dhariwal(tensors: dict[str, Tensor], config: AdmConfig | SongConfig, side: int) -> dict[str, Tensor]:
    """Translate DhariwalUNet tensors into our ADM names."""
    names, result = dhariwal_names(config, side), {}
    for name in list(tensors):
        tensor, (layer, _, part) = tensors.pop(name), name.rpartition(".")
        if part == "resample_filter":
            continue
        if name == "map_label.weight":
            result["label_emb.weight"] = tensor.t().contiguous()
        else:
            tensor = _reorder(name, tensor, config, EDM_QKV, "three-heads-channels")
            result[f"{names[layer]}.{part}" if layer in names else name] = tensor
    return result


def to_dhariwal(tensors: dict[str, Tensor], config: AdmConfig | SongConfig, side: int) -> dict[str, Tensor]:
    """Translate our ADM tensors into DhariwalUNet names; needs FiLM conditioning (scale and shift).

    Raises:
        UserError: for networks that DhariwalUNet cannot express.
    """
    if not config.scale_shift or config.embedding != "positional":
        raise UserError(
            "EDM's DhariwalUNet needs scale-shift conditioning and a positional embedding; this network differs."
        )
    back = {ours: theirs for theirs, ours in dhariwal_names(config, side).items()}
    result = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if name == "label_emb.weight":
            result["map_label.weight"] = tensor.t().contiguous()
        else:
            result[f"{back[layer]}.{part}"] = _reorder(name, tensor, config, "three-heads-channels", EDM_QKV)
    ones = next(iter(tensors.values())).new_full((1, 1, 2, 2), 0.25)
    for block in {match[0] for name in result if (match := re.match(r"(enc|dec)\.\d+x\d+_(down|up)", name))}:
        result |= {f"{block}.{part}.resample_filter": ones.clone() for part in ("conv0", "skip")}
    return result


def _check_variant(tensors: dict[str, Tensor], kwargs: dict[str, Any], notes: list[str]) -> None:
    """Fold TCM's learned frequency scale into the frequencies; refuse its other variants.

    Raises:
        CheckpointError: for a variant that our network does not implement.
    """
    if kwargs.get("emb_norm") or kwargs.get("attn_type", "dot") != "dot":
        raise CheckpointError("this SongUNet normalizes its embedding or attends otherwise, which is not known here.")
    scale = tensors.pop("map_noise.scale", None)
    if scale is not None:
        tensors["map_noise.freqs"] = tensors["map_noise.freqs"].float() * scale.float() * 10
        notes.append("the learned scale of the Fourier frequencies was multiplied into them.")


def read(
    tensors: dict[str, Tensor], *, head_channels: int = HEAD_CHANNELS, kwargs: dict[str, Any] | None = None
) -> Foreign:
    """Translate EDM tensors; `tensors` is consumed. `kwargs`: the constructor's arguments, where a pickle has them."""
    inner = strip(tensors, "model.")
    notes: list[str] = []
    if "map_augment.weight" in inner:
        notes.append("its augmentation labels (map_augment) are kept for training; samples are made with zeros.")
    _check_variant(inner, kwargs or {}, notes)
    config, side, dhariwal = detect(inner, head_channels)
    if kwargs and isinstance(kwargs.get("dropout"), int | float):
        config = config.model_copy(update={"dropout": float(kwargs["dropout"])})
    classes = inner["map_label.weight"].shape[1] if "map_label.weight" in inner else None
    channels = inner[f"enc.{side}x{side}_conv.weight"].shape[1]
    result = from_dhariwal(inner, config, side) if dhariwal else dict(inner)
    return Foreign("edm", config, channels, side, classes, NOISE_SCALE, result, notes=notes)
