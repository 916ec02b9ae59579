"""OpenAI's JAX checkpoints for CIFAR-10 (`consistency_models_cifar10`): flax msgpack of an NCSN++, read without JAX."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmtool.config.networks import SongConfig, network_config
from cmtool.errors import CheckpointError
from cmtool.interop.edm import EDM_QKV, NOISE_SCALE, ONE_HEAD
from cmtool.interop.layout import Foreign, named, reorder_qkv
from cmtool.interop.msgpack import Decoder
from cmtool.interop.weights import choose, judged, settled

SIDE = 32
ATTENTION = 16
Leaves = dict[str, np.ndarray]
# Every set of weights has one of these at its top level; an optimizer's moments are nested deeper.
_ANCHOR = re.compile(r"^(Conv_0/kernel|ResnetBlockBigGANpp_0/.*)$")


def recognizes(path: Path) -> bool:
    """Return whether a file starts like a flax checkpoint: a msgpack map whose first key is a string."""
    with open(path, "rb") as stream:
        start = stream.read(5)
    if len(start) < 5:
        return False
    key = {0xDE: start[3], 0xDF: 0xA0}.get(start[0], start[1])
    return (0x80 < start[0] < 0x90 or start[0] in (0xDE, 0xDF)) and (0xA0 <= key < 0xC0 or key in (0xD9, 0xDA))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for name, child in tree.items():
            yield from _leaves(child, f"{prefix}{name}/")
    elif isinstance(tree, np.ndarray):
        yield prefix[:-1], tree


def read_leaves(path: Path, wanted: str | None = None) -> tuple[Leaves, str, str | None]:
    """Return a flax checkpoint's weights by slash-separated name, its name for them, and a sentence about the choice.

    Raises:
        CheckpointError: if it is damaged or holds no weights.
        UserError: if it does not hold the wanted weights.
    """
    try:
        document = Decoder(path.read_bytes()).document()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged or no flax checkpoint ({type(error).__name__}).") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is no flax checkpoint.")
    sets = {key: dict(_leaves(tree)) for key, tree in document.items()}
    found = [judged((str(key),), leaves) for key, leaves in sets.items() if any(map(_ANCHOR.search, leaves))]
    if not found:
        found = [judged((), dict(_leaves(document)))]
    taken, said = choose(settled(found), wanted, path)
    return taken.contents, taken.name, said


def _count(leaves: Leaves, kind: str) -> int:
    return len({found[0] for name in leaves if (found := re.match(rf"{kind}_\d+(?=/)", name))})


def detect(leaves: Leaves) -> SongConfig:
    """Return the network table of a flax NCSN++.

    Raises:
        CheckpointError: if names are missing or it is another network.
    """
    try:
        base = leaves["Conv_0/kernel"].shape[3]
        levels = _count(leaves, "Downsample") + 1
        total = _count(leaves, "ResnetBlockBigGANpp")
        # levels * n blocks down, two in the middle, levels * (n + 1) up, and one for each change of resolution.
        count, rest = divmod(total - 2 - levels - 2 * (levels - 1), 2 * levels)
        widths = [
            leaves[f"ResnetBlockBigGANpp_{level * (count + 1)}/Conv_1/kernel"].shape[3] for level in range(levels)
        ]
        leaves["GaussianFourierProjection_0/W"]
    except KeyError as error:
        raise CheckpointError(f"the flax weights are no NCSN++: they lack {error}.") from None
    if rest or count < 1:
        raise CheckpointError(f"the flax weights are no known NCSN++: {total} blocks do not fit {levels} levels.")
    return network_config(
        kind="song",
        channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_blocks=count,
        attention=(ATTENTION,),
        head_channels=ONE_HEAD,
        group_channels=4,
        scale_shift=False,
        embedding="fourier",
        encoder="residual",
        resample_filter=(1, 3, 3, 1),
    )


def _order(config: SongConfig) -> Iterator[tuple[str, str | None]]:
    """Yield (EDM block, "attention" if it has one) in the order in which flax numbers its blocks."""
    levels = len(config.channel_mult)
    count = config.num_blocks if isinstance(config.num_blocks, int) else config.num_blocks[0]
    sides = [SIDE // 2**level for level in range(levels)]
    for level, side in enumerate(sides):
        if level:
            yield f"enc.{side}x{side}_down", None
        yield from (
            (f"enc.{side}x{side}_block{j}", "attention" if side in config.attention else None) for j in range(count)
        )
    yield f"dec.{sides[-1]}x{sides[-1]}_in0", "attention"
    yield f"dec.{sides[-1]}x{sides[-1]}_in1", None
    for level in reversed(range(levels)):
        side = sides[level]
        if level < levels - 1:
            yield f"dec.{side}x{side}_up", None
        for j in range(count + 1):
            yield f"dec.{side}x{side}_block{j}", "attention" if j == count and side in config.attention else None


def _plan(config: SongConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (flax layer, our layer, kind) with kind "conv", "dense", "norm" or "attention"."""
    yield from (("Dense_0", "map_layer0", "dense"), ("Dense_1", "map_layer1", "dense"))
    yield from (("Conv_0", f"enc.{SIDE}x{SIDE}_conv", "conv"), ("GroupNorm_0", f"dec.{SIDE}x{SIDE}_aux_norm", "norm"))
    yield "Conv_1", f"dec.{SIDE}x{SIDE}_aux_conv", "conv"
    for level in range(1, len(config.channel_mult)):
        side = SIDE // 2**level
        yield f"Downsample_{level - 1}/Conv2d_0", f"enc.{side}x{side}_aux_residual", "conv"
    attention = 0
    for index, (ours, attends) in enumerate(_order(config)):
        theirs = f"ResnetBlockBigGANpp_{index}"
        for part, name in (("GroupNorm_0", "norm0"), ("GroupNorm_1", "norm1")):
            yield f"{theirs}/{part}", f"{ours}.{name}", "norm"
        for part, name in (("Conv_0", "conv0"), ("Conv_1", "conv1"), ("Conv_2", "skip")):
            yield f"{theirs}/{part}", f"{ours}.{name}", "conv"
        yield f"{theirs}/Dense_0", f"{ours}.affine", "dense"
        if attends:
            yield f"AttnBlockpp_{attention}", ours, "attention"
            attention += 1


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _attention(leaves: Leaves, theirs: str) -> dict[str, Tensor]:
    """Join the three projections into one convolution in EDM's order, and transpose all (in, out) matrices."""
    matrices = [_tensor(leaves.pop(f"{theirs}/NIN_{i}/W")).t() for i in range(4)]
    biases = [_tensor(leaves.pop(f"{theirs}/NIN_{i}/b")) for i in range(4)]
    joined = {"weight": torch.cat(matrices[:3])[:, :, None, None], "bias": torch.cat(biases[:3])}
    result = {f"qkv.{part}": reorder_qkv(value, 1, "three-heads-channels", EDM_QKV) for part, value in joined.items()}
    result |= {"proj.weight": matrices[3][:, :, None, None].contiguous(), "proj.bias": biases[3]}
    norm = {"weight": "scale", "bias": "bias"}
    return result | {
        f"norm2.{ours}": _tensor(leaves.pop(f"{theirs}/GroupNorm_0/{part}")) for ours, part in norm.items()
    }


