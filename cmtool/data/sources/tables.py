"""Tables of images, parquet or Arrow; reading them needs the extra `data`.

Arrow is what `datasets.save_to_disk` writes of an image data set of the hub: a folder with `state.json`, which names
its `.arrow` files, or with `dataset_dict.json` and a folder for each split. Columns are read, and no program.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from cmtool.data.listing import is_hidden, list_folder
from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.errors import DataError, install_extra

_ROWS = 256
_LABELS = ("label", "labels", "class", "fine_label", "y")  # usual names of the column of class numbers
INSTALL = install_extra("data")
_SPLITS, _STATE, _SAVED = "dataset_dict.json", "state.json", "dataset_info.json"
_ARROW_FILE = b"ARROW1"  # how a file of Arrow begins; a stream, which the hub's library writes, has no mark


def _package(name: str, place: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{place} needs the package {name.split('.')[0]}, which is not installed.", INSTALL) from None


@dataclass(frozen=True)
class Table:
    """The rows of one file: their schema and number, and `column(name)`, which yields a column in lists of values."""

    schema: Any
    rows: int
    column: Callable[[str], Iterator[list[Any]]]


def _parquet_table(file: Path) -> Table:
    table = _package("pyarrow.parquet", file).ParquetFile(file)

    def column(name: str) -> Iterator[list[Any]]:
        for batch in table.iter_batches(_ROWS, columns=[name]):
            yield batch.column(0).to_pylist()

    return Table(table.schema_arrow, int(table.metadata.num_rows), column)


def _arrow_table(file: Path) -> Table:
    """Open a stream or file of record batches; it stays on the disk, and a pass reads what it asks for."""
    arrow, ipc = _package("pyarrow", file), _package("pyarrow.ipc", file)

    def batches() -> Iterator[Any]:
        with arrow.memory_map(str(file)) as source:
            if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
                reader = ipc.open_file(source)
                yield reader.schema
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                source.seek(0)
                reader = ipc.open_stream(source)
                yield reader.schema
                yield from reader

    def column(name: str) -> Iterator[list[Any]]:
        for batch in islice(batches(), 1, None):
            values = batch.column(batch.schema.get_field_index(name))
            values.validate(full=True)  # offsets of a damaged file lead anywhere in memory
            for start in range(0, len(values), _ROWS):
                yield values.slice(start, _ROWS).to_pylist()

    stream = batches()
    return Table(next(stream), sum(batch.num_rows for batch in stream), column)


def is_saved(path: Path) -> bool:
    """Whether a folder is an image data set, or several splits of one, as `datasets.save_to_disk` writes them."""
    return (path / _SPLITS).is_file() or ((path / _STATE).is_file() and (path / _SAVED).is_file())


def _listed(path: Path, key: str) -> list[str]:
    """Return the names that a JSON file has below a key, each directly or as `filename`.

    Raises:
        DataError: it is damaged, or a name points elsewhere.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            names = [entry["filename"] if isinstance(entry, dict) else entry for entry in json.load(stream)[key]]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DataError(f"{path} is damaged: it names no files.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\\" in name:
            raise DataError(f"{path} is refused: it names '{name}', which is no file beside it.")
    return names


def _saved_files(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the Arrow files of a saved data set, of its split "train" or else its first, and a note on the split."""
    if path.is_file():
        return [path], ()
    notes: tuple[str, ...] = ()
    if (path / _SPLITS).is_file():
        splits = _listed(path / _SPLITS, "splits")
        if not splits:
            raise DataError(f"{path} has no splits.")
        chosen = "train" if "train" in splits else splits[0]
        notes = (f"of the splits {', '.join(splits)} {chosen} is used",) if len(splits) > 1 else ()
        path = path / chosen
    files = [path / name for name in _listed(path / _STATE, "_data_files")]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{missing[0]} is missing; {path / _STATE} names it.")
    return files, notes


def parquet_files(path: Path) -> list[Path]:
    """Return the tables at `path`: the file itself, or those in the folder or its subfolder `data`, sorted by name."""
    if path.is_file():
        return [path]
    for folder in (path, path / "data"):
        files = sorted(file for file in folder.glob("*.parquet") if file.is_file() and not is_hidden(file.name))
        if files:
            return files
    return []


def _first_split(files: list[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """Keep only the split "train" if there are several, and say so. On the hub, file names start with the split."""
    train = [file for file in files if file.name.startswith("train")]
    left = len(files) - len(train)
    if not train or not left:
        return files, ()
    return train, (f"of {len(files):,} tables the {len(train):,} of the split train are used",)


def has_images(path: Path) -> bool:
    """Whether there are tables of images at `path`, rather than metadata of image files in the same folder."""
    files = parquet_files(path)
    if not files or importlib.util.find_spec("pyarrow") is None:
        return bool(files)
    with _said(path, "parquet"):
        tables = [_parquet_table(file) for file in files]
    return any(_image_columns(table.schema, _package("pyarrow", path).types) for table in tables) or not (
        list_folder(path).images
    )


@dataclass(frozen=True)
class _Columns:
    """Which columns hold the images (structs with `bytes`, or plain bytes) and labels, and the names of the classes."""

    image: str
    nested: bool
    label: str | None
    names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def _features(schema: Any) -> dict[str, Any]:
    """Return the hub's description of each column, from the table's metadata; empty for other tables."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _image_columns(schema: Any, types: Any) -> list[str]:
    """Return the columns that may hold images: those described so, else structs with `bytes`, else plain bytes."""
    said = _features(schema)
    nested = [
        field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    plain = [field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)]
    named = [name for name in nested + plain if isinstance(said.get(name), dict) and said[name].get("_type") == "Image"]
    return named or nested or plain


def _chosen(found: list[str], usual: tuple[str, ...], what: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """Choose the column with the usual name among several, and say so.

    Raises:
        DataError: none of them has a usual name.
    """
    if len(found) == 1:
        return found[0], ()
    for name in usual:
        if name in found:
            return name, (f"of the columns {', '.join(found)} {name} is taken for the {what}",)
    raise DataError(
        f"{path} has several columns of {what}: {', '.join(found)}.", f"name the wanted one {usual[0]}, or leave one"
    )


def _columns(schema: Any, types: Any, path: Path) -> _Columns:
    images = _image_columns(schema, types)
    if not images:
        raise DataError(f"{path} has no column of images; its columns are {', '.join(schema.names)}.")
    image, notes = _chosen(images, ("image", "img", "jpg", "png", "webp", "pixels"), "images", path)
    whole = [field.name for field in schema if types.is_integer(field.type)]
    labels = [name for name in _LABELS if name in whole]
    label, more = _chosen(labels, tuple(labels), "labels", path) if labels else (None, ())
    if label is None:
        other = [f"{name} ({schema.field(name).type})" for name in _LABELS if name in schema.names]
        more = (f"the column {other[0]} holds no class numbers and is not used",) if other else ()
    nested = types.is_struct(schema.field(image).type)
    return _Columns(image, nested, label, _class_names(schema, label), (*notes, *more))


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Return the class names that the hub stores in the table's metadata."""
    try:
        return tuple(str(name) for name in _features(schema)[str(label)]["names"])
    except (KeyError, TypeError):
        return None


def _same_columns(tables: list[Table], types: Any, files: list[Path]) -> _Columns:
    """Return the columns that all tables share.

    Raises:
        DataError: a table has its images or labels in other columns than the first, or other class names.
    """
    found = [_columns(table.schema, types, file) for table, file in zip(tables, files, strict=True)]
    for columns, file in zip(found, files, strict=True):
        if columns != found[0]:
            raise DataError(
                f"{file} has other columns or class names than {files[0].name}.", "give tables of one data set"
            )
    return found[0]


@contextlib.contextmanager
def _said(path: Path, kind: str) -> Iterator[None]:
    """Turn errors of pyarrow about a damaged table into one sentence; most are OSError, some are its own."""
    arrow = _package("pyarrow", path)
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:  # an error of the disk, not of the table
            raise
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{path} is damaged or no {kind} table ({why}).") from None


def _images(table: Table, image: str, nested: bool) -> Iterator[bytes]:
    """Yield the embedded files of one table, empty bytes for rows without one."""
    for values in table.column(image):
        for value in values:
            yield (value.get("bytes") if nested and value else value) or b""


def open_parquet(path: Path) -> Source:
    """Open a parquet table of image files, or a folder of them: rows {image: {bytes, path}, label}.

    Only embedded bytes are read. A row's `path` is just a name and is never opened.

    Raises:
        DataError: the package pyarrow is missing, or a table is damaged or has no images.
    """
    return _open("parquet", path, *_first_split(parquet_files(path)), _parquet_table)


def open_arrow(path: Path) -> Source:
    """Open an image data set that `datasets.save_to_disk` wrote, or one of its `.arrow` files; rows as in parquet.

    Raises:
        DataError: the package pyarrow is missing, a file is missing, damaged or elsewhere, or there are no images.
    """
    return _open("Arrow", path, *_saved_files(path), _arrow_table)


def _open(
    kind: str, path: Path, files: list[Path], notes: tuple[str, ...], open_table: Callable[[Path], Table]
) -> Source:
    arrow = _package("pyarrow", path)
    if not files:
        raise DataError(f"{path} names no files.")
    with _said(path, kind):
        tables = [open_table(file) for file in files]
        columns = _same_columns(tables, arrow.types, files)
        labels = [
            [value for part in table.column(columns.label) for value in part] for table in tables if columns.label
        ]
        rows = [table.rows for table in tables]
        if columns.label and rows != [len(column) for column in labels]:
            raise ValueError("its columns differ in length")
    notes += columns.notes
    without = sum(value is None or value < 0 for column in labels for value in column)
    unlabeled = columns.label is None or without > 0
    if without:
        notes += (f"{without:,} of {sum(rows):,} rows have no label, so that none is used",)
    top = 0 if unlabeled else 1 + max((value or 0 for column in labels for value in column), default=-1)

    def records() -> Iterator[Record]:
        with _said(path, kind):
            for number, file in enumerate(files):
                index = 0
                for index, data in enumerate(_images(open_table(file), columns.image, columns.nested), 1):
                    if index > rows[number]:
                        break
                    given = None if unlabeled else labels[number][index - 1]
                    yield Record(f"{file.name}[{index - 1}]", data, given)
                if index != rows[number]:
                    raise ValueError(f"{file.name} has not the {rows[number]:,} rows that it counts")

    names = columns.names if not unlabeled and columns.names and len(columns.names) >= top else None
    classes = None if unlabeled else len(names or ()) or top
    return Source(kind, path, sum(rows), records, sign_file(kind, *files), names, classes, notes=notes)
