"""Downloads that resume, are verified, and never look finished before they are. Standard library only."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmtool.errors import DataError, OfflineError, UserError
from cmtool.files.atomic import atomic_text
from cmtool.files.cache import cache_dir, offline, require_space
from cmtool.units import human_bytes

Progress = Callable[[int, int | None], None]
_BLOCK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte
_NAMES = {"md5": "MD5", "sha256": "SHA-256"}


@dataclass(frozen=True)
class Download:
    """A file to fetch, and what is known about it in advance.

    `what` describes the file in messages ("": its name); `size` is in bytes; `digest` is the algorithm and the
    hexadecimal digest, e.g. "sha256:0f3c...".
    """

    url: str
    target: Path
    what: str = ""
    size: int | None = None
    digest: str | None = None

    @property
    def part(self) -> Path:
        """Where the bytes go until the file is complete."""
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def note(self) -> Path:
        """Records which version of the file the part belongs to."""
        return self.target.with_name(f"{self.target.name}.part.json")

    @property
    def by_hand(self) -> str:
        """What the user can do without the network."""
        return f"fetch {self.url} by hand and put it at {self.target}"


@dataclass(frozen=True)
class Answer:
    """What a server says about a file: its total length, its version tag, and its MD5 (base64) if given."""

    total: int | None
    tag: str | None
    md5: str | None


def _answer(headers: Mapping[str, str], start: int) -> Answer:
    span, length = headers.get("Content-Range", ""), headers.get("Content-Length")
    whole = span.rpartition("/")[2]
    total = int(whole) if whole.isdecimal() else start + int(length) if length and length.isdecimal() else None
    # When it answers a range request, a server may give the MD5 of only that range.
    return Answer(total, headers.get("ETag"), None if span else headers.get("Content-MD5"))


def _remembered(file: Download) -> dict[str, Any]:
    """Return the note made when the part was started; empty if it is for another file or names no version."""
    try:
        note = json.loads(file.note.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.get("url") == file.url and note.get("tag") else {}


def _receive(file: Download, progress: Progress | None) -> Answer:
    """Fetch into the part and resume where an earlier attempt stopped.

    An earlier part is reused if the server still has the noted version, or if a known digest will verify the result.
    """
    note = _remembered(file)
    resumable = file.part.is_file() and bool(note or file.digest)
    have = file.part.stat().st_size if resumable else 0
    request = urllib.request.Request(file.url, headers={"User-Agent": "cmtool"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if note:
            request.add_header("If-Range", note["tag"])
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        have = have if response.status == 206 else 0
        answer = _answer(response.headers, have)
        if have:
            answer = Answer(answer.total, answer.tag, note.get("md5"))
        else:
            atomic_text(file.note, json.dumps({"url": file.url, "tag": answer.tag, "md5": answer.md5}))
            require_space(file.part.parent, answer.total or file.size or 0, f"the download of {file.url}")
        with open(file.part, "ab" if have else "wb") as stream:
            while block := response.read(_BLOCK):
                stream.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, answer.total)
    return answer


def _digest(path: Path, algorithm: str) -> bytes:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, algorithm).digest()


def _discard(file: Download) -> None:
    file.part.unlink(missing_ok=True)
    file.note.unlink(missing_ok=True)


def _wrong(file: Download, answer: Answer, have: int, total: int | None) -> str | None:
    """Return the reason why a part is not the requested file, None if it may be."""
    if total is not None and have > total:
        return f"it has {have} bytes instead of {total}"
    if file.digest is not None:
        algorithm, _, expected = file.digest.partition(":")
        if _digest(file.part, algorithm).hex() != expected.lower():
            return f"its {_NAMES.get(algorithm, algorithm)} is another"
    if answer.md5 and base64.b64encode(_digest(file.part, "md5")).decode() != answer.md5:
        return "its MD5 is another than the server says"
    return None


def _verify(file: Download, answer: Answer) -> None:
    """Check length and digests: keep a part that is too short, so that it can be resumed; remove a wrong one."""
    have = file.part.stat().st_size
    total = file.size if file.size is not None else answer.total
    if total is not None and have < total:
        raise DataError(
            f"the download of {file.url} stopped after {human_bytes(have)} of {human_bytes(total)}.",
            "run it again to resume",
        )
    if reason := _wrong(file, answer, have, total):
        _discard(file)
        raise DataError(
            f"what came from {file.url} is not the published file: {reason}. It was removed.",
            f"run it again, or {file.by_hand}",
        )


def _ask(file: Download, progress: Progress | None) -> Answer:
    """Receive a file and turn every refusal into one sentence."""
    try:
        return _receive(file, progress)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise OfflineError(f"{file.url} answered {error.code} {error.reason}.", file.by_hand) from None
        # The server has nothing left to send: the part is complete or too long. What is known in advance tells which.
        answer = Answer(None, None, _remembered(file).get("md5"))
        if file.size is None and file.digest is None and not answer.md5:
            _discard(file)
            raise DataError(f"the download of {file.url} could not be resumed.", "run it again") from None
        return answer
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise OfflineError(
            f"{file.url} could not be fetched ({getattr(error, 'reason', None) or error or type(error).__name__}).",
            f"check the network and run it again, which resumes; or {file.by_hand}",
        ) from None


@contextlib.contextmanager
def _alone(file: Download) -> Iterator[None]:
    """Let one process at a time fetch a file, since two would write into the same part.

    Raises:
        UserError: if another process is fetching it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = file.target.with_name(f"{file.target.name}.part.lock")
    with open(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{file.target.name} is being fetched by another process.", "wait for it, then run this again"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def download(file: Download, progress: Progress | None = None) -> Path:
    """Fetch a file and return its path: resume after an interruption, verify, and move into place only when complete.

    Size and digest are checked where they are known, and what the server says otherwise. `progress` is called with
    (bytes so far, total or None).

    Raises:
        OfflineError: if `CMTOOL_OFFLINE` is set, or the network does not answer or does not have it.
        DataError: if the file arrived incomplete (kept, to be resumed) or wrong (removed), or the disk is too full.
        UserError: if another process is fetching it.
    """
    if offline():
        needed = f"{file.what} is needed: " if file.what else ""
        raise OfflineError(
            f"{needed}{file.target.name} is not at {file.target}, and CMTOOL_OFFLINE forbids fetching it.",
            f"unset CMTOOL_OFFLINE, or {file.by_hand}",
        )
    file.part.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file):
        _verify(file, _ask(file, progress))
        os.replace(file.part, file.target)
        file.note.unlink(missing_ok=True)
    return file.target


