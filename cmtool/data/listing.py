"""Which files in a folder or archive are images, and which class each belongs to: one set of rules for every reader.

Hidden files and the litter of operating systems and tools never count. Links are followed, except back into a folder
that contains them. Everything else that cannot be used is counted by reason, for the user to see.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG

from cmtool.data.decode import FOREIGN, SUFFIXES
from cmtool.errors import DataError, unknown

RULES = ("folders", "prefix")
TABLE = "dataset.json"
# Names that begin with a dot are hidden as well: .DS_Store, .ipynb_checkpoints, ._photo.png, .git.
SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__pycache__"}
SYSTEM |= {"$recycle.bin", "system volume information", "lost+found"}
CONVERT = "in a format to be converted first (HEIC, raw, ...)"


@dataclass
class Listing:
    """What a folder or archive holds.

    `images` are relative names with "/", sorted; `stamps` are their sizes and modification times in the same order;
    `tables` are the names of all files called dataset.json; `skipped` counts every other visible file by reason.
    """

    images: list[str] = field(default_factory=list)
    stamps: list[tuple[object, ...]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, *stamp: object) -> None:
        """Add one visible file to the list it belongs to."""
        last = name.rsplit("/", 1)[-1].lower()
        if last.endswith(SUFFIXES):
            self.images.append(name)
            self.stamps.append(stamp)
        elif last == TABLE:
            self.tables.append(name)
        else:
            self.skipped[CONVERT if last.endswith(FOREIGN) else "not an image"] += 1

    def sorted(self) -> Listing:
        """Return this listing with its images sorted by name."""
        order = sorted(range(len(self.images)), key=lambda row: self.images[row])
        self.images = [self.images[row] for row in order]
        self.stamps = [self.stamps[row] for row in order]
        return self


def is_hidden(part: str) -> bool:
    """Whether files and folders of this name are ignored."""
    return part.startswith(".") or part.lower() in SYSTEM


def _entries(folder: str) -> list[tuple[str, str, bool]]:
    """Return (name, path, whether it is a link) for each visible entry of a folder."""
    with os.scandir(folder) as found:
        return [(entry.name, entry.path, entry.is_symlink()) for entry in found if not is_hidden(entry.name)]


def list_folder(root: Path) -> Listing:
    """List a folder and everything below it.

    Links to files and folders are followed. Links back to a folder around them (the root's own parents included),
    broken links, folders that cannot be read, pipes and devices are counted as skipped.
    """
    found = Listing()
    # A link to a folder above the root would lead back to the root, through everything beside it.
    full = root.resolve()
    around = tuple((stat.st_dev, stat.st_ino) for stat in map(os.stat, (full, *full.parents)))
    waiting: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(root), "", around)]
    while waiting:
        folder, prefix, above = waiting.pop()
        try:
            entries = _entries(folder)
        except OSError:
            found.skipped["in a folder that cannot be read"] += 1
            continue
        for name, path, linked in entries:
            try:
                stat = os.stat(path)
            except OSError:
                found.skipped["a broken link" if linked else "unreadable"] += 1
                continue
            here = (stat.st_dev, stat.st_ino)
            if S_ISREG(stat.st_mode):
                found.add(prefix + name, stat.st_size, stat.st_mtime_ns)
            elif not S_ISDIR(stat.st_mode):  # opening a pipe can block forever, and a device may never end
                found.skipped["no plain file"] += 1
            elif here in above:
                found.skipped["a link to a folder around it"] += 1
            else:
                waiting.append((path, f"{prefix}{name}/", (*above, here)))
    return found.sorted()


def list_archive(archive: zipfile.ZipFile) -> tuple[Listing, dict[str, str]]:
    """List a zip archive, and map each name to its member: some tools write `./a.png` or backslashes."""
    found, members = Listing(), {}
    for info in archive.infolist():
        parts = [part for part in info.filename.replace("\\", "/").split("/") if part not in ("", ".")]
        name = "/".join(parts)
        if info.is_dir() or not parts or any(map(is_hidden, parts)) or name in members:
            continue
        members[name] = info.filename
        if S_ISLNK(info.external_attr >> 16):
            found.skipped["a link inside an archive"] += 1
        else:
            found.add(name, info.file_size)
    return found.sorted(), members


def find_table(images: list[str], tables: list[str], place: Path) -> str | None:
    """Return the dataset.json that covers all images: at the top, or in a folder wrapped around everything.

    Args:
        images: their relative names.
        tables: names of the files in EDM's form.
        place: the folder or archive, for messages.

    Raises:
        DataError: every table leaves some images out, so that labels would be lost.
    """
    for table in sorted(tables, key=lambda name: (name.count("/"), name)):
        folder = table.removesuffix(TABLE)
        if all(name.startswith(folder) for name in images):
            return table
    if not tables:
        return None
    folder = min(tables).removesuffix(TABLE)
    raise DataError(
        f"{place} holds an EDM data set in its folder {folder} and images outside it.",
        f"name only one data set: --data {place / folder}"
        if place.is_dir()
        else "put one data set into an archive of its own",
    )


def index_labels(names: list[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return the distinct class names, sorted, and the index of each entry among them."""
    classes = tuple(sorted(set(names)))
    rank = {name: index for index, name in enumerate(classes)}
    return classes, [rank[name] for name in names]


def strip_wrapper(names: list[str]) -> list[str]:
    """Drop the single folders wrapped around all class folders, as many archives have one or several."""
    while len({name.split("/", 1)[0] for name in names}) == 1 and all(name.count("/") >= 2 for name in names):
        names = [name.split("/", 1)[1] for name in names]
    return names


@dataclass(frozen=True)
class Classes:
    """Sorted class names and the class of each image, None if there are no classes; and notes for the user."""

    names: tuple[str, ...] | None = None
    labels: list[int] | None = None
    notes: tuple[str, ...] = ()


def class_labels(names: list[str], rule: str | None) -> Classes:
    """Give each image the class named by its folder or its file name.

    Args:
        names: relative names with "/".
        rule: "folders" or None: the top-level folder (inside folders wrapped around everything) is the class, and
            there are no classes if any image lies outside of them. "prefix": OpenAI's rule, the file name up to the
            first underscore (one stray prefix shifts every class index after it).

    Raises:
        DataError: there is no such rule, or a file name has no prefix.
    """
    if rule not in (None, *RULES):
        raise DataError(unknown("label rule of a folder", str(rule), RULES))
    if rule == "prefix":
        return Classes(*index_labels(_prefixes(names)))
    inner = strip_wrapper(names)
    loose = sum("/" not in name for name in inner)
    if loose == len(inner):
        return Classes()
    if loose:
        verb = "image lies" if loose == 1 else "images lie"
        return Classes(notes=(f"{loose:,} {verb} next to the folders, so the folders are not classes",))
    return Classes(*index_labels([name.split("/", 1)[0] for name in inner]))


def _prefixes(names: Iterable[str]) -> list[str]:
    prefixes = []
    for name in names:
        prefix, found, _ = name.rsplit("/", 1)[-1].partition("_")
        if not found:
            raise DataError(
                f"{name} has no underscore, so its name says no class.", "rename it, or leave --labels prefix out"
            )
        prefixes.append(prefix)
    return prefixes
