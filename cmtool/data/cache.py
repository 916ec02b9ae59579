"""Where packed copies and downloads are kept, and downloads that resume and are verified."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from cmtool.errors import DataError, OfflineError

Progress = Callable[[int, int | None], None]
_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


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


def human_bytes(count: float) -> str:
    """Format a size for people: 1.5 GB, 12 MB, 640 bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{int(count)} bytes"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise DataError when the disk under `folder` has less than `needed` bytes free."""
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


def _receive(url: str, part: Path, progress: Progress | None) -> None:
    """Fetch `url` into `part`, continuing where an earlier attempt stopped."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        if have and answer.status != 206:  # the server ignored the range and sends the whole file
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as stream:
            while block := answer.read(_BLOCK):
                stream.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
    if total is not None and have != total:
        raise DataError(
            f"the download of {url} stopped after {human_bytes(have)} of {human_bytes(total)}.", "try again"
        )


def download(url: str, target: Path, md5: str, size: int, progress: Progress | None = None) -> Path:
    """Fetch a file once: interrupted downloads resume, and the file appears only when its MD5 is right.

    Raises:
        OfflineError: `CMTOOL_OFFLINE` is set, or the network does not answer; the sentence says where to put the file.
        DataError: the file that came is not the expected one, or the disk is short.
    """
    by_hand = f"fetch {url} by hand and put it at {target}"
    if offline():
        raise OfflineError(f"{target.name} is not at {target} and CMTOOL_OFFLINE forbids fetching it.", by_hand)
    require_space(target.parent, size, f"the download of {target.name}")
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _receive(url, part, progress)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part was already complete; the digest below decides
            raise OfflineError(f"{url} answered {error.code} {error.reason}.", by_hand) from None
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise OfflineError(f"{target.name} could not be fetched from {url} ({reason}).", by_hand) from None
    if file_digest(part) != md5:
        part.unlink()
        raise DataError(f"what came from {url} is not the expected file (its MD5 differs); it was removed.", by_hand)
    os.replace(part, target)
    return target
