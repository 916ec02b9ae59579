"""Trials of misfortune: a command in a forked child that is killed, starved or refused at a chosen moment.

The parent is warm (torch and every command imported), so a trial costs the command itself and not five seconds of
imports. After each trial the folder is judged: no file under its final name may be half-written.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cmtool.checkpoint import verify
from tests.counted import COUNTED

# Trials done in this test run, by kind.
TRIALS = COUNTED["fault trials"]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


@dataclass(frozen=True)
class Ended:
    """How a trial ended: exit code (negative: the signal that killed it), what it said, how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether SIGKILL found it alive."""
        return self.code == -signal.SIGKILL


def trial(
    kind: str,
    words: Iterable[object],
    folder: Path,
    arm: Callable[[], None] | None = None,
    kill_after: float | None = None,
    patience: float = 90.0,
) -> Ended:
    """Run a command line in a child process in `folder`.

    `arm` runs in the child before the command; `kill_after` seconds later the child is killed with SIGKILL.
    """
    TRIALS[kind] += 1
    words = [str(word) for word in words]
    said = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    for file in said:
        file.write_text("")
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(words, folder, said, arm)
    code = _wait(pid, started + (patience if kill_after is None else kill_after), kill_after is not None)
    out, err = (file.read_text(errors="replace") for file in said)
    assert kill_after is not None or arm is not None or code != -signal.SIGKILL, f"no end within {patience} s: {err}"
    return Ended(code, out, err, time.monotonic() - started)


def _wait(pid: int, until: float, precise: bool) -> int:
    """Wait for the child until that moment, then kill it; return its exit code."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.0005 if precise else 0.01)


def _child(words: list[str], folder: Path, said: list[Path], arm: Callable[[], None] | None) -> None:
    code = 70
    try:
        for number, file in enumerate(said, 1):
            handle = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
            os.dup2(handle, number)
            setattr(sys, ("stdout", "stderr")[number - 1], os.fdopen(number, "w", buffering=1))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(folder)
        from cmtool.cli.app import run

        if arm is not None:
            arm()
        code = run(words)
    except BaseException as error:  # a traceback is what the tests look for
        import traceback

        traceback.print_exception(error)
    finally:
        os._exit(code if isinstance(code, int) else 71)


def on_changes(action: Callable[[int], None], folder: Path | None = None) -> Callable[[], None]:
    """Return an `arm` that calls `action(n)` just before the n-th change of the file system below the working folder.

    Changes are opening for writing, renaming, removing, making folders, and syncing.
    """

    def arm() -> None:
        root = os.path.realpath(folder or os.getcwd())
        count = 0
        plain = os.fsync

        def change() -> None:
            nonlocal count
            count += 1
            action(count)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in _CHANGES:
                if str(arguments[0]).startswith(root) or not os.path.isabs(str(arguments[0])):
                    change()
            elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
                place = os.path.abspath(arguments[0])
                if arguments[2] & _WRITES and place.startswith(root):
                    change()

        def fsync(handle: int) -> None:
            change()
            plain(handle)

        os.fsync = fsync
        sys.addaudithook(hook)

    return arm


def kill_at(number: int) -> Callable[[], None]:
    """Return an `arm` that kills the child just before its `number`-th change of the file system."""
    return on_changes(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == number else None)


def fail_at(number: int, code: int) -> Callable[[], None]:
    """Return an `arm` that lets the `number`-th change of the file system, and all after it, fail with `code`."""

    def action(count: int) -> None:
        if count >= number:
            raise OSError(code, os.strerror(code))

    return on_changes(action)


def fsync_fails(number: int, code: int = errno.EIO) -> Callable[[], None]:
    """Return an `arm` under which the `number`-th fsync fails."""

    def arm() -> None:
        count = 0
        plain = os.fsync

        def fsync(handle: int) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(code, os.strerror(code))
            plain(handle)

        os.fsync = fsync

    return arm


def without_root() -> None:
    """Give up root's right to write anywhere (Linux: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH); an `arm`."""
    if os.geteuid() != 0:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(head, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    data[0] &= ~0b110  # effective
    data[1] &= ~0b110  # permitted
    if libc.capset(head, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def broken_files(folder: Path) -> list[str]:
    """Return what is wrong with files under their final names: each must be whole, whatever happened."""
    found = []
    for file in folder.rglob("*"):
        if not file.is_file() or file.name.startswith("."):
            continue
        try:
            _check(file)
        except Exception as error:
            found.append(f"{file.relative_to(folder)}: {type(error).__name__}: {error}")
    return found


def _check(file: Path) -> None:
    if file.suffix == ".safetensors":
        verify(file)
    elif file.suffix == ".png":
        with Image.open(file) as image:
            image.load()
    elif file.suffix in (".npz", ".zip"):
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
            assert bad is None, f"member {bad}"
    elif file.suffix == ".json":
        json.loads(file.read_text())
    elif file.suffix == ".toml":
        tomllib.loads(file.read_text())
    elif file.suffix == ".cmdata":
        from cmtool.data.packed import read_packed

        read_packed(file)


def litter(folder: Path) -> list[str]:
    """Return temporary files that were left behind."""
    return [str(file.relative_to(folder)) for file in folder.rglob(".*tmp-*")]
