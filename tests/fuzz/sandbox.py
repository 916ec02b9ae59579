"""Readers under fire: inputs run in a forked child with little memory, a clock, and a witness of what it touches."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cmtool.cli.failure import describe
from cmtool.errors import UserError
from tests.counted import COUNTED

# Inputs tried in this test run, by reader.
TRIED = COUNTED["fuzz inputs"]
MEMORY = 1 << 30  # bytes that a reader may take for any input
SECONDS = 5.0  # of the processor, for one input
PATIENCE = 10  # times as long by the clock: waiting counts too, but not what other processes take
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen", "exec", "code.__new__"),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PACKAGE = str(Path(__file__).resolve().parents[2] / "cmtool") + os.sep


class Violation(BaseException):
    """The reader did what no input may make it do; not an Exception, so that no reader can swallow it."""


@dataclass(frozen=True)
class Reader:
    """A reader: the name of the file it is given, whole examples, and a call that may raise `UserError` alone."""

    name: str
    file: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], Any]


@dataclass(frozen=True)
class Found:
    """An input that broke the rules, and how."""

    data: bytes
    why: str


def mutations(seeds: tuple[bytes, ...], rng: random.Random) -> Iterator[bytes]:
    """Yield changed examples for ever: flipped bits, odd numbers, cut, doubled, spliced, garbage."""
    odd = [0, 1, 0x7F, 0x80, 0xFF, ord("{"), ord("["), ord('"'), ord("-"), ord("9"), 0x0A, 0x5C]
    numbers = [
        b"\xff" * 4,
        b"\xff" * 8,
        b"\x00" * 8,
        b"\xff\xff\xff\x7f",
        b"\x00\x00\x00\x40",
        b"-1",
        b"1e999",
        b"9" * 30,
    ]
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(9)
            if kind == 0 and data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            elif kind == 1 and data:
                data[at % len(data)] = rng.choice(odd)
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif kind == 3:
                del data[at : at + rng.randrange(1, 1 + max(1, len(data) // 4))]
            elif kind == 4:
                data[at : at + 8] = rng.choice(numbers)
            elif kind == 5:
                del data[at:]
            elif kind == 6:
                piece = data[at : at + rng.randrange(1, 64)]
                data[at:at] = piece * rng.choice((1, 2, 50))
            elif kind == 7:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at:] = other[start:]
            else:
                data = bytearray(rng.randbytes(rng.randrange(0, 200))) if rng.random() < 0.1 else data
        yield bytes(data[:200_000])


def attack(reader: Reader, folder: Path, count: int, seed: int, guided: bool = False) -> Found | None:
    """Give a reader `count` changed inputs in a child process; return the first that broke the rules.

    `guided`: inputs that reach lines of the package that none reached before become examples themselves.
    """
    TRIED[reader.name] += count
    place = folder / reader.file
    place.parent.mkdir(parents=True, exist_ok=True)
    report = folder / "report.txt"
    report.write_text("died without a word")
    for data in reader.seeds:  # imports, and whatever else happens but once
        place.write_bytes(data)
        _call(reader, place)
    pid = os.fork()
    if pid == 0:
        _child(reader, place, report, count, seed, guided)
    # Each input has its own clock; this one is for a child that is dead, not for one that others keep from running.
    until = time.monotonic() + max(900.0, count * 0.5)
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            report.write_text("hangs")
            break
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == 0 else Found(place.read_bytes(), f"{reader.name}: {report.read_text()} (exit {code})")


def _call(reader: Reader, place: Path) -> None:
    try:
        reader.read(place)
    except UserError as error:
        said = describe(error).sentence
        if not said or not said.isprintable() or len(said) > 2000:
            raise Violation(f"not one sentence: {error.message!r}") from error


def _child(reader: Reader, place: Path, report: Path, count: int, seed: int, guided: bool) -> None:
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        rng = random.Random(f"{reader.name} {seed}")
        corpus, seen = list(reader.seeds), set()
        _confine(str(place.parent))
        inputs = mutations(corpus, rng)  # the list grows while it is drawn from
        for _ in range(count):
            data = next(inputs)
            place.write_bytes(data)
            _clock(SECONDS)
            lines = _traced(reader, place) if guided else _call(reader, place)
            _clock(0)
            if lines and not lines <= seen:
                seen |= lines
                corpus.append(data)
        code = 0
    except BaseException as error:
        _clock(0)
        _ALLOWED.clear()  # the witness has seen enough: Python compiles lines to show them in a traceback
        text = "".join(traceback.format_exception(error))[-1500:]
        report.write_text(f"{type(error).__name__}: {error}\n{text}")
    finally:
        os._exit(code)


# Folders that may be written in; empty: nothing is watched any more.
_ALLOWED: list[str] = []


def _confine(folder: str) -> None:
    """Limit memory and time of this process, and forbid it to run, connect or write elsewhere."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Violation(f"longer than {SECONDS} s")

    _limit_memory()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, hang)
    _witness(folder)


def _clock(seconds: float) -> None:
    """Interrupt this process after so many seconds of work, or `PATIENCE` times as many of waiting; 0: do not."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _witness(folder: str) -> None:
    """Raise from now on where this process runs a program, connects, or opens a file for writing outside `folder`."""
    _ALLOWED.append(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _ALLOWED:
            return
        if event in _FORBIDDEN and not _importing():
            raise Violation(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            name = arguments[0]
            inside = isinstance(name, int) or os.path.abspath(os.fsdecode(name)).startswith(tuple(_ALLOWED))
            if not inside and name != os.devnull:
                raise Violation(f"writes {name!r}")

    sys.addaudithook(hook)


def _importing() -> bool:
    """Whether Python's own import system, or a class of the standard library being built, is what compiles."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _traced(reader: Reader, place: Path) -> set[tuple[str, int]]:
    lines: set[tuple[str, int]] = set()

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(trace)
    try:
        _call(reader, place)
    finally:
        sys.settrace(None)
    return lines
