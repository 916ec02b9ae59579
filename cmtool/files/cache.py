"""The cache folder for packed copies, downloads and results, and what the user allows there."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from cmtool.errors import DataError
from cmtool.units import human_bytes


def cache_dir() -> Path:
    """Return the folder for packed copies and downloads: `$CMTOOL_CACHE`, else `cmtool` in the user's cache folder."""
    given = os.environ.get("CMTOOL_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "cmtool"


def offline() -> bool:
    """Return whether `CMTOOL_OFFLINE` forbids every network access."""
    return os.environ.get("CMTOOL_OFFLINE", "") not in ("", "0")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Check that the disk under `folder` has `needed` bytes free; `what` names the purpose in the message.

    Raises:
        DataError: if it has fewer.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"{what} needs {human_bytes(needed)} in {folder}, where {human_bytes(free)} are free.",
            "free some space, or set CMTOOL_CACHE to a folder on a larger disk",
        )


def file_digest(path: Path, algorithm: str = "md5") -> str:
    """Return the hexadecimal digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return file_digest(path, "sha256")
