"""The number format of a run: what `auto` means on this machine, and how much rounding a recipe can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cmtool.config.networks import NETWORKS
from cmtool.config.schema import RunConfig
from cmtool.errors import ConfigError
from cmtool.models import HALF, Model
from cmtool.networks.convolution import hold_in, set_backward_dtype


@dataclass(frozen=True)
class Plan:
    """A precision: its name, and the format of all passes (`autocast`), of convolutions' gradients, of the teacher.

    None means the weights' own format. `paired` rounds not only the gradients but also the convolutions of student and
    target, those of the target as differences from the student's. `tf32` lets convolutions of float32 numbers round
    their operands to ten bits, which a GPU does unless told not to.
    """

    name: str
    autocast: torch.dtype | None = None
    backward: torch.dtype | None = None
    teacher: torch.dtype | None = None
    paired: bool = False
    tf32: bool = False

    def apply(self, student: Model) -> Model:
        """Set how the student and its copies compute; return the student."""
        if self.name == "fp64":
            student = student.double()
        student.autocast, student.paired = self.autocast, self.paired
        set_backward_dtype(student.network, self.backward)
        return student

    def apply_to_teacher(self, teacher: Model) -> Model:
        """Set how the teacher computes; return it."""
        if self.name == "fp64":
            teacher = teacher.double()
        teacher.autocast = self.teacher
        if self.teacher is not None:
            hold_in(teacher.network, self.teacher)
        return teacher

    def describe(self) -> str:
        """Return the line shown at start-up."""
        if self.paired:
            return f"precision {self.name}: convolutions in bfloat16, the target's as differences from the student's"
        if self.backward is not None:
            return f"precision {self.name}: gradients in bfloat16, forward passes of student and target in float32"
        if self.autocast is not None:
            return f"precision {self.name}: all passes of the networks"
        return f"precision {self.name}" + (", convolutions in TF32" if self.tf32 else "")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32 (CPU: AVX512-BF16 or AMX; GPU: tensor cores)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.13
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def gains(config: RunConfig) -> bool:
    """Whether network and pictures are large enough to be faster in bfloat16."""
    network = config.network
    wide = network.halves == "convolutions" and network.channels >= network.halves_from
    return wide and config.data.resolution >= network.halves_side


def refused(config: RunConfig) -> str | None:
    """Return why a recipe does not train in bfloat16, None if it does.

    A recipe that differentiates through a tangent has no form that rounds only gradients. Networks without
    these convolutions have no backward pass in half precision, and rounding their forward passes drowns the small
    differences that a consistency model learns from.
    """
    target = config.recipe.target
    if config.recipe.score.kind != "none":
        return "it learns from the difference of two denoisers, which bfloat16 rounds away"
    if target.rule == "data":
        return None
    if target.differentiates and not target.stop_gradient:
        return "it differentiates through the tangent, which bfloat16 rounds away"
    if config.train.half_passes != "all" and config.network.halves == "none":
        able = " and ".join(kind for kind, table in NETWORKS.items() if table.halves == "convolutions")
        return (
            "bfloat16 rounds away the small differences that it learns from, and gradients alone are rounded in "
            f"{able} networks, not in network.kind = '{config.network.kind}'"
        )
    return None


def pairs(config: RunConfig) -> bool:
    """Whether prediction and target come from one network (or its average) at two points, by the same operations.

    Forward passes stay in float32 for a network whose convolutions depend on the noise level, and for one that is split
    over processes or compiled; also for one that recomputes blocks to save memory, since a pair would hold on to them.
    """
    whole = config.process.truncated_at is None and not config.train.shard and not config.train.compile
    whole = whole and not config.network.checkpointing
    return config.train.half_passes == "pair" and config.recipe.target.rule in ("pair", "two_leg") and whole


def settle_precision(config: RunConfig, device: torch.device) -> Plan:
    """Return how a run computes on a device.

    `auto` is bfloat16 if device, network and recipe gain from it and tolerate it, otherwise float32. For a diffusion
    model bfloat16 rounds all passes; for a consistency model it rounds the gradients and, in pairs, the forward passes,
    or what `train.half_passes` says.

    On a GPU float32 diffusion models compute convolutions in TF32. That is too coarse for a consistency model with
    many scales: with 1,281 of them, at t = 10, the gradient of a random network has a cosine of .74 to the exact one.

    Raises:
        ConfigError: if the recipe does not train in bfloat16, or the device lacks the precision.
    """
    name = config.train.precision
    if name == "auto":
        suits = has_fast_bf16(device) and gains(config) and refused(config) is None
        name = "bf16" if suits else "fp32"
    if name == "fp64" and device.type == "mps":
        raise ConfigError("an mps device has no float64.", "add --device cpu")
    if name == "bf16" and (reason := refused(config)):
        raise ConfigError(f"recipe '{config.recipe_name}' does not train in bf16: {reason}.", "use --precision fp32")
    half = HALF.get(name)
    if name == "bf16" and config.recipe.target.rule != "data" and config.train.half_passes != "all":
        return Plan(name, backward=half, teacher=half, paired=pairs(config))
    coarse = device.type == "cuda" and config.recipe.target.rule == "data" and config.recipe.score.kind == "none"
    return Plan(name, autocast=half, teacher=half, tf32=coarse)
