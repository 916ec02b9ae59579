"""Faster forms of networks that a run may ask for: compiled blocks, kernels of our own, pairs of passes side by side.

torch.compile works block by block: a network that cannot be compiled runs as it is, and the reason is reported. Blocks
of one kind and width share one compilation, so that a large network takes seconds where compiling it as a whole takes
minutes. Recomputed blocks (`network.checkpointing`) are compiled like others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmtool.config.schema import RunConfig
from cmtool.losses.assemble import has_dropout
from cmtool.models import Model, beside
from cmtool.networks.in_step import Race
from cmtool.training.sharding import units
from cmtool.training.state import TrainState

# Kinds of blocks that may share one function.
KINDS = 64


def trial(model: Model, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return inputs (x, t, label) of the shapes that training will use: `batch` images of zeros at level sigma_max."""
    x = torch.zeros(batch, *model.image_shape, device=model.device, dtype=model.dtype)
    label = None if model.num_classes is None else torch.zeros(batch, dtype=torch.int64, device=model.device)
    return x, torch.full((batch,), model.sigma_max, device=model.device, dtype=model.dtype), label


def compile_network(model: Model, batch: int, backend: str = "inductor") -> str | None:
    """Compile the blocks of a model's network in place and try them, forward and (if it is trained) backward.

    It works in place, so that weights keep their names. Returns None, or one line on why it failed; the network is then
    as it was before.
    """
    network: nn.Module = model.network
    trained = any(parameter.requires_grad for parameter in network.parameters())
    try:
        # Blocks differ by width, side and resampling: more kinds than the compiler allows for one function.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)  # type: ignore[attr-defined]
        for block in units(network):
            block.compile(backend=backend)
        seen = model.condition
        pictures = None if seen is None else torch.zeros(1, seen.channels, *model.image_shape[1:], device=model.device)
        with torch.set_grad_enabled(trained), beside(pictures):
            answer = model(*trial(model, batch))
            if trained:
                answer.sum().backward()
    except Exception as error:  # compiler, back end and graph may raise anything, and none of it is a reason to stop
        leave_plain(network)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        model.zero_grad(set_to_none=True)
    return None


def leave_plain(network: nn.Module) -> None:
    """Let a network run as it is, whatever parts of it were compiled."""
    for part in network.modules():
        part._compiled_call_impl = None


def fuse(config: RunConfig, device: torch.device, models: list[Model]) -> list[str]:
    """Let networks on a GPU take kernels of our own if `train.fused_norm` is set; return the messages to show."""
    if not config.train.fused_norm:
        return []
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return ["train.fused_norm needs a GPU and Triton, which torch brings along on Linux; the networks do without."]
    from cmtool.networks.fused import use

    for model in models:
        use(model.network)
    return []


def put_in_step(config: RunConfig, student: Model) -> list[str]:
    """Let the passes of a pair run side by side if `train.pairs_in_step` is set; return the messages to show."""
    if not config.train.pairs_in_step:
        return []
    if student.device.type != "cuda" or not student.paired or has_dropout(config):
        return ["train.pairs_in_step needs a GPU, pairs in bfloat16 and no dropout; passes run one after the other."]
    student.pairing = Race()
    return []


def compile_all(config: RunConfig, state: TrainState, frozen: Sequence[Model], batch: int) -> list[str]:
    """Compile student, target, fake and frozen networks if `train.compile` is set; return the messages to show."""
    if not config.train.compile:
        return []
    if config.network.dropout:
        # Two passes under one seed must draw the same mask; the compiler's own generator does not promise that.
        torch._inductor.config.fallback_random = True  # type: ignore[attr-defined]
    models = [*(learner.model for learner in state.learners), state.target, *frozen]
    for model in dict.fromkeys(models):
        reason = compile_network(model, batch)
        if reason is not None:
            for other in models:
                leave_plain(other.network)
            return [f"torch.compile failed, the networks run as they are ({reason})."]
    return [
        "networks compiled by blocks; the first steps may still compile for other shapes. Passes are not recorded as "
        "CUDA graphs, nor computed as pairs in bfloat16."
    ]
