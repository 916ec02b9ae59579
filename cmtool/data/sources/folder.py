"""Folders and zips of image files, with labels from EDM's dataset.json, class folders or file-name prefixes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cmtool.data.listing import TABLE, Classes, Listing, class_labels, find_table, list_archive, list_folder
from cmtool.data.sources.base import Payload, Record, Source, sign, sign_file
from cmtool.errors import DataError
from cmtool.files.archives import open_zip, read_member

_LARGEST_JSON = 1_000_000_000


def _is_other(text: bytes) -> bool:
    """Whether a dataset.json belongs to some other tool: valid JSON, but without labels."""
    with suppress(ValueError, RecursionError):
        held = json.loads(text)
        return isinstance(held, dict) and "labels" not in held
    return False


def _class_of(value: Any, place: Path) -> int:
    """Return a label in dataset.json, an integer or a one-hot vector, as a class index."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, list) and sorted(value) == [0] * (len(value) - 1) + [1]:
        return value.index(1)
    raise DataError(
        f"{place}: dataset.json has the label {str(value)[:40]}, neither a class index nor a one-hot vector.",
        "remove the labels, or make them integers",
    )


def _table_labels(text: bytes, names: list[str], place: Path) -> tuple[list[int] | None, tuple[str, ...]]:
    """Return labels in the order of `names`, None if dataset.json has none; and notes for the user."""
    try:
        listed = json.loads(text)["labels"]
        table = None if listed is None else {str(name).replace("\\", "/"): label for name, label in listed}
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{place}: dataset.json is damaged or not in EDM's form.") from None
    if not table:
        return None, ()
    missing = [name for name in names if name not in table]
    if missing:
        raise DataError(f"{place}: dataset.json has no label for {len(missing):,} images, the first {missing[0]}.")
    labels = [_class_of(table[name], place) for name in names]
    count = max(labels) + 1
    gaps = count - len(set(labels))
    notes = (f"dataset.json leaves {gaps} of {count} class numbers unused",) if gaps else ()
    absent = len(table) - len(names)
    return labels, (*notes, *((f"dataset.json lists {absent:,} images that are not there",) if absent else ()))


def _open_images(
    path: Path,
    found: Listing,
    rule: str | None,
    signature: str,
    read: Callable[[str], bytes],
    fetch: Callable[[], Callable[[str], Payload]],
    form: str,
) -> Source:
    """Make a source from a listing. `read` returns the bytes of a table; `fetch` starts a pass over the images."""
    names = found.images
    table = find_table(found.images, [name for name in found.tables if not _is_other(read(name))], path)
    found.skipped["not an image"] += sum(name != table for name in found.tables)
    kind = f"EDM {form}" if table is not None else f"{form} of images"
    numbered: list[int] | None = None
    if table is not None:
        inside = [name.removeprefix(table.removesuffix(TABLE)) for name in names]
        numbered, notes = _table_labels(read(table), inside, path) if names else (None, ())
        found_classes = Classes(None, numbered, notes)
    else:
        found_classes = class_labels(names, rule) if names else Classes()
    labels = found_classes.labels
    if rule is not None and numbered is not None:
        found_classes = Classes(None, labels, (*found_classes.notes, "the labels are those of dataset.json"))

    def records() -> Iterator[Record]:
        load = fetch()
        for index, name in enumerate(names):
            yield Record(name, load(name), labels[index] if labels else None)

    classes = 1 + max(labels) if labels else None
    return Source(
        kind, path, len(names), records, signature, found_classes.names, classes, +found.skipped, found_classes.notes
    )


def open_folder(root: Path, rule: str | None = None) -> Source:
    """Open a folder of images, sorted by name: labels from EDM's `dataset.json`, else from folders or prefixes.

    Args:
        root: the folder; see `listing` for which files below it count.
        rule: see `class_labels`.

    Raises:
        DataError: it holds no image, there is no such rule, or its labels are not class indices.
    """
    found = list_folder(root)
    rows: list[tuple[object, ...]] = [(name, *stamp) for name, stamp in zip(found.images, found.stamps, strict=True)]
    texts = [(name, (root / name).read_bytes()) for name in found.tables]
    signature = sign(f"folder {root.resolve()} {rule}", [*rows, *texts, *sorted(found.skipped.items())])
    return _open_images(
        root, found, rule, signature, dict(texts).__getitem__, lambda: lambda name: root / name, "folder"
    )


def open_image_zip(path: Path, rule: str | None = None) -> Source | None:
    """Open a zip of images in place, with labels as in a folder; None if it holds only arrays, like an .npz.

    Raises:
        DataError: the archive is refused or damaged, or its labels are not class indices.
    """
    with open_zip(path) as archive:
        found, members = list_archive(archive)
        if not found.images and any(name.endswith(".npy") for name in members):
            return None
        texts = {name: read_member(archive, members[name], _LARGEST_JSON) for name in found.tables}

    def fetch() -> Callable[[str], Payload]:
        opened = open_zip(path)
        return lambda name: read_member(opened, members[name])

    return _open_images(path, found, rule, sign_file(f"zip {rule}", path), texts.__getitem__, fetch, "zip")
