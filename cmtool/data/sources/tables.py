"""Parquet tables of images; they need a package of the extra `data`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.errors import DataError, install_extra

_ROWS = 256
INSTALL = install_extra("data")


def _package(name: str, place: Path) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{place} needs the package {name.split('.')[0]}, which is not installed.", INSTALL) from None


def _first_split(files: list[Path]) -> list[Path]:
    """The hub's file names begin with the split; of several splits only "train" is used."""
    train = [file for file in files if file.name.startswith("train")]
    return train or files


def parquet_files(path: Path) -> list[Path]:
    """Return the tables at `path`: itself, or those in it or in its subfolder `data`, sorted by name."""
    if path.is_file():
        return [path]
    for folder in (path, path / "data"):
        files = sorted(folder.glob("*.parquet"))
        if files:
            return _first_split(files)
    return []


def _columns(schema: Any, types: Any, path: Path) -> tuple[str, bool, str | None]:
    """Find the image column (a struct with `bytes`, or plain bytes) and the label column of a table."""
    nested = [
        field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    plain = [field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)]
    if not nested and not plain:
        raise DataError(f"{path} has no column of images; its columns are {', '.join(schema.names)}.")
    whole = [field.name for field in schema if types.is_integer(field.type)]
    label = next((name for name in ("label", "labels", "class", "fine_label", "y") if name in whole), None)
    return (nested or plain)[0], bool(nested), label


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Names of the classes as the hub stores them in the table's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _tables(path: Path) -> list[Any]:
    """Open the tables at `path`."""
    parquet = _package("pyarrow.parquet", path)
    return [parquet.ParquetFile(file) for file in parquet_files(path)]


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises over a damaged table into one sentence: its own errors, and OSError for most damage."""
    arrow = _package("pyarrow", path)
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's error, not the table's
            raise
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{path} is damaged or no parquet table ({why}).") from None


def _images(table: Any, image: str, nested: bool) -> Iterator[bytes]:
    """Yield the embedded files of one table; empty where a row has none."""
    for batch in table.iter_batches(_ROWS, columns=[image]):
        for value in batch.column(0).to_pylist():
            yield (value.get("bytes") if nested and value else value) or b""


def open_parquet(path: Path) -> Source:
    """Open a parquet table of image files, or a folder of them: rows {image: {bytes, path}, label}.

    Only embedded bytes are read; a row's `path` is a name and never opened.

    Raises:
        DataError: the package pyarrow is missing, or a table is damaged or has no images.
    """
    arrow = _package("pyarrow", path)
    files = parquet_files(path)
    with _said(path):
        tables = _tables(path)
        schema = tables[0].schema_arrow
        image, nested, label = _columns(schema, arrow.types, files[0])
        labels = [_label_column(table, label) for table in tables] if label else []
        names = _class_names(schema, label)
        rows = [int(table.metadata.num_rows) for table in tables]
        if label and rows != [len(column) for column in labels]:
            raise ValueError("its columns differ in length")
    unlabeled = label is None or any(value is None or value < 0 for column in labels for value in column)
    top = 0 if unlabeled else 1 + max((value or 0 for column in labels for value in column), default=-1)

    def records() -> Iterator[Record]:
        with _said(path):
            for number, (file, table) in enumerate(zip(files, _tables(path), strict=True)):
                index = 0
                for index, data in enumerate(_images(table, image, nested), 1):
                    if index > rows[number]:
                        break
                    given = None if unlabeled else labels[number][index - 1]
                    yield Record(f"{file.name}[{index - 1}]", data, given)
                if index != rows[number]:
                    raise ValueError(f"{file.name} has not the {rows[number]:,} rows that it counts")

    names = names if not unlabeled and names and len(names) >= top else None
    classes = None if unlabeled else len(names or ()) or top
    return Source("parquet", path, sum(rows), records, sign_file("parquet", *files), names, classes)


def _label_column(table: Any, label: str) -> list[int | None]:
    return [value for batch in table.iter_batches(columns=[label]) for value in batch.column(0).to_pylist()]
