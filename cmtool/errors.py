"""Every error that a user can cause, as one small family of exceptions.

A `UserError` carries one clear sentence and, if there is one, the next thing to type. The command
line prints both and exits with `exit_code`; a library user catches `UserError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix: one sentence (`message`) and what to do next (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """The command line itself is wrong (an option, its value, a combination): exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A preset, a recipe or a `--set` holds something that the schema refuses."""


class DataError(UserError):
    """A data source is missing, empty, unreadable or of the wrong shape."""


class CheckpointError(UserError):
    """A model file, checkpoint or run folder is missing, damaged or of the wrong kind."""


class OfflineError(UserError):
    """Something has to be downloaded and cannot be."""


class DivergenceError(UserError):
    """Training produced numbers that are not finite; the last good checkpoint is kept."""


class Terminated(BaseException):
    """SIGTERM ends the command at once; not an `Exception`, so that no handler on the way swallows it."""

    exit_code = 143


# The package's name on package indexes, where `cmtool` belongs to another project.
DISTRIBUTION = "cmtool-consistency"


def install_extra(extra: str) -> str:
    """Return the command that installs what this package's extra `extra` needs, e.g. "track"."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


_LONGEST_NAME = 100


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of `choices` most like `word`, as a whole or in a part (of_this_kind), best first."""
    if len(word) > _LONGEST_NAME:  # no name is that long, and the cost of comparing grows with its square
        return []

    def likeness(choice: str) -> float:
        parts = [choice.lower(), *choice.lower().replace("-", "_").split("_")]
        begins = any(part.startswith(word.lower()) for part in parts) and len(word) > 1
        return max(0.9 * begins, *(difflib.SequenceMatcher(None, word.lower(), part).ratio() for part in parts))

    ranked = sorted(((likeness(choice), choice) for choice in choices), key=lambda pair: -pair[0])
    return [choice for score, choice in ranked if score >= 0.6][:count]


def unknown(kind: str, word: str, choices: Iterable[str]) -> str:
    """Say that `word` is no `kind`, and name the choices and the nearest one."""
    pool = list(choices)
    sentence = f"unknown {kind} '{word}'; choose from {', '.join(pool)}" if pool else f"unknown {kind} '{word}'"
    close = nearest(word, pool)
    return f"{sentence}. Did you mean {close[0]}?" if close else f"{sentence}."
