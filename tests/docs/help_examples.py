"""What every `--help` shows to be typed."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from cmtool.cli.app import app, available


def _commands() -> Iterator[tuple[str, typer.models.CommandInfo]]:
    group = typer.main.get_command(app)
    yield "", group
    for name in available():
        command = group.get_command(None, name)
        inner = getattr(command, "commands", {})
        yield name, command
        yield from ((f"{name} {sub}", inner[sub]) for sub in inner)


HELPS = dict(_commands())


def examples(command) -> list[str]:
    """Return the command lines that a help text shows, as they are typed."""
    said = "\n".join(filter(None, [command.help, command.epilog])).replace("\\\n", " ")
    return [" ".join(line.split()) for line in said.splitlines() if line.startswith("  cmtool ")]
