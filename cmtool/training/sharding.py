"""Networks in pieces: with `train.shard` every process keeps its rows of each weight (torch's FSDP2, `fully_shard`).

torch gathers a block's weights before its pass, frees them afterwards, and sums gradients into each process's rows.
Optimizer and averages work value by value, so they take those rows like any other tensor. Checkpoints are gathered into
the same form that a single process writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtool.config.parts import TargetPart
from cmtool.errors import ConfigError
from cmtool.machine.world import World

# Used outside the network's own pass, where it is not gathered; it is only a few dozen numbers.
HEAD = "log_variance_head."


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, sharing its memory; return any other tensor unchanged."""
    # torch's class of sharded tensors takes long to import; this method identifies it.
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.to_local()
        return rows.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold the other rows of a tensor."""
    return hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """Return all rows of a tensor, detached; every process must call this in the same order."""
    if not is_sharded(tensor):
        return tensor.detach()
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def share(full: Tensor, like: Tensor) -> Tensor:
    """Return the rows of `full` that this process holds of `like`, a tensor of the same shape."""
    if not is_sharded(like):
        return full
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    rows = full.chunk(mesh.size(), 0)
    return rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else full[:0]


def units(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network whose weights are gathered together: modules of several layers with one call.

    It looks inside lists, even those with their own `forward`: before torch 2.13 `fully_shard` does not take lists.
    """
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from units(child)
        elif any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child


class Sharding:
    """Splits networks over the processes of a run.

    `device` is this process's device. A network may be on any device before it is split; its rows end up on this one.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.world = world
        self.device = device
        self.mesh = init_device_mesh(device.type, (world.size,))

    def apply(self, network: nn.Module) -> None:
        """Split a network in place; single numbers and the log-variance head stay whole in every process."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        kept = {p for name, p in network.named_parameters() if p.dim() == 0 or name.startswith(HEAD)}
        for parameter in network.parameters():
            # fully_shard takes only dense rows, and leaves alone what it does not split.
            parameter.data = parameter.data.contiguous()
            if parameter in kept:
                parameter.data = parameter.data.to(self.device)
        for module in (*units(network), network):
            # The root too: an average runs without a backward pass, so its old weights would stay gathered.
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=kept)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                # A process's loss is divided by the global batch, so gradients are summed, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def total_norm(self, rows: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        """Return the Euclidean norm, () in float64, of tensors of which this process has `rows`, and all `kept`."""
        # In one dtype everywhere: a process without rows would otherwise return another.
        square, other = (nn.utils.get_total_norm(part).to(self.device, torch.float64) ** 2 for part in (rows, kept))
        dist.all_reduce(square)
        return (square + other).sqrt()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all rows of every tensor on the CPU in process 0 and nothing in the others; all must call it."""
        found = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.world.main:
                found[name] = full.cpu()
        return found

    def gather_moments(self, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the optimizer's tensors, named `<parameter>.<entry>`, as `gather` does."""
        from torch.distributed.tensor import DTensor

        rows: dict[str, Tensor] = {}
        for name, value in moments.items():
            like: Any = parameters[name.rsplit(".", 1)[0]]
            if is_sharded(like) and value.dim():
                # Given explicitly, because processes may hold different numbers of rows.
                layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
                value = DTensor.from_local(value, like.device_mesh, like.placements, **layout)
            rows[name] = value
        return self.gather(rows)


def gathers_in_derivatives(release: Any = torch.__version__) -> bool:
    """Whether this torch can gather weights within a forward-mode derivative; before 2.13 it fails there."""
    return bool(release >= (2, 13))


def check_derivative(part: TargetPart) -> None:
    """Refuse a forward-mode derivative if this torch cannot gather weights within it.

    Raises:
        ConfigError: names the setting that needs no such derivative.
    """
    if part.differentiates and part.derivative == "forward" and not gathers_in_derivatives():
        raise ConfigError(
            f"train.shard = true takes forward-mode derivatives from torch 2.13 on, and this is {torch.__version__}.",
            "use --set recipe.target.derivative=difference, or leave train.shard out",
        )


def check_shardable(batch_size: int, world: World) -> None:
    """Refuse a batch that gives the processes different numbers of passes, because one would wait forever.

    Raises:
        ConfigError: names the nearest batches that fit.
    """
    if batch_size % world.size:
        below = batch_size // world.size * world.size
        near = f"{below} or {below + world.size}" if below else str(world.size)
        raise ConfigError(
            f"train.shard = true needs as many images in every process: {batch_size} over {world.size} is uneven.",
            f"use --batch-size {near}, or leave train.shard out",
        )
