"""Results worth keeping, by a key of what they were computed from, in the cache folder."""

from __future__ import annotations

import contextlib
import zipfile

import numpy as np

from cmtool.errors import UserError
from cmtool.evaluation.statistics import Array
from cmtool.files.atomic import atomic_write
from cmtool.files.cache import cache_dir


def cached(key: str, kind: str) -> dict[str, Array] | None:
    """Return the arrays kept under a content key, or None; a damaged file counts as absent."""
    path = cache_dir() / kind / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive.items())
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def keep(key: str, kind: str, arrays: dict[str, Array]) -> None:
    """Keep arrays under a content key. A cache that cannot be written is no reason to lose a result."""
    path = cache_dir() / kind / f"{key}.npz"
    with contextlib.suppress(OSError, UserError), atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
