"""EDM2's magnitude-preserving networks: NVlabs' EDM2 snapshots, and those that ECT and TCM trained on ImageNet."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from cmtool.config.networks import Edm2Config, network_config
from cmtool.errors import CheckpointError
from cmtool.interop.edm import NOISE_SCALE
from cmtool.interop.layout import Foreign, Shapes, shapes_of
from cmtool.interop.openai import HEAD_CHANNELS
from cmtool.networks import edm2

_PREFIX = re.compile(r"^(unet|model)\.")
_LOGVAR = {
    "logvar_fourier.freqs": "log_variance_head.fourier.freqs",
    "logvar_fourier.phases": "log_variance_head.fourier.phases",
    "logvar_linear.weight": "log_variance_head.linear.weight",
}
# Constructor arguments that describe our network; a file may omit any of them.
_REQUIRED: dict[str, Any] = {
    "emb_norm": False,
    "label_balance": edm2.LABEL_BALANCE,
    "concat_balance": edm2.CONCAT_BALANCE,
    "res_balance": edm2.RESIDUAL_BALANCE,
    "attn_balance": edm2.ATTENTION_BALANCE,
    "clip_act": edm2.LARGEST_ACTIVATION,
    "resample_filter": [1, 1],
}


def recognizes(shapes: Shapes) -> bool:
    """Whether the names are those of EDM2's U-Net, under `unet.`, `model.` or bare."""
    return {"emb_fourier.freqs", "emb_noise.weight", "out_gain"} <= {_PREFIX.sub("", name) for name in shapes}


def detect(tensors: dict[str, Tensor], head_channels: int) -> tuple[Edm2Config, int]:
    """Return (network table, image side) from names and shapes.

    Raises:
        CheckpointError: if names are missing or the sizes differ from configuration G.
    """
    shapes = shapes_of(tensors)
    sides = sorted({int(found[1]) for name in shapes if (found := re.match(r"enc\.(\d+)x\1_", name))}, reverse=True)
    try:
        widths = [shapes[f"enc.{side}x{side}_block0.conv_res1.weight"][0] for side in sides]
        base, noise, emb = widths[0], shapes["emb_noise.weight"][1], shapes["emb_noise.weight"][0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"the weights look like an EDM2 network but lack {error}.") from None
    if any(width % base for width in widths) or noise != base or emb != max(widths):
        raise CheckpointError(
            f"an EDM2 network of widths {widths}, {noise} noise and {emb} embedding channels is not known here."
        )
    counts = [sum(bool(re.fullmatch(rf"enc\.{s}x{s}_block\d+\.emb_gain", name)) for name in shapes) for s in sides]
    config = network_config(
        kind="edm2",
        channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_blocks=counts[0] if len(set(counts)) == 1 else tuple(counts),
        attention=tuple(s for s in sides if f"enc.{s}x{s}_block0.attn_qkv.weight" in shapes),
        head_channels=head_channels,
        log_variance="logvar_linear.weight" in shapes,
    )
    return config, sides[0]


def read(tensors: dict[str, Tensor], *, head_channels: int | None, kwargs: dict[str, Any]) -> Foreign:
    """Translate EDM2 tensors; `kwargs`: the network's constructor arguments, where a pickle has them.

    Raises:
        CheckpointError: for a variant that our network does not implement.
    """
    differing = [
        f"{name} = {kwargs[name]}"
        for name, wanted in _REQUIRED.items()
        if name in kwargs and kwargs[name] is not None and kwargs[name] != wanted
    ]
    if differing:
        raise CheckpointError(f"this EDM2 network is a variant that is not known here: {', '.join(differing)}.")
    inner = {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    notes = []
    scale = inner.pop("emb_fourier.scale", None)
    if scale is not None:
        # TCM learns one scale for all frequencies; after training it can be folded into them.
        inner["emb_fourier.freqs"] = inner["emb_fourier.freqs"].float() * scale.float().exp()
        notes.append("the learned scale of the Fourier frequencies was multiplied into them.")
    heads = head_channels or kwargs.get("channels_per_head") or HEAD_CHANNELS
    config, side = detect(inner, int(heads))
    classes = inner["emb_label.weight"].shape[1] if "emb_label.weight" in inner else None
    channels = inner["out_conv.weight"].shape[0]
    result = {_LOGVAR.get(name, name): tensor for name, tensor in inner.items()}
    return Foreign("edm2", config, channels, side, classes, NOISE_SCALE, result, notes=notes)
