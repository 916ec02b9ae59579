"""The `cmtool` command: how commands are made of options and found by name, and where errors become exit codes.

A command's module is imported when the command is called, so that help, version and mistakes answer at once
however many commands there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TextIO, TypeVar, get_type_hints

import typer
import typer.core

from cmtool.cli.failure import describe, report
from cmtool.errors import Terminated, UserError, nearest
from cmtool.machine.launch import main_of_a_rank

# Click writes help texts into 78 columns, indented by two; examples stand two further in.
_WIDTH = 74
_EXAMPLES = re.compile(r"\s*\bExamples?: (.*)", re.DOTALL)


class Entry(NamedTuple):
    """A command: the module below `cmtool.cli`, the function or group in it, and its line in the help."""

    module: str
    attribute: str
    help: str


COMMANDS: dict[str, Entry] = {
    "train-ct": Entry("train", "train_ct", "Train a consistency model from scratch on images."),
    "train-edm": Entry("train", "train_edm", "Train a diffusion model, the teacher of train-cd."),
    "train-cd": Entry("train", "train_cd", "Distil a diffusion model into a consistency model."),
    "plan": Entry("plan", "plan", "Say what your pictures, machine and time allow."),
    "sample": Entry("sample", "sample", "Make images in one or a few steps."),
    "edit": Entry("edit", "app", "Inpaint, colorize, enlarge, denoise images without retraining."),
    "interpolate": Entry("interpolate", "interpolate", "Walk between two samples."),
    "eval": Entry("evaluate", "evaluate", "Judge samples: FID, KID, precision, recall."),
    "search-times": Entry("search", "search_times", "Find the best noise levels for several steps."),
    "presets": Entry("presets", "presets", "List the presets, or show one in full."),
    "models": Entry("models", "models", "List trained, imported and published models."),
    "info": Entry("info", "info", "Say what a model file or a run is."),
    "import": Entry("transfer", "import_model", "Turn other people's weights into a model file."),
    "export": Entry("transfer", "export_model", "Write a model for other software."),
    "data": Entry("data", "app", "Make data sets and look at them."),
    "theory": Entry("theory", "app", "Experiments whose answers are known exactly."),
    "ema": Entry("ema", "ema", "Make a moving average of another width after training."),
    "bench": Entry("bench", "bench", "Measure speed and memory."),
    "report": Entry("report", "report", "Write a page about a run."),
    "runs": Entry("runs", "app", "List and compare runs."),
    "studio": Entry("studio", "studio", "Try a model in the browser."),
}


Options = TypeVar("Options")


def command(function: Callable[..., None], *given: object, doc: str | None = None) -> Callable[..., None]:
    """Return what typer registers for `function`, whose last parameter is a dataclass of `Annotated` options.

    Each field of the dataclass becomes an option of the command, in order, and the function gets one typed instance,
    after what is `given` where several commands share it. `doc` is then the command's own docstring.
    """
    kind = [hint for name, hint in get_type_hints(function).items() if name != "return"][-1]
    hints = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)

    @functools.wraps(function)
    def typed(**values: Any) -> None:
        function(*given, kind(**values))

    typed.__doc__ = doc or function.__doc__
    nothing, word = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    defaults = [nothing if field.default is dataclasses.MISSING else field.default for field in fields]
    typed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(field.name, word, default=default, annotation=hints[field.name])
            for field, default in zip(fields, defaults, strict=True)
        ]
    )
    typed.__annotations__ = {field.name: hints[field.name] for field in fields} | {"return": None}
    del typed.__wrapped__  # typer must see this signature, not the function's
    return typed


class LazyGroup(typer.core.TyperGroup):
    """A group that knows its commands by name and help, and imports one when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands that are there."""
        return available()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and return one command, None where there is none of this name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _load(cmd_name, COMMANDS[cmd_name])
        return self.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the requested command; for an unknown one name the nearest."""
        name, names = args[0], self.list_commands(ctx)
        if name not in names and not name.startswith("-"):
            close = nearest(name, names)
            ctx.fail(f"no such command '{name}'." + (f" Did you mean {' or '.join(close)}?" if close else ""))
        return super().resolve_command(ctx, args)


