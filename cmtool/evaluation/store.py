"""Files that come from elsewhere: feature weights and reference statistics.

Everything lies under one folder (`cmtool.data.cache.cache_dir`). A file that is put there by hand is as good as a
downloaded one.
"""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cmtool.checkpoint import atomic_write
from cmtool.data.cache import cache_dir, file_digest, offline
from cmtool.errors import DataError, OfflineError

TIMEOUT = 30.0


@dataclass(frozen=True)
class Remote:
    """A published file: what it is in words, where it is, where it is kept, and its SHA-256 where that is known."""

    what: str
    url: str
    folder: str
    name: str
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """Where it belongs on this machine."""
        return cache_dir() / self.folder / self.name


def fetch(remote: Remote, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the local path of a published file, downloading it once.

    Raises:
        OfflineError: it is not here and the network is forbidden or silent; it says what to put where.
        DataError: what was downloaded is not the published file.
    """
    path = remote.path
    if path.is_file():
        return path
    if offline():
        raise _absent(remote, "CMTOOL_OFFLINE forbids downloading it")
    say(f"downloading {remote.what} from {remote.url}")
    try:
        with urllib.request.urlopen(remote.url, timeout=TIMEOUT) as response, atomic_write(path) as temporary:
            with open(temporary, "wb") as stream:
                shutil.copyfileobj(response, stream, 1 << 20)
            _check_download(remote, temporary, response.headers.get("Content-Length"))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise _absent(remote, f"it could not be downloaded ({getattr(error, 'reason', error)})") from error
    return path


def _absent(remote: Remote, why: str) -> OfflineError:
    return OfflineError(
        f"{remote.what} is needed: the file {remote.name} is not at {remote.path}, and {why}.",
        f"Download {remote.url} on a machine with a network, put it at {remote.path}, and run the command again.",
    )


def _check_download(remote: Remote, path: Path, length: str | None) -> None:
    if length and length.isdigit() and path.stat().st_size != int(length):
        raise DataError(f"the download of {remote.url} broke off; run the command again.")
    if remote.sha256 and sha256(path) != remote.sha256:
        raise DataError(f"{remote.url} does not hold the published file: its SHA-256 is another.")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return file_digest(path, "sha256")
