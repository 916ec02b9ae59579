"""One of several processes that a launcher (torchrun, SLURM) started: what can be known about it without torch."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def in_world() -> bool:
    """Whether a launcher such as torchrun started this process as one of several; a non-number counts as one."""
    told = os.environ.get("WORLD_SIZE", "")
    return told.isdecimal() and int(told) > 1


def is_first() -> bool:
    """Whether this is the only process, or the one of several that reports."""
    return not in_world() or os.environ.get("RANK", "0") in ("", "0")


def local_rank() -> int:
    """Return which of this machine's processes of a run this is, from 0."""
    told = os.environ.get("LOCAL_RANK", "")
    return int(told) if in_world() and told.isdecimal() else 0


def main_of_a_rank(main: Callable[[], int]) -> NoReturn:
    """Call `main` and exit with what it returns; one of several processes skips the interpreter's own end.

    gloo's threads outlive `destroy_process_group` where anything still holds the group (FSDP's modules do). One that
    lets go of a tensor while the interpreter ends asks for its lock, is refused, and takes the process down with
    SIGABRT ("terminate called without an active exception"): the launcher then calls a finished run failed. Threads are
    joined, exit handlers that are registered from here on run and the standard streams are flushed; other files that
    are still open are not.
    """
    code, process = 1, os.getpid()
    if in_world():
        # Registered first, so called last.
        atexit.register(lambda: _leave(code, process))
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    sys.exit(code)


def _leave(code: int, process: int) -> None:
    if os.getpid() != process:  # a copy of that process ends in its own way
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
