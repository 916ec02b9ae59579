"""Being one of several processes that a launcher (torchrun, SLURM) started: what can be known without torch."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def in_world() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the only process, or the one of several that speaks."""
    return os.environ.get("RANK", "0") == "0"


def main_of_a_rank(main: Callable[[], int]) -> NoReturn:
    """Call `main` and exit with what it returns; one of several processes skips the interpreter's own end.

    gloo's threads outlive `destroy_process_group` where anything still holds the group (FSDP's modules do). One that
    lets go of a tensor while the interpreter ends asks for its lock, is refused, and takes the process down with
    SIGABRT ("terminate called without an active exception"): the launcher then calls a finished run failed. Exit
    handlers still run.
    """
    code = 1
    if in_world():
        # Registered first, so called last: after the threads are joined and every other handler has run.
        atexit.register(lambda: _leave(code))
    code = main()
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
