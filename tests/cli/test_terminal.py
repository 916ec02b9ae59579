"""At the terminal: progress that fits the line, and what the shell offers at the tab key."""

from __future__ import annotations

import io
import re

import pytest

from cmtool.cli.output import Output, fitting
from cmtool.interop.published import demo_names


@pytest.mark.parametrize(("width", "least"), [(120, 6), (80, 3), (40, 0)])
def test_progress_is_whole_at_every_width(monkeypatch, width, least):
    """What there is no room for is left out; nothing is cut short by dots."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    with Output().progress(3100, "digits ict-pm") as update:
        update(completed=1700, note="loss 0.3714  2,562 images/s  N 161  lr 4.3e-05")
    seen = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", stream.getvalue())]
    last = [line for line in seen if line.strip()][-1]
    assert len(last) <= width and "…" not in last
    assert "1700/3100" in last and "loss 0.3714" in last and "-:--:--" in last
    parts = [part for part in ("digits ict-pm", "━", "0:00:00", "images/s", "N 161", "lr 4.3e-05") if part in last]
    assert len(parts) >= least, last


@pytest.mark.parametrize(("room", "kept"), [(48, "a 1  bb 2  c 3"), (14, "a 1  bb 2  c 3"), (13, "a 1  bb 2"), (2, "")])
def test_a_note_keeps_its_first_parts(room, kept):
    assert fitting("a 1  bb 2  c 3", room) == kept


@pytest.mark.parametrize(
    ("words", "position", "offered"),
    [
        ("cmtool tra", 1, {"train-ct", "train-edm", "train-cd"}),
        ("cmtool train-ct --preset lsun_c", 3, {"lsun_cat256", "lsun_church64"}),
        ("cmtool train-cd --recipe i", 3, {"icd"}),
        ("cmtool train-ct --preset cifar10 --recipe sc", 5, {"sct"}),
        ("cmtool train-ct --preset no-such --recipe i", 5, set()),
        ("cmtool sample --model demo/", 3, set(demo_names())),
        ("cmtool sample --model runs/", 3, {"runs/done"}),
        ("cmtool report runs/", 2, {"runs/done", "runs/begun"}),
        ("cmtool eval --ref to", 3, {"toy2d"}),
        ("cmtool train-ct --track w", 3, {"wandb"}),
    ],
)
def test_the_shell_completes_commands_and_values(cmtool, workdir, monkeypatch, words, position, offered):
    for name, files in (("done", ("config.toml", "model.safetensors")), ("begun", ("config.toml",))):
        (workdir / "runs" / name).mkdir(parents=True)
        for file in files:
            (workdir / "runs" / name / file).touch()
    ask = {"_CMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    for name, value in ask.items():
        monkeypatch.setenv(name, value)
    assert set(cmtool().out.split()) == offered


def test_the_shell_completes_options(cmtool_process):
    ask = {"_CMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": "cmtool train-ct --rec", "COMP_CWORD": "2"}
    assert cmtool_process(**ask).out.split() == ["--recipe"]
