"""A folder of image files, with nested folders or file-name prefixes as class labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

from cmtool.data.decode import FOREIGN, SUFFIXES
from cmtool.data.sources.base import Record, Source, index_labels, sign
from cmtool.errors import DataError, unknown

RULES = ("folders", "prefix")


def _files(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All visible files below `root` as relative names with "/" and their stat; links are followed, loops are not."""
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            full = os.path.join(folder, name)
            if not name.startswith(".") and os.path.exists(full):
                yield Path(full).relative_to(root).as_posix(), os.stat(full)


def list_files(root: Path) -> tuple[list[tuple[str, int, int]], Counter[str]]:
    """Return the image files below `root` as (name, bytes, time of change), sorted by name, and counts of the rest."""
    skipped: Counter[str] = Counter()
    listing: list[tuple[str, int, int]] = []
    for name, stat in _files(root):
        if not S_ISREG(stat.st_mode):  # opening a pipe waits for ever, a device has no end
            skipped["no plain file"] += 1
        elif name.lower().endswith(SUFFIXES):
            listing.append((name, stat.st_size, stat.st_mtime_ns))
        else:
            foreign = name.lower().endswith(FOREIGN)
            skipped["in a format to be converted first (HEIC, raw, ...)" if foreign else "not an image"] += 1
    return sorted(listing), skipped


def class_labels(names: list[str], rule: str | None) -> tuple[tuple[str, ...] | None, list[int] | None]:
    """Class of each file: its first folder, or (rule "prefix", OpenAI's) its file name up to the first underscore."""
    if rule not in (None, *RULES):
        raise DataError(unknown("label rule of a folder", str(rule), RULES))
    if rule == "prefix":
        return index_labels([name.rsplit("/", 1)[-1].split("_", 1)[0] for name in names])
    if any("/" not in name for name in names):
        return None, None
    return index_labels([name.split("/", 1)[0] for name in names])


def open_folder(root: Path, rule: str | None = None) -> Source:
    """List a folder of images, sorted by name.

    Args:
        root: searched with all its subfolders; hidden files are ignored.
        rule: "folders" or None: the top-level folder is the class, sorted by name (no labels when an image lies at
            the top); "prefix": OpenAI's rule, the file name up to the first underscore (one stray prefix shifts
            every index behind it).

    Raises:
        DataError: the folder holds no image file, or there is no such rule.
    """
    listing, skipped = list_files(root)
    names = [name for name, *_ in listing]
    classes, labels = class_labels(names, rule) if names else (None, None)

    def records() -> Iterator[Record]:
        for index, name in enumerate(names):
            yield Record(name, root / name, labels[index] if labels else None)

    signature = sign(f"folder {root.resolve()} {rule}", listing)
    count = len(classes) if classes else None
    return Source("folder of images", root, len(names), records, signature, classes, count, skipped)
