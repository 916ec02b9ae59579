"""Atomic writing: each file is written next to its final place, synced, and renamed over it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from cmtool.errors import UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into one sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise UserError(
                f"the disk is full: {path} could not be written.", "free some space and run it again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write {path}.", "choose another place with --out") from error
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{path} cannot be written: {error.strerror}.", "choose another place with --out"
            ) from error
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut. POSIX only: Windows neither can nor needs to."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they survive a power cut: each is an entry in its parent."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


def check_place(path: Path) -> None:
    """Refuse a file that could not be written, before any work; nothing is made.

    Raises:
        UserError: a parent is a file, or there is no permission.
    """
    folder = path.parent
    there = next((place for place in (folder, *folder.parents) if place.exists()), Path("."))
    if not there.is_dir():
        raise UserError(f"{folder} cannot be made: {there} is a file.", "choose another --out")
    if not os.access(there, os.W_OK):
        raise UserError(f"no permission to write in {there}.", "choose another --out")


@contextlib.contextmanager
def atomic_write(path: str | Path, synced: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success sync it and rename it over `path`, else remove it.

    Without `synced` the file still survives a kill whole or not at all, but a power cut may leave it empty; use that
    for one of many files. Raises `UserError` if the disk is full or the place cannot be written.
    """
    target = Path(path)
    with writing(target):
        make_folder(target.parent)
        # Keep the suffix last: writers such as Pillow choose the format by it.
        temporary = target.with_name(f".{target.stem}.tmp-{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
        try:
            yield temporary
            if synced:
                with open(temporary, "rb+") as stream:
                    os.fsync(stream.fileno())
            os.replace(temporary, target)
            if synced:
                sync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def atomic_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def atomic_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` whole or not at all; file names that are not valid UTF-8 keep their bytes."""
    atomic_bytes(path, text.encode("utf-8", "surrogateescape"))
