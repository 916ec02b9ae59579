"""LSUN's lmdb and parquet tables of images; both need a package of the extra `data`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.errors import DataError

_ROWS = 256
INSTALL = "pip install 'cmtool[data]'"


def _package(name: str, place: Path) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{place} needs the package {name.split('.')[0]}, which is not installed.", INSTALL) from None


def open_lmdb(path: Path) -> Source:
    """Open an LSUN lmdb (a folder with data.mdb, or the .mdb file): values are WebP or JPEG files, in key order.

    The environment is opened read-only and without a lock; nothing is written beside it.

    Raises:
        DataError: the package lmdb is missing, or the file is no lmdb.
    """
    lmdb = _package("lmdb", path)
    file = path / "data.mdb" if path.is_dir() else path
    options = {"readonly": True, "lock": False, "readahead": False, "meminit": False, "subdir": path.is_dir()}

    def environment() -> Any:
        try:
            return lmdb.open(str(path), **options)
        except lmdb.Error as error:
            raise DataError(f"{path} is damaged or no lmdb ({error}).") from None

    with environment() as opened:
        count = int(opened.stat()["entries"])

    def records() -> Iterator[Record]:
        with environment() as opened, opened.begin(buffers=False) as transaction:
            for key, value in transaction.cursor():
                yield Record(key.decode("latin1"), bytes(value))

    return Source("lmdb", path, count, records, sign_file("lmdb", file))


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


def open_parquet(path: Path) -> Source:
    """Open a parquet table of image files, or a folder of them: rows {image: {bytes, path}, label}.

    Only embedded bytes are read; a row's `path` is a name and never opened.

    Raises:
        DataError: the package pyarrow is missing, or a table is damaged or has no images.
    """
    parquet = _package("pyarrow.parquet", path)
    arrow = _package("pyarrow", path)
    files = parquet_files(path)
    try:
        tables = [parquet.ParquetFile(file) for file in files]
        schema = tables[0].schema_arrow
        image, nested, label = _columns(schema, arrow.types, files[0])
        labels = [_label_column(table, label) for table in tables] if label else []
    except arrow.ArrowException as error:
        raise DataError(f"{path} is damaged or no parquet table ({str(error).splitlines()[0]}).") from None
    names = _class_names(schema, label)
    unlabelled = label is None or any(value is None or value < 0 for column in labels for value in column)
    top = 0 if unlabelled else 1 + max((value or 0 for column in labels for value in column), default=-1)

    def records() -> Iterator[Record]:
        for number, file in enumerate(files):
            index = 0
            for batch in parquet.ParquetFile(file).iter_batches(_ROWS, columns=[image]):
                for value in batch.column(0).to_pylist():
                    data = value.get("bytes") if nested and value else value
                    given = None if unlabelled else labels[number][index]
                    yield Record(f"{file.name}[{index}]", bytes(data or b""), given)
                    index += 1

    count = sum(int(table.metadata.num_rows) for table in tables)
    names = names if not unlabelled and names and len(names) >= top else None
    classes = None if unlabelled else len(names or ()) or top
    return Source("parquet", path, count, records, sign_file("parquet", *files), names, classes)


def _label_column(table: Any, label: str) -> list[int | None]:
    return [value for batch in table.iter_batches(columns=[label]) for value in batch.column(0).to_pylist()]
