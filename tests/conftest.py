"""Shared by all tests: one thread, no network, nothing left outside the temporary folder, and the command line as typed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.counted import COUNTED, lines

# Before torch is imported by anyone: more threads than cores make small networks tens of times slower.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["CMTOOL_OFFLINE"] = "1"
os.environ["COLUMNS"] = "80"
os.environ["TERM"] = "dumb"
for variable in ("CMTOOL_MODEL", "CMTOOL_DEBUG", "CMTOOL_DATA", "FORCE_COLOR"):
    os.environ.pop(variable, None)

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are tested by interpretation where there is no card

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Typed:
    """What a command line answered."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def heeded_signals() -> Iterator[None]:
    """Undo what `nohup` and the background of a shell do to a run of the tests, here and in what is started within."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with a cache of its own."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cmtool(workdir: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Typed]:
    """Run `cmtool` with the given words inside this process, in `workdir`."""
    from cmtool.cli.app import run

    def typed(*words: object) -> Typed:
        capfd.readouterr()
        code = run([str(word) for word in words])
        out, err = capfd.readouterr()
        return Typed(code, out, err)

    return typed


@pytest.fixture
def cmtool_process(workdir: Path) -> Callable[..., Typed]:
    """Run `cmtool` with the given words as a process of its own, in `workdir`; extra keywords are its environment."""

    def typed(*words: object, **environment: str) -> Typed:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "cmtool", *map(str, words)],
            cwd=workdir,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Typed(done.returncode, done.stdout, done.stderr)

    return typed


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` skip themselves where there is no CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker of pytest-xdist has counted to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counted"] = {name: dict(kinds) for name, kinds in COUNTED.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add up what the workers of pytest-xdist have counted."""
    for name, kinds in (getattr(node, "workeroutput", None) or {}).get("counted", {}).items():
        COUNTED[name].update(kinds)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many fault trials and fuzz inputs were tried."""
    for line in lines():
        terminalreporter.write_line(line)
