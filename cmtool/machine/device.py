"""The device that a program computes on, and the settings of torch for the whole process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

from cmtool.errors import UserError
from cmtool.machine.giving_way import give_way

# mallopt(3): parameter numbers of glibc, and the largest threshold that it takes on 64 bits.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
NEVER = (1 << 31) - 1


def keep_freed_memory(most: int = NEVER) -> bool:
    """Let glibc keep freed memory for the next tensor; returns whether it agreed (False on other systems).

    `most`: bytes free at the top of the heap above which it gives them back; a process that sets nothing comes to
    64 MiB by itself.

    Every step allocates the same activations. Given back to the system in between, each page is cleared and mapped
    again: about 20,000 page faults and 2 to 3 % of a step for a network of 7 M parameters at 32 px. The process then
    stays at its largest size until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, most)) and bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))


# --- the device -------------------------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, so that sums have one order and the trained weights do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
