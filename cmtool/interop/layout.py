"""What every reader of foreign weights returns, and the operations they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmtool.config.networks import NetworkConfig
from cmtool.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Form = Literal["edm", "consistency"]

# The order of q, k and v among the output channels of an attention layer's first convolution, slowest axis first.
QkvOrder = Literal["three-heads-channels", "heads-three-channels", "heads-channels-three"]
_AXES: dict[str, tuple[int, int, int]] = {
    "three-heads-channels": (0, 1, 2),
    "heads-three-channels": (1, 0, 2),
    "heads-channels-three": (1, 2, 0),
}


@dataclass
class Foreign:
    """A translated model from another code base: our network table, our tensor names, and what its file says.

    `form`, `sigma_min`, `sigma_max`, `sigma_data` and `grid` (the number of grid points used in training) are None
    where the file does not say. `parameterization` follows from the form unless set. `weights` is the file's name for
    the chosen weights ("": it has none). `unbounded`: images are not confined to [-1, 1]. `label_dropout`: share of
    labels that training replaced by the null class. `header`: the whole header of a model that we exported. `notes`
    tell the user what was dropped or assumed.
    """

    layout: str
    network: NetworkConfig
    channels: int
    resolution: int
    num_classes: int | None
    noise_scale: float
    tensors: dict[str, Tensor]
    form: Form | None = None
    parameterization: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float | None = None
    grid: int | None = None
    weights: str = ""
    unbounded: bool = False
    label_dropout: float = 0.0
    header: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors on the CPU, dense and detached."""
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}


def reorder_qkv(tensor: Tensor, heads: int, source: QkvOrder, target: QkvOrder) -> Tensor:
    """Return a qkv weight (3C, ...) or bias (3C,) with its rows in another order; `heads` divides C."""
    if source == target:
        return tensor
    per_head = tensor.shape[0] // (3 * heads)
    sizes = (3, heads, per_head)
    rest = list(range(3, 2 + tensor.ndim))
    there, back = _AXES[source], _AXES[target]
    split = tensor.reshape([sizes[axis] for axis in there] + list(tensor.shape[1:]))
    plain = split.permute([there.index(axis) for axis in range(3)] + rest)
    return plain.permute([*back, *rest]).reshape(tensor.shape)


def take(source: MutableMapping[str, Tensor], name: str) -> Tensor:
    """Remove and return one tensor, so that a conversion never holds two copies.

    Raises:
        CheckpointError: if it is absent.
    """
    try:
        return source.pop(name)
    except KeyError:
        raise CheckpointError(f"the weights lack '{name}'.") from None


def named(names: Iterable[str], limit: int = 10) -> str:
    """Return the first `limit` names and the number of the rest."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest


def compare_names(found: Shapes, expected: Shapes, what: str) -> None:
    """Check that the file holds exactly the tensors of the recognized network.

    Raises:
        CheckpointError: with the number of missing, surplus and misshapen tensors and the first ten names of each.
    """
    missing, surplus = set(expected) - set(found), set(found) - set(expected)
    misshapen = {
        f"{name} {found[name]} instead of {expected[name]}"
        for name in set(found) & set(expected)
        if tuple(found[name]) != tuple(expected[name])
    }
    parts = [
        f"{len(group)} {label}: {named(group)}"
        for label, group in (("missing", missing), ("surplus", surplus), ("of another shape", misshapen))
        if group
    ]
    if parts:
        raise CheckpointError(f"{what} does not hold what its layout needs: {'; '.join(parts)}.")


def widen(tensors: dict[str, Tensor]) -> str | None:
    """Widen half-precision tensors to float32 in place; return a sentence about it, or None if there were none."""
    halves = [name for name, tensor in tensors.items() if tensor.dtype in (torch.float16, torch.bfloat16)]
    for name in halves:
        tensors[name] = tensors[name].float()
    return (
        f"{len(halves)} of {len(tensors)} tensors are half precision; they were widened to float32." if halves else None
    )
