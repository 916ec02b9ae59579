"""Several processes as one: who computes which rows, and how decisions are agreed on.

Noise, times and data order are functions of the global row, so that any number of processes takes the same step.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cmtool.errors import UserError
from cmtool.machine.launch import in_world


@dataclass(frozen=True)
class World:
    """The processes of a run; a single one without any set-up is `World()`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def rows(self, total: int) -> tuple[int, int]:
        """Return (start, count) of this process's share of `total` rows: contiguous, sizes differing by at most one."""
        start = total * self.rank // self.size
        return start, total * (self.rank + 1) // self.size - start

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether `flag` is set in any process: all of them get the same answer."""
        if self.size == 1:
            return flag
        told = torch.tensor([int(flag)], device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather_first(self, value: Any) -> list[Any]:
        """Return the values of all processes in the order of their ranks, in process 0; nothing in the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, found)
        return found or []

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send what C++ code prints to stderr: gloo before torch 2.13 greets on stdout, which belongs to data."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


# The others wait while process 0 evaluates or puts samples together; the launcher ends all when one dies.
PATIENCE = timedelta(hours=24)


@contextlib.contextmanager
def join_world(device_type: str) -> Iterator[World]:
    """Join the processes that a launcher (torchrun, SLURM's srun with its variables) started; else do nothing.

    Raises:
        UserError: if the other processes cannot be reached.
    """
    if not in_world():
        yield World()
        return
    if dist.is_initialized():  # by a caller who joined for longer; they meet here all the same
        dist.barrier()
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        return
    backend = "nccl" if device_type == "cuda" else "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        # Objects are sent through the current device; if all processes use the first one, nccl refuses.
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    try:
        with _stdout_kept_clean():
            dist.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes of this run could not meet: {str(error).splitlines()[0]}",
            "start them with torchrun --nproc-per-node N -m cmtool train-ct ...",
        ) from error
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()