def available() -> list[str]:
    """Return the commands whose module is installed, in the order of the help."""
    return [name for name, entry in COMMANDS.items() if importlib.util.find_spec(f"cmtool.cli.{entry.module}")]


def _load(name: str, entry: Entry) -> Any:
    target = getattr(importlib.import_module(f"cmtool.cli.{entry.module}"), entry.attribute)
    if isinstance(target, typer.Typer):
        return _plain(typer.main.get_group(target), name)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(target)
    return _plain(typer.main.get_command(single), name)


def _plain(command: Any, name: str) -> Any:
    """Give a command its name and plain help: rich would cost a fifth of a second before the first word."""
    command.name = name
    command.rich_markup_mode = None
    command.help, command.epilog = lay_out_examples(command.help), lay_out_examples(command.epilog)
    for inner_name, inner in getattr(command, "commands", {}).items():
        _plain(inner, inner_name).short_help = first_clause(inner.help)
    return command


def lay_out_examples(text: str | None) -> str | None:
    """Return a help text whose last sentence `Examples: cmtool a | cmtool b` has become lines that click leaves alone.

    A command that is longer than a line goes on after a backslash, as shells read it. Texts without examples stay.
    """
    found = _EXAMPLES.search(text or "")
    if text is None or found is None:
        return text
    commands = re.split(r" \| |, then: ", " ".join(found[1].split()).removesuffix("."))
    lines = [line for command in commands for line in _folded(command)]
    head = "Examples:" if len(commands) > 1 else "Example:"
    # The \b keeps click from filling the paragraph.
    return f"{text[: found.start()]}\n\n\b\n{head}\n".lstrip("\n") + "\n".join(f"  {line}" for line in lines)


def first_clause(text: str | None) -> str:
    """Return the first sentence of a help text up to its first colon or semicolon: its line in a list of commands."""
    sentence = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"[:;] |\.(?: |$)", sentence)[0] + "." if sentence else ""


def _folded(command: str) -> list[str]:
    lines = [""]
    for word in command.split(" "):
        if len(lines[-1]) + len(word) + 3 > _WIDTH:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


app = typer.Typer(
    cls=LazyGroup,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=lay_out_examples(
        "Examples: cmtool sample --model demo/avatars | cmtool train-ct --preset digits | cmtool report"
    ),
)


def _version(asked: bool) -> None:
    if asked:
        from cmtool.version import __version__

        print(f"cmtool {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train, distil, sample, edit and judge consistency models."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is reported here and nowhere else.

    Args:
        arguments: what follows `cmtool`.

    Returns:
        0 done, 1 the user's mistake or a failure, 2 wrong usage, 130 interrupted, 143 terminated.
    """
    command = next((word for word in arguments if word in COMMANDS), "")
    json_mode = "--json" in arguments
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="cmtool", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) and not isinstance(code, bool) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of our output is gone, and knows it
        _give_up(sys.stdout)
        return 1
    except (Exception, KeyboardInterrupt, Terminated) as error:
        return _reported(_Ended() if isinstance(error, Terminated) else error, json_mode, command)


class _Ended(UserError):
    """The message about a command that SIGTERM ended."""

    exit_code = Terminated.exit_code

    def __init__(self) -> None:
        super().__init__("terminated")


def _reported(error: BaseException, json_mode: bool, command: str) -> int:
    """Report an error, on stderr where stdout takes nothing either (a full disk); return the exit code."""
    try:
        return report(error, json_mode, command)
    except OSError:
        _give_up(sys.stdout)
    with contextlib.suppress(OSError):
        report(error, False, command)
    _give_up(sys.stderr)
    return describe(error, command).code


def _give_up(stream: TextIO) -> None:
    """Let what is still to be written to a stream that takes nothing vanish, the interpreter's last flush included."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Put the null device in the place of a standard stream that the caller closed: the next file would get there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def main() -> None:
    """Entry point of the console script."""
    _open_standard_streams()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # dying on the spot would leave temporary files behind
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    main_of_a_rank(lambda: run(sys.argv[1:]))