@dataclass(frozen=True)
class Remote:
    """A published file that is kept in the cache: a description, its URL, its folder and name there.

    A file put there by hand is as good as a downloaded one. A download is checked against `sha256`, where known.
    """

    what: str
    url: str
    folder: str
    name: str
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """Its place on this machine."""
        return cache_dir() / self.folder / self.name


def fetch(remote: Remote, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the local path of a published file; download it the first time.

    Raises:
        OfflineError, DataError, UserError: as `download`; the message says what to put where.
    """
    if remote.path.is_file():
        return remote.path
    digest = f"sha256:{remote.sha256}" if remote.sha256 else None
    if not offline():
        say(f"downloading {remote.what} from {remote.url}")
    return download(Download(remote.url, remote.path, remote.what, digest=digest))


def read_json(url: str) -> Any:
    """Return the JSON document at `url`.

    Raises:
        OfflineError: if the network is forbidden or does not answer.
        UserError: if there is no such document.
    """
    if offline():
        raise OfflineError(f"{url} is needed, and CMTOOL_OFFLINE forbids fetching it.", "unset CMTOOL_OFFLINE")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "cmtool"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return json.loads(response.read(10_000_000))
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answered {error.code} {error.reason}.") from None
    except ValueError:
        raise UserError(f"{url} holds no JSON document.") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise OfflineError(f"{url} could not be fetched ({getattr(error, 'reason', error)}).") from None
