"""Stopping at a good moment: Ctrl-C, the scheduler's SIGTERM, and a time limit end a run between two steps."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from cmtool.errors import UsageError

_SPAN = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?\Z")


def parse_span(text: str) -> float:
    """Return the seconds of a time span such as "3h55m", "90s", "1d" or "30" (seconds).

    Raises:
        UsageError: if it is none.
    """
    match = _SPAN.match(text.strip().lower())
    values = [float(group) if group else 0.0 for group in match.groups()] if match else [0.0]
    seconds = sum(value * unit for value, unit in zip(values, (86400, 3600, 60, 1), strict=False))
    if seconds <= 0:
        raise UsageError(f"'{text}' is no time span; write it as 3h55m, 90s or 1d.")
    return seconds


@dataclass
class Stop:
    """Asked between steps; `signal` is the number of the one that arrived (0: none)."""

    deadline: float | None = None
    signal: int = 0

    @property
    def now(self) -> bool:
        """Whether to save and leave."""
        return self.signal != 0 or self.out_of_time

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@contextlib.contextmanager
def stoppable(max_seconds: float | None = None) -> Iterator[Stop]:
    """Yield a `Stop` that SIGINT and SIGTERM set; a second signal interrupts at once, without saving.

    Outside the main thread, where Python refuses handlers, only the time limit works.
    """
    stop = Stop(None if max_seconds is None else time.monotonic() + max_seconds)

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
