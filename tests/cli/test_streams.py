"""Streams that take nothing, and signals before a run has begun: one sentence at most, the right code, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cmtool.cli.output import Output

CMTOOL = (sys.executable, "-m", "cmtool")
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


def shell(line: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which $CMTOOL is the command."""
    environment = {**os.environ, "CMTOOL": " ".join(CMTOOL)}
    return subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=60, **options)


@full
@pytest.mark.parametrize("words", ["presets", "presets --json", "--help", "--version", "train-ct --help"])
def test_a_full_disk_behind_stdout_is_said_on_stderr(words):
    done = shell(f"$CMTOOL {words} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.count("Error: no space left on device") == 1 and "Traceback" not in done.stderr


@full
def test_the_error_itself_is_said_where_its_document_finds_no_place(tmp_path):
    done = shell("$CMTOOL info nothing --json > /dev/full", cwd=tmp_path)
    assert done.returncode == 1 and "no model at nothing" in done.stderr and "Traceback" not in done.stderr
    assert shell("$CMTOOL nonsense 2> /dev/full").returncode == 2
    assert shell("$CMTOOL nonsense > /dev/full 2> /dev/full").returncode == 2


def test_a_reader_that_went_away_is_no_traceback():
    for words in ("presets", "presets --json", "--help", "nonsense --json"):
        done = shell(f"$CMTOOL {words} | true")
        assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("closed", "words", "code"),
    [(">&-", "presets", 0), ("2>&-", "nonsense", 2), (">&- 2>&- <&-", "presets", 0), (">&-", "nonsense", 2)],
)
def test_streams_that_the_caller_closed_are_as_good_as_the_null_device(tmp_path, closed, words, code):
    done = shell(f"$CMTOOL {words} {closed}", cwd=tmp_path)
    assert done.returncode == code and "should not happen" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_talk_that_nobody_takes_does_not_end_the_work(monkeypatch, capsys):
    class Gone:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    output = Output()
    output.say("a")
    output.warn("b")
    output.result("c")
    assert capsys.readouterr().out == "c\n"


def test_talk_and_tables_steer_no_terminal(capsys):
    output = Output()
    output.say("a\x1b[2Jb\nc\td\u202e")
    output.warn("\x1b]0;x\x07")
    output.table("", ["x", "y"], [["\x1b[31m", ["\x9b1m"]]])
    said = capsys.readouterr()
    assert said.err == "a\\x1b[2Jb\nc\td\\u202e\nWarning: \\x1b]0;x\\x07\n"
    assert "\x1b" not in said.out and "\x9b" not in said.out and "\\x1b[31m" in said.out


EARLY = """
import os, signal, sys, time
from cmtool.cli import app
app._load = lambda *entry: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(30)
app.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_sigterm_before_the_run_has_begun_is_one_sentence_and_143(flags):
    done = subprocess.run([sys.executable, "-c", EARLY, "presets", *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 143
    if flags:
        assert json.loads(done.stdout) == {"error": "terminated", "hint": None}
    else:
        assert done.stderr == "Error: terminated\n"
