"""Downloads that resume, are verified, and never look finished before they are. Standard library alone."""

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

from cmtool.checkpoint import atomic_text
from cmtool.data.cache import human_bytes, offline, require_space
from cmtool.errors import OfflineError, UserError

Progress = Callable[[int, int | None], None]
_BLOCK = 1 << 20
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Answer:
    """What a server says about a file: its whole length, a tag of its version, and its MD5 (base64) if it gives one."""

    total: int | None
    tag: str | None
    md5: str | None


def _blob(headers: Mapping[str, str], start: int) -> Answer:
    span, length = headers.get("Content-Range", ""), headers.get("Content-Length")
    whole = span.rpartition("/")[2]
    total = int(whole) if whole.isdecimal() else start + int(length) if length and length.isdecimal() else None
    # The MD5 of an answer to a range may be that of the range alone.
    return Answer(total, headers.get("ETag"), None if span else headers.get("Content-MD5"))


def _remembered(part: Path, url: str) -> dict[str, Any]:
    """What was noted when `part` was begun; empty if it belongs to another file or cannot be trusted."""
    try:
        note = json.loads(part.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.get("url") == url and note.get("tag") else {}


def _receive(url: str, part: Path, progress: Progress | None) -> Answer:
    """Fetch `url` into `part`, going on where an earlier attempt stopped if the server still has the same file."""
    note = _remembered(part, url)
    have = part.stat().st_size if note and part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "cmtool"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", note["tag"])
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        have = have if response.status == 206 else 0
        answer = _blob(response.headers, have)
        if have:
            answer = Answer(answer.total, answer.tag, note.get("md5"))
        else:
            atomic_text(part.with_suffix(".json"), json.dumps({"url": url, "tag": answer.tag, "md5": answer.md5}))
            require_space(part.parent, answer.total or 0, f"the download of {url}")
        with open(part, "ab" if have else "wb") as stream:
            while block := response.read(_BLOCK):
                stream.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, answer.total)
    return answer


def _digest(path: Path, name: str) -> bytes:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, name).digest()


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".json").unlink(missing_ok=True)


def _verify(url: str, part: Path, answer: Answer, size: int | None, sha256: str | None) -> None:
    """Check length and hashes; a file that is too short stays to be resumed, a wrong one is removed."""
    have, total = part.stat().st_size, size if size is not None else answer.total
    if total is not None and have < total:
        raise UserError(
            f"the download of {url} stopped after {human_bytes(have)} of {human_bytes(total)}.",
            "run it again to resume",
        )
    reason = None
    if total is not None and have > total:
        reason = f"it has {have} bytes instead of {total}"
    elif sha256 is not None and _digest(part, "sha256").hex() != sha256.lower():
        reason = "its SHA-256 is another"
    elif answer.md5 and base64.b64encode(_digest(part, "md5")).decode() != answer.md5:
        reason = "its MD5 is another than the server says"
    if reason:
        _discard(part)
        raise UserError(f"what came from {url} is not the published file: {reason}. It was removed.", "run it again")


def _ask(url: str, part: Path, progress: Progress | None, known: bool) -> Answer:
    """Receive a file, with every refusal as one sentence; `known`: length or hash are known beforehand."""
    try:
        return _receive(url, part, progress)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise UserError(f"{url} answered {error.code} {error.reason}.") from None
        # The part was whole already, or longer than the file: what is known of it tells.
        answer = Answer(None, None, _remembered(part, url).get("md5"))
        if not known and not answer.md5:
            _discard(part)
            raise UserError(f"the download of {url} could not be resumed.", "run it again") from None
        return answer
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise OfflineError(
            f"{url} could not be fetched ({getattr(error, 'reason', None) or error or type(error).__name__}).",
            "check the network and run it again: what came is kept and resumed",
        ) from None


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Let one process at a time fetch a file: two would write into the same part.

    Raises:
        UserError: if another one is at it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = part.with_suffix(".lock")
    with open(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            name = part.name.removesuffix(".part")
            raise UserError(
                f"{name} is being fetched by another process.", "wait for it, then run this again"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def download(
    url: str, target: Path, *, size: int | None = None, sha256: str | None = None, progress: Progress | None = None
) -> Path:
    """Fetch `url` to `target`: resumed after an interruption, its length and hash checked, in place only when whole.

    `size` in bytes and `sha256` are checked where they are known, else what the server says; `progress` is called with
    (bytes so far, total or None).

    Raises:
        OfflineError: if `CMTOOL_OFFLINE` is set, or the network does not answer.
        UserError: if the file does not exist there, came incomplete (kept, to be resumed) or wrong (removed).
    """
    if offline():
        raise OfflineError(
            f"{target.name} has not been fetched, and CMTOOL_OFFLINE forbids fetching it from {url}.",
            f"unset CMTOOL_OFFLINE, or fetch it elsewhere and put it at {target}",
        )
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with _alone(part):
        answer = _ask(url, part, progress, known=size is not None or sha256 is not None)
        _verify(url, part, answer, size, sha256)
        os.replace(part, target)
    part.with_suffix(".json").unlink(missing_ok=True)
    return target


def read_json(url: str) -> Any:
    """Return the JSON document at `url`.

    Raises:
        OfflineError, UserError: as `download`.
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