def translate(leaves: Leaves, config: SongConfig) -> dict[str, Tensor]:
    """Return our tensors; `leaves` is consumed.

    Raises:
        CheckpointError: if leaves are missing or left over.
    """
    result = {"map_noise.freqs": _tensor(leaves.pop("GaussianFourierProjection_0/W"))}
    try:
        for theirs, ours, kind in _plan(config):
            if kind == "attention":
                result |= {f"{ours}.{name}": value for name, value in _attention(leaves, theirs).items()}
                continue
            # A fused downsampling convolution is a separate module with torch-like names.
            weight = next((name for name in ("kernel", "scale", "weight") if f"{theirs}/{name}" in leaves), None)
            if weight is None and theirs.endswith("Conv_2"):
                continue
            array = leaves.pop(f"{theirs}/{weight}")
            axes = {"conv": (3, 2, 0, 1), "dense": (1, 0), "norm": (0,)}[kind]
            result[f"{ours}.weight"] = _tensor(array.transpose(axes))
            result[f"{ours}.bias"] = _tensor(leaves.pop(f"{theirs}/bias"))
    except KeyError as error:
        raise CheckpointError(f"the flax weights are no known NCSN++: they lack {error}.") from None
    if leaves:
        raise CheckpointError(f"the flax weights hold {len(leaves)} arrays that an NCSN++ does not: {named(leaves)}.")
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    for block in {
        match[0] for name in result if (match := re.match(r"(enc|dec)\.\d+x\d+_(down|up|aux_residual)", name))
    }:
        for part in ("",) if block.endswith("residual") else (".conv0", ".skip"):
            result[f"{block}{part}.resample_filter"] = (taps.outer(taps) / 64)[None, None]
    return result


def read(path: Path, wanted: str | None = None) -> Foreign:
    """Read a JAX CIFAR-10 checkpoint; `wanted`: "ema", "raw" or a name; None prefers an average.

    Raises:
        CheckpointError: if it is damaged or holds another network.
        UserError: if it does not hold the wanted weights.
    """
    leaves, name, said = read_leaves(path, wanted)
    config = detect(leaves)
    channels = leaves["Conv_0/kernel"].shape[2]
    notes = ["flax weights do not name the image side; 32 with attention at 16 px, as published, was assumed."]
    notes += [said] if said else []
    translated = translate(leaves, config)
    return Foreign("jax", config, channels, SIDE, None, NOISE_SCALE, translated, weights=name, notes=notes)
