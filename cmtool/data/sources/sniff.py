"""Chooses the reader for a path by looking at what is there, never only by the name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cmtool.config.schema import DataConfig
from cmtool.config.sources import DATA_SOURCES
from cmtool.data.dataset import Dataset
from cmtool.data.decode import SUFFIXES
from cmtool.data.listing import is_hidden, list_folder
from cmtool.data.packed import MAGIC, read_packed
from cmtool.data.sources.arrays import CIFAR_FOLDER, open_cifar_archive, open_cifar_folder, open_npz, open_pickle
from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.data.sources.folder import open_folder, open_image_zip
from cmtool.data.sources.imagenet import batch_files, open_downsampled_imagenet
from cmtool.data.sources.lmdb import open_lmdb
from cmtool.data.sources.tables import has_images, is_saved, open_arrow, open_parquet
from cmtool.data.sources.tar import is_tar, open_tar, shards_in
from cmtool.errors import DataError, nearest

FORMS = (
    "a folder of images, an EDM zip, .tar shards, .npz, .parquet, .arrow, .cmdata, an lmdb, CIFAR-10's or "
    "image-net.org's batches"
)


class UnknownForm(DataError):
    """A file that does not start like any known data set."""


def dataset_source(data: Dataset, path: Path, signature: str) -> Source:
    """Turn a loaded data set into a source, so that it can be packed again at another size."""
    if data.latent is not None:
        raise DataError(f"{path} holds latents, which are not packed again.", "encode the pictures once more")
    if data.float_samples:
        raise DataError(f"{path} are points in the plane, not images: there is nothing to pack.")

    def records() -> Iterator[Record]:
        for index, image in enumerate(data.images):
            label = None if data.labels is None else int(data.labels[index])
            yield Record(f"{path.name}[{index}]", image.permute(1, 2, 0).numpy(), label)

    kind, notes = data.info.source, data.info.notes
    return Source(kind, path, len(data), records, signature, data.class_names, data.classes, notes=notes)


def _published(path: Path, kind: str | None) -> Source | None:
    """Open a folder in one of the published formats; None if it is in none of them."""
    if (path / "data.mdb").is_file():
        return open_lmdb(path)
    if (path / CIFAR_FOLDER).is_dir() or (path / "data_batch_1").is_file():
        return open_cifar_folder(path, kind)
    if batch_files(path):
        return open_downsampled_imagenet(path)
    if is_saved(path):
        return open_arrow(path)
    return open_parquet(path) if has_images(path) else None


def _only_folder(path: Path) -> Path | None:
    """Return the only entry of a folder if it is a folder too, as unpacking often leaves it; otherwise None."""
    inside = [place for place in path.iterdir() if not is_hidden(place.name)]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else None


def _open_folder(path: Path, kind: str | None) -> Source:
    inner = _only_folder(path)
    source = _published(path, kind) or (_published(inner, kind) if inner else None)
    if source is None and shards_in(path) and not list_folder(path).images:
        return open_tar(path, kind)
    if source is None:
        return open_folder(path, kind)
    beside = len(list_folder(path).images)
    if beside:
        source.notes += (f"{beside:,} image files lie in the same folder and are left out ({source.kind} is read)",)
    return source


def _open_file(path: Path, kind: str | None) -> Source:
    with open(path, "rb") as stream:
        start = stream.read(8)
    if start == MAGIC:
        return dataset_source(read_packed(path), path, sign_file("packed", path))
    if start[:2] == b"PK":
        return open_image_zip(path, kind) or open_npz(path)
    if start[:4] == b"PAR1":
        return open_parquet(path)
    if start[:2] == b"\x1f\x8b":
        return open_cifar_archive(path, kind)
    if is_tar(path):
        return open_tar(path, kind)
    if path.suffix == ".arrow":
        return open_arrow(path)
    if path.suffix == ".mdb":
        return open_lmdb(path)
    if start[:1] == b"\x80":
        return open_pickle(path)
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{path} is a single image; training needs a folder of them.", f"use --data {path.parent}")
    raise UnknownForm(f"{path} is in no known form; known are {FORMS}.")


def open_source(path: str | Path, cfg: DataConfig | None = None) -> Source:
    """Open a data set in any known format, which is detected.

    Args:
        path: a file or folder, or `lsun:PATH` for an lmdb.
        cfg: the [data] table; only its `kind` is used (label rule of a folder, part of CIFAR-10).

    Raises:
        DataError: there is nothing at the path, or it is empty, refused, damaged or in no known format.
    """
    text = str(path)
    lmdb = text.startswith("lsun:")
    place = Path(text.removeprefix("lsun:")).expanduser()
    kind = cfg.kind if cfg else None
    if not place.exists():
        close = nearest(text, DATA_SOURCES)
        hint = f"did you mean {close[0]}?" if close else "name a folder of images or a data file"
        raise DataError(f"there is no data at {place}.", hint)
    try:
        if lmdb:
            return open_lmdb(place)
        return _open_folder(place, kind) if place.is_dir() else _open_file(place, kind)
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror or error}.") from error
