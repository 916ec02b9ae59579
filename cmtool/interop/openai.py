"""OpenAI's state dicts: consistency models (`cm.unet`) and the guided-diffusion networks they descend from.

Our ADM network uses the same names, so a consistency_models file needs no translation. guided-diffusion stores its
attention as 1-d convolutions, with q, k and v grouped by head.
"""

from __future__ import annotations

import re

from torch import Tensor

from cmtool.config.networks import AdmConfig, network_config
from cmtool.errors import CheckpointError, UserError
from cmtool.interop.layout import Foreign, Shapes, reorder_qkv, shapes_of
from cmtool.networks.blocks import number_of_heads

NOISE_SCALE = 250.0
HEAD_CHANNELS = 64
SIDES = {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}


def recognizes(shapes: Shapes) -> bool:
    """Whether the names are those of OpenAI's U-Net."""
    return "time_embed.0.weight" in shapes and "input_blocks.0.0.weight" in shapes and "out.2.weight" in shapes


def _stages(shapes: Shapes, group: str) -> int:
    indices = [int(found[1]) for name in shapes if (found := re.match(rf"{group}\.(\d+)\.", name))]
    if not indices:
        raise CheckpointError(f"the weights have no '{group}': an OpenAI U-Net needs them.")
    return max(indices) + 1


def _blocks_per_level(shapes: Shapes) -> list[int]:
    """Return the number of residual blocks per level, shallowest first. A level ends with an entry of two blocks."""
    counts, current = [], 0
    for index in range(_stages(shapes, "output_blocks")):
        current += 1
        if any(f"output_blocks.{index}.{slot}.in_layers.0.weight" in shapes for slot in (1, 2)):
            counts.append(current - 1)
            current = 0
    return [*counts, current - 1][::-1]


def _level_starts(blocks: list[int]) -> list[int]:
    """Return the index of each level's first entry in `input_blocks` (entry 0 is the first convolution)."""
    starts, index = [], 1
    for count in blocks:
        starts.append(index)
        index += count + 1
    return starts


def _side(mult: tuple[int, ...], resolution: int | None) -> int:
    if resolution is not None:
        return resolution
    if mult not in SIDES:
        known = ", ".join(f"{'-'.join(map(str, key))} is {side}" for key, side in SIDES.items())
        raise UserError(
            f"the image side cannot be known from channel multipliers {'-'.join(map(str, mult))} (known: {known}).",
            "say it with --resolution N",
        )
    return SIDES[mult]


def detect(
    shapes: Shapes, *, resolution: int | None = None, head_channels: int = HEAD_CHANNELS
) -> tuple[AdmConfig, int]:
    """Return (network table, image side) of an OpenAI U-Net using only its names and shapes.

    The side follows from the multipliers unless given. The file does not tell head width, dropout or form.

    Raises:
        CheckpointError: if names are missing or belong to an unknown variant.
        UserError: if the side cannot be determined.
    """
    if any(re.search(r"\.(op|conv)\.(weight|bias)$", name) for name in shapes):
        raise CheckpointError(
            "this U-Net resamples by plain convolutions (resblock_updown False), which is not known here."
        )
    try:
        width = shapes["time_embed.0.weight"][1]
        blocks = _blocks_per_level(shapes)
        starts = _level_starts(blocks)
        firsts = [f"input_blocks.{start}.0" for start in starts]
        widths = [shapes[f"{first}.out_layers.3.weight"][0] for first in firsts]
        scale_shift = shapes[f"{firsts[0]}.emb_layers.1.weight"][0] == 2 * widths[0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"the weights look like an OpenAI U-Net but lack {error}.") from None
    if any(value % width for value in widths):
        raise CheckpointError(
            f"level widths {widths} are no multiples of the base width {width}, which is not known here."
        )
    mult = tuple(value // width for value in widths)
    side = _side(mult, resolution)
    attends = tuple(
        side // 2**level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in shapes
    )
    config = network_config(
        kind="adm",
        channels=width,
        channel_mult=mult,
        num_blocks=blocks[0] if len(set(blocks)) == 1 else tuple(blocks),
        attention=attends,
        head_channels=head_channels,
        scale_shift=scale_shift,
    )
    return config, side


def _from_guided(tensors: dict[str, Tensor], head_channels: int) -> None:
    """Convert 1-d attention convolutions grouped by head to our layout, in place."""
    for name in [name for name in tensors if ".qkv." in name or ".proj_out." in name]:
        tensor = tensors[name]
        if ".qkv." in name:
            heads = number_of_heads(tensor.shape[0] // 3, head_channels)
            tensor = reorder_qkv(tensor, heads, "heads-three-channels", "three-heads-channels")
        tensors[name] = tensor[..., None] if tensor.ndim == 3 else tensor


def read(
    tensors: dict[str, Tensor],
    *,
    resolution: int | None = None,
    head_channels: int = HEAD_CHANNELS,
    qkv: str | None = None,
) -> Foreign:
    """Translate an OpenAI or guided-diffusion state dict; `tensors` is consumed.

    `qkv` "heads" or "three" overrides the order of guided-diffusion attention (its `use_new_attention_order`).
    """
    shapes = shapes_of(tensors)
    config, side = detect(shapes, resolution=resolution, head_channels=head_channels)
    guided = any(len(shape) == 3 for name, shape in shapes.items() if name.endswith(".qkv.weight"))
    notes = []
    if guided:
        _from_guided(tensors, head_channels if qkv != "three" else 10**9)
        notes.append(
            "guided-diffusion layout: such networks predict noise on a schedule of their own, so the weights are a "
            "start (--init) rather than a teacher."
        )
    channels, out = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    if out == 2 * channels:
        for name in ("out.2.weight", "out.2.bias"):
            tensors[name] = tensors[name][:channels].clone()
        notes.append(f"the learned-variance half of its {out} output channels was dropped.")
    classes = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None
    layout = "guided-diffusion" if guided else "openai"
    return Foreign(layout, config, channels, side, classes, NOISE_SCALE, dict(tensors), notes=notes)
