"""Stopping at a good moment: Ctrl-C, SIGTERM, a lost terminal or a time limit ends a run between two steps."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from cmtool.errors import Terminated, UsageError

T = TypeVar("T")

_SPAN = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?\Z")


def parse_span(text: str) -> float:
    """Return the seconds of a time span such as "3h55m", "90s", "1d" or "30" (seconds).

    Raises:
        UsageError: if it is not a time span.
    """
    match = _SPAN.match(text.strip().lower())
    values = [float(group) if group else 0.0 for group in match.groups()] if match else [0.0]
    seconds = sum(value * unit for value, unit in zip(values, (86400, 3600, 60, 1), strict=False))
    if seconds <= 0:
        raise UsageError(f"'{text}' is no time span; write it as 3h55m, 90s or 1d.")
    return seconds


# One request to stop may arrive twice: `timeout` and batch systems signal a process and its group. A signal that comes
# this many seconds after the first, or later, is a second request.
_SAME_WISH = 1.0


class Left(BaseException):
    """A signal ends work that may be interrupted; not an `Exception`, so that nothing inside swallows it."""


@dataclass
class Stop:
    """Asked between steps; `signal` is the number of the one that arrived (0: none).

    While `leavable` is set, the first signal raises `Left` on the spot, wherever the main thread is.
    """

    deadline: float | None = None
    signal: int = 0
    leavable: bool = False

    @property
    def now(self) -> bool:
        """Whether to save and leave."""
        return self.signal != 0 or self.out_of_time

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """Return what `work` returns; None if a signal came before it, or interrupts it, which happens at once.

        For long work that can be repeated without loss, such as judging a model. It must not wait for other processes.
        """
        result = None
        try:
            self.leavable = True
            if not self.signal:
                result = work()
            self.leavable = False
        except Left:
            pass
        except BaseException:
            self.leavable = False
            raise
        return result


def _heeded() -> list[int]:
    """Signals that ask to stop; what the caller told us to ignore (nohup, a script's background jobs) stays ignored."""
    known = [signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [signal.SIGTERM, *(number for number in known if signal.getsignal(number) is not signal.SIG_IGN)]


@contextlib.contextmanager
def stoppable(deadline: float | None = None) -> Iterator[Stop]:
    """Yield a `Stop` that SIGINT, SIGTERM and SIGHUP set; another one, a second later or more, ends without saving.

    Outside the main thread, where Python refuses handlers, only the time limit works.

    Args:
        deadline: the time limit, in seconds of `time.monotonic`.

    Raises:
        KeyboardInterrupt: on a second SIGINT.
        Terminated: on a second SIGTERM or SIGHUP.
    """
    stop = Stop(deadline)
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not stop.signal:
            stop.signal, first = number, time.monotonic()
            if stop.leavable:
                stop.leavable = False
                raise Left
        elif time.monotonic() - first >= _SAME_WISH:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in _heeded()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
