"""The examples of all help texts are typed, one after another in one folder, on tiny settings."""

from __future__ import annotations

import shlex

import pytest

from cmtool.cli.app import run
from tests.docs.help_examples import HELPS, examples
from tests.docs.tiny import POINTS, lay_out, tiny

# Typed elsewhere, or not to be typed in a test.
ELSEWHERE = {
    "studio": "serves until it is stopped: tests/browser",
    "import": "needs somebody else's file: tests/interop",
    "openai/": "fetches a gigabyte",
}
TRAINING = ["train-edm", "train-cd", "train-ct", "ema"]


def typed(line, capfd, folder):
    """Run one line as a shell would: `>` writes a file, `*` names what is there. Return the exit code."""
    line, _, target = line.partition(" > ")
    words = []
    for word in shlex.split(line)[1:]:
        found = sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else []
        words += found or [word]
    capfd.readouterr()
    code = run(tiny(words))
    if target:
        (folder / target).write_text(capfd.readouterr().out, encoding="utf-8")
    return code


def order(name):
    return (TRAINING.index(name) if name in TRAINING else len(TRAINING), name)


def failures(names, folder, capfd):
    found = []
    for name in names:
        for line in examples(HELPS[name]):
            if not any(part in line for part in ELSEWHERE if part != name) and typed(line, capfd, folder) != 0:
                found.append(f"cmtool {name} --help: {line}\n  {capfd.readouterr().err.strip()[-300:]}")
    return found


@pytest.mark.slow
def test_the_examples_of_every_help_run(here, capfd):
    lay_out(here)
    names = sorted((name for name in HELPS if name not in ELSEWHERE and not name.startswith("theory")), key=order)
    found = failures(names, here, capfd)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HELPS if name.startswith("theory ")])
def test_the_examples_of_the_theory_run(here, capfd, name):
    (here / "points.csv").write_text(POINTS, encoding="utf-8")
    found = failures([name], here, capfd)
    assert not found, "\n".join(found)
