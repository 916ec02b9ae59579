"""What went wrong, as a sentence, a hint and an exit code: the one error table of the command line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from typing import Any, NamedTuple

import typer

from cmtool.cli.output import spelled
from cmtool.errors import ConfigError, UsageError, UserError, nearest


class Failure(NamedTuple):
    """One sentence, what to do next (or None), and the exit code."""

    sentence: str
    hint: str | None
    code: int


def report(error: BaseException, json_mode: bool, command: str = "") -> int:
    """Say on stderr what went wrong (with `--json`: as a document on stdout) and return the exit code.

    `command` is the one that was typed ("sample"), to point at its help.
    """
    failure = describe(error, command)
    if os.environ.get("CMTOOL_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if json_mode:
        print(json.dumps({"error": failure.sentence, "hint": failure.hint}, ensure_ascii=False), flush=True)
        return failure.code
    print(f"Error: {failure.sentence}", file=sys.stderr)
    if failure.hint:
        print(f"Hint: {failure.hint}", file=sys.stderr)
    return failure.code


def _one_line(text: str) -> str:
    """Spell out what does not print: names and values from a strange file must not break lines or steer a terminal."""
    shown = spelled(text, keep="")
    return shown if len(shown) <= 1000 else f"{shown[:600]} ... {shown[-350:]}"


def describe(error: BaseException, command: str = "") -> Failure:
    """Return what to tell the user about any exception; `command` as in `report`."""
    if isinstance(error, UserError):
        return Failure(_one_line(error.message), error.hint or _next(error, command), error.exit_code)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Failure("interrupted", None, 130)
    if hasattr(error, "format_message"):  # typer's own; typer names their class only since 0.28
        return _usage(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure("out of memory", "Use a smaller --batch-size; in training --micro-batch keeps the result.", 1)
    words = " ".join(str(error).split()) or "no message"
    short = words if len(words) <= 300 else words[:297] + "..."
    return Failure(f"{type(error).__name__}: {short}", "This should not happen: CMTOOL_DEBUG=1 shows where it did.", 1)


def _next(error: UserError, command: str) -> str | None:
    """Return what to type after a mistake that has no hint."""
    if isinstance(error, ConfigError):
        return "cmtool presets lists the presets; cmtool presets NAME shows every setting of one."
    return f"cmtool {command} --help" if isinstance(error, UsageError) and command else None


def _usage(error: Any) -> Failure:
    """A wrong command line, in our form: the sentence, the nearest option, and where help is."""
    context = getattr(error, "ctx", None)
    sentence = error.format_message()
    wrong = getattr(error, "option_name", None)
    if context is not None and wrong and type(error).__name__ == "NoSuchOption":
        known = [name for param in context.command.params for name in param.opts if name.startswith("--")]
        close = nearest(wrong.lstrip("-"), [name[2:] for name in known])
        sentence = f"no such option {wrong}." + (f" Did you mean --{close[0]}?" if close else "")
    hint = f"{context.command_path} --help" if context is not None else "cmtool --help"
    cause = error.__cause__
    if cause is not None and getattr(error, "param", None) is not None and hasattr(cause, "errors"):
        sentence = _bad_value(max(error.param.opts, key=len), cause.errors()[0])
    sentence = " ".join(sentence.split())
    return Failure(sentence[:1].lower() + sentence[1:], hint, error.exit_code)


def _bad_value(option: str, problem: Any) -> str:
    """A value that an option refuses, in the words that a wrong setting in a file gets."""
    from cmtool.config.explain import requirement, shown_value
    from cmtool.config.toml import parse_value

    value = parse_value(str(problem["input"]))
    said = re.search(r"is not one of (.*?)\.?$", str(problem["msg"]))
    if said is None:
        return f"{option} = {shown_value(value)} {requirement(problem)}"
    choices = re.findall(r"'([^']*)'", said[1])
    close = nearest(str(value), choices)
    return f"{option} = {shown_value(value)} is unknown; choose {', '.join(choices)}." + (
        f" Did you mean {close[0]}?" if close else ""
    )


def _system(error: OSError) -> Failure:
    where = f"{error.filename}: " if error.filename else ""
    hint = {
        errno.ENOSPC: "Free some disk space or choose another place with --out.",
        errno.EACCES: "Check the permissions, or choose another place with --out.",
        errno.EROFS: "Choose another place with --out.",
    }.get(error.errno or 0)
    return Failure(f"{where}{(error.strerror or str(error)).lower()}", hint, 1)
