"""The C library's allocator, told to keep what it has."""

from __future__ import annotations

import ctypes
import sys

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
