"""How long-running work reports to its caller: one protocol for the command line, the studio and Python callers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Update(Protocol):
    """Moves a progress display."""

    def __call__(self, advance: float = 1, note: str = "", completed: float | None = None) -> None:
        """Move by `advance`, or to `completed` if that is given, and show `note` next to the bar."""


class Talk(Protocol):
    """Receives what long work has to say. It never decides anything: leaving it out changes no result."""

    def say(self, text: str) -> None:
        """Tell the user one sentence."""

    def warn(self, text: str) -> None:
        """Tell the user that something is wrong although the work continues."""

    def progress(self, total: int | None, description: str = "") -> AbstractContextManager[Update]:
        """Show progress towards `total` (None: unknown) while a block runs; yields the function that moves it."""


class Silence:
    """A Talk that discards everything."""

    def say(self, text: str) -> None:
        """Drop a sentence."""

    def warn(self, text: str) -> None:
        """Drop a warning."""

    @contextmanager
    def progress(self, total: int | None, description: str = "") -> Iterator[Update]:
        """Show nothing."""
        yield lambda advance=1, note="", completed=None: None


class Aloud(Silence):
    """What a Python program hears: warnings, as Python's own."""

    def warn(self, text: str) -> None:
        """Warn at the line that called into the package."""
        warnings.warn(text, stacklevel=_depth_outside())


def _depth_outside() -> int:
    """How many frames up from the caller the first one outside this package lies, as `warnings.warn` counts them."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("cmtool."):
        depth, frame = depth + 1, frame.f_back
    return depth


SILENCE, ALOUD = Silence(), Aloud()
