"""EDM's data sets (a zip, or the same as a folder, with `dataset.json`), and zips of class folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cmtool.data.archives import open_zip, read_member
from cmtool.data.decode import SUFFIXES
from cmtool.data.sources.base import Payload, Record, Source, sign, sign_file
from cmtool.data.sources.folder import class_labels, list_files
from cmtool.errors import DataError

_LARGEST_JSON = 1_000_000_000


def _class_of(value: Any, place: Path) -> int:
    """A label of dataset.json as an index: an integer, or a one-hot vector."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, list) and sorted(value) == [0] * (len(value) - 1) + [1]:
        return value.index(1)
    raise DataError(
        f"{place}: dataset.json has the label {str(value)[:40]}, neither a class index nor a one-hot vector.",
        "remove the labels, or make them integers",
    )


def _read_labels(text: bytes, names: list[str], place: Path) -> list[int] | None:
    """Labels in the order of `names`, or None where dataset.json has none."""
    try:
        listed = json.loads(text).get("labels")
        table = None if listed is None else {str(name).replace("\\", "/"): label for name, label in listed}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{place}: dataset.json is damaged or not in EDM's form.") from None
    if not table:
        return None
    missing = [name for name in names if name not in table]
    if missing:
        raise DataError(f"{place}: dataset.json has no label for {len(missing):,} images, the first {missing[0]}.")
    return [_class_of(table[name], place) for name in names]


def _numbered(labels: list[int]) -> tuple[int, tuple[str, ...]]:
    """Number of classes as EDM counts them (largest label + 1), and a note when a subset leaves gaps."""
    count = max(labels) + 1
    gaps = count - len(set(labels))
    return count, (f"dataset.json leaves {gaps} of {count} class numbers unused",) if gaps else ()


def _strip_root(names: list[str]) -> list[str]:
    """Drop the one folder that many zips wrap around everything, so that the next level is the class."""
    roots = {name.split("/", 1)[0] for name in names}
    nested = all(name.count("/") >= 2 for name in names)
    return [name.split("/", 1)[1] for name in names] if len(roots) == 1 and nested else names


def _source(
    kind: str,
    path: Path,
    names: list[str],
    metadata: bytes | None,
    rule: str | None,
    signature: str,
    skipped: Counter[str],
    fetch: Callable[[], Callable[[str], Payload]],
) -> Source:
    class_names: tuple[str, ...] | None = None
    labels, classes = None, None
    notes: tuple[str, ...] = ()
    if metadata is not None:
        labels = _read_labels(metadata, names, path) if names else None
        if labels:
            classes, notes = _numbered(labels)
    elif names:
        class_names, labels = class_labels(_strip_root(names), rule)
        classes = len(class_names) if class_names else None

    def records() -> Iterator[Record]:
        read = fetch()
        for index, name in enumerate(names):
            yield Record(name, read(name), labels[index] if labels else None)

    return Source(kind, path, len(names), records, signature, class_names, classes, skipped, notes)


def open_image_zip(path: Path, rule: str | None = None) -> Source:
    """Open a zip of images, in place: labels from EDM's `dataset.json`, else from folders or prefixes.

    Raises:
        DataError: the archive is refused or damaged, or its labels are not class indices.
    """
    with open_zip(path) as archive:
        members = [info.filename for info in archive.infolist() if not info.is_dir()]
        metadata = read_member(archive, "dataset.json", _LARGEST_JSON) if "dataset.json" in members else None
    names = sorted(name for name in members if name.lower().endswith(SUFFIXES) and "__MACOSX" not in name)
    skipped = Counter({"not an image": len(members) - len(names) - (metadata is not None)})

    def fetch() -> Callable[[str], Payload]:
        opened = open_zip(path)
        return lambda name: read_member(opened, name)

    kind = "EDM zip" if metadata is not None else "zip of images"
    return _source(kind, path, names, metadata, rule, sign_file(f"zip {rule}", path), +skipped, fetch)


def open_edm_folder(path: Path) -> Source:
    """Open the unzipped form: a folder of images with `dataset.json` at its top."""
    listing, skipped = list_files(path)
    names = [name for name, *_ in listing]
    skipped["not an image"] -= 1  # dataset.json itself
    metadata = (path / "dataset.json").read_bytes()
    signature = sign(f"edm {path.resolve()}", [*listing, (metadata,)])
    return _source("EDM folder", path, names, metadata, None, signature, +skipped, lambda: lambda name: path / name)
