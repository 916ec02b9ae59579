"""The device that a program computes on, and the settings of torch for the whole process."""

from __future__ import annotations

import os

import torch

from cmtool.errors import UserError
from cmtool.machine.giving_way import give_way
from cmtool.machine.memory import keep_freed_memory


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that `name` means: "auto" takes cuda, then mps, then cpu; of several GPUs the `local_rank`-th.

    A process that computes on a CPU gives way to others from then on.

    Raises:
        UserError: for an unknown device, or one that this machine lacks.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind = name.split(":")[0]
    if kind not in there:
        raise UserError(f"unknown device '{name}'; choose auto, cpu, cuda or mps.")
    if not there[kind]:
        raise UserError(f"this machine has no usable {kind} device.", "use --device cpu, or leave --device out")
    if kind == "cpu":
        give_way()
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    return torch.device(name)


def set_up_torch(threads: int | None, deterministic: bool) -> None:
    """Apply the settings of the whole process: keep freed memory, use `threads` CPU threads (None: torch's choice).

    `deterministic`: refuse algorithms whose results differ from run to run.
    """
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
