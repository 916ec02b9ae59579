"""What docs/extending.md says to do is done, word by word, in a copy of the package; its commands then run there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0].strip(): part for part in PAGE.split("\n## ")[1:]}
BLOCK = re.compile(r'```(\w+)(?: title="([^"]+)")?\n(.*?)```', re.DOTALL)


def apply_diff(path: Path, lines: list[str]) -> None:
    """Replace the lines of a diff that were there, in a row and once, by those that are to be there."""
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "-"))
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "+"))
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{path.name} does not hold these lines once:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def follow(section: str, root: Path) -> list[list[str]]:
    """Make the changes that a section shows below `root`; return the commands that it then types."""
    commands = []
    for language, title, text in BLOCK.findall(section):
        if language == "diff":
            apply_diff(root / title, text.splitlines())
        elif language == "python" and title:
            assert not (root / title).exists(), f"{title} is there already"
            (root / title).write_text(text, encoding="utf-8")
        elif language == "console":
            commands += [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")]
    return commands


@pytest.mark.parametrize("title", [name for name, part in SECTIONS.items() if "```console" in part])
def test_what_a_section_adds_runs(title, tmp_path):
    # With what is compiled already: compiling the package again takes each command seconds.
    shutil.copytree(ROOT / "cmtool", tmp_path / "cmtool", ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    commands = follow(SECTIONS[title], tmp_path)
    assert commands
    for words in commands:
        program = [sys.executable, *(words[1:] if words[0] == "python" else ["-m", *words])]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


def test_every_file_that_the_page_names_is_there():
    added = {title for language, title, _ in BLOCK.findall(PAGE) if language == "python" and title}
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", PAGE):
        places = [ROOT / name, ROOT / "cmtool" / name]
        assert any(place.exists() for place in places) or name in added, f"docs/extending.md names {name}"


def test_the_rows_that_the_page_shows_parse():
    for language, title, text in BLOCK.findall(PAGE):
        if language == "python" and not title:
            ast.parse("{" + text + "}")
