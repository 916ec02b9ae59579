"""One process per run folder: a lock that the system releases when its holder dies. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cmtool.errors import UserError
from cmtool.files.atomic import make_folder, writing

NAME = "run.lock"
_ANSWER_WITHIN = 1.0


class Holder(NamedTuple):
    """The process that wrote the lock file."""

    pid: int
    host: str

    @property
    def alive(self) -> bool:
        """Whether it is still running, as far as this machine can tell; a process on another host is assumed to be."""
        # On Windows this call would send the process a Ctrl-C; on POSIX it only asks.
        if self.host != socket.gethostname() or sys.platform == "win32":
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return self.pid != os.getpid()


def _try_lock(handle: int) -> bool | None:
    """Lock an open file without waiting; False: another process holds it; None: the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 1 << 30, os.SEEK_SET)  # a byte past the text, because others must be able to read the text
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


def _holder(file: Path) -> Holder | None:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return Holder(int(said["pid"]), str(said["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse(file: Path) -> UserError:
    until = time.monotonic() + _ANSWER_WITHIN
    while (holder := _holder(file)) is None and time.monotonic() < until:
        time.sleep(0.05)  # it has the lock and is about to write its name
    who = f" (pid {holder.pid} on {holder.host})" if holder else ""
    return UserError(
        f"another process{who} is training in {file.parent}.",
        f"wait for it, choose another folder with --out, or remove {file} if it is gone",
    )


def _open(file: Path) -> tuple[int, Holder | None]:
    """Return the locked file and who left it behind; raise if another process holds it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        taken = _try_lock(handle)
        left = _holder(file)
        if taken is False or (taken is None and left is not None and left.alive):
            os.close(handle)
            raise _refuse(file)
        # Its last holder may have removed the name after we opened and before we locked it: then we hold nothing.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle, left
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Holder | None]:
    """Hold the lock of a run folder; yield who left it behind, None if nobody did.

    A second process is refused; the message gives the first one's pid and host. The lock of a killed process is free at
    once, even if another process has its pid now.

    Raises:
        UserError: if another live process trains in this folder, or it cannot be written.
    """
    file = folder / NAME
    with writing(file):
        make_folder(folder)
        handle, left = _open(file)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    try:
        yield left
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(handle)
        with contextlib.suppress(OSError):
            file.unlink()
        if sys.platform != "win32":
            os.close(handle)


def check_free(folder: Path) -> None:
    """Refuse at once, without changing anything, a folder that another live process trains in.

    Raises:
        UserError: names the process's pid and host.
    """
    file = folder / NAME
    if not file.is_file():
        return
    try:
        handle = os.open(file, os.O_RDWR)
    except OSError:
        return  # the code that really needs the lock reports why it cannot have it
    taken = _try_lock(handle)
    os.close(handle)
    holder = _holder(file)
    if taken is False or (taken is None and holder is not None and holder.alive):
        raise _refuse(file)
