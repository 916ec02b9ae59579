"""Every help text, as it stood: options keep their names, order and words until somebody means to change them.

After a change that is meant: `python -m tests.cli.test_help_texts`, and a line in the changelog where an option went.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import pytest
import typer

from cmtool.cli.app import COMMANDS, app

STORED = Path(__file__).with_name("help_texts.txt")
RULE = "=" * 80


@lru_cache(maxsize=1)
def helps() -> dict[str, str]:
    """Return every command's help at 80 columns, by the words that ask for it."""
    found: dict[str, str] = {}

    def visit(command, words: list[str], parent) -> None:
        context = command.make_context(words[-1], [], parent=parent, resilient_parsing=True)
        context.terminal_width = context.max_content_width = 80
        found[" ".join(words)] = "\n".join(line.rstrip() for line in context.get_help().splitlines())
        for name, inner in getattr(command, "commands", {}).items():
            visit(inner, [*words, name], context)

    root = typer.main.get_command(app)
    for name in COMMANDS:
        root.get_command(None, name)
    visit(root, ["cmtool"], None)
    return found


def stored() -> dict[str, str]:
    parts = STORED.read_text(encoding="utf-8").split(f"{RULE}\n")[1:]
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].rstrip("\n") for part in parts}


@pytest.mark.parametrize("words", sorted(stored() if STORED.is_file() else []))
def test_a_help_text_is_as_stored(words):
    assert helps().get(words) == stored()[words]


def test_every_command_has_a_stored_help_text():
    assert sorted(helps()) == sorted(stored())


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    STORED.write_text("".join(f"{RULE}\n{words}\n{text}\n" for words, text in helps().items()), encoding="utf-8")
