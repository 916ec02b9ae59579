"""What the README tells people to type exists."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer

from cmtool.cli.app import app, available
from cmtool.config.load import resolve

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line.strip().split("  #")[0] for line in TEXT.splitlines() if line.startswith("    ")]
COMMANDS = [part.strip() for line in BLOCKS for part in line.split("&&")]
COMMANDS += [code for code in re.findall(r"`(cmtool [^`]+)`", TEXT) if "X" not in code]
TYPED = sorted({line for line in COMMANDS if line.startswith("cmtool ")})


def test_it_opens_with_the_two_commands():
    assert BLOCKS[:2] == [
        "pip install . && cmtool train-ct --preset digits && cmtool sample",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("line", TYPED)
def test_commands_options_and_presets_exist(line):
    words = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    assert words[0] in available()
    command = group.get_command(None, words[0])
    if words[1:] and words[1] in getattr(command, "commands", {}):
        command = command.commands[words[1]]
    known = {name for parameter in command.params for name in parameter.opts}
    options = {word.split("=")[0] for word in words if word.startswith("-")}
    assert options <= known | {"--help"}
    if "--preset" in words:
        given = dict(itertools.pairwise(words))
        sets = [value for option, value in itertools.pairwise(words) if option == "--set"]
        resolve(given["--preset"], family=words[0].removeprefix("train-"), recipe=given.get("--recipe"), sets=sets)
