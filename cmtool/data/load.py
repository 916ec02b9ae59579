"""Loads the data set that a preset's [data] table describes."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from cmtool.config.condition import condition_of
from cmtool.config.schema import DataConfig
from cmtool.config.sources import named_source
from cmtool.data.builtin import BUILTIN
from cmtool.data.dataset import Dataset
from cmtool.data.holdout import hold_out
from cmtool.data.packed import Rules, is_packed, pack, read_packed
from cmtool.data.sources.base import Source
from cmtool.data.sources.known import locate
from cmtool.data.sources.sniff import open_source
from cmtool.errors import DataError
from cmtool.files.cache import cache_dir
from cmtool.talk import SILENCE, Talk

_STALE = 24 * 3600  # seconds


def rules_of(cfg: DataConfig) -> Rules:
    """Return the size and fitting rules of a [data] table."""
    return Rules(cfg.resolution, cfg.channels, cfg.fit, cfg.filter, cfg.small)


def _cached(source: Source, rules: Rules) -> Path:
    key = hashlib.blake2b(f"2 {source.signature} {rules}".encode(), digest_size=8).hexdigest()
    return cache_dir() / "packed" / f"{source.path.stem[:40]}-{rules.resolution}px-{key}.cmdata"


def _sweep(folder: Path) -> None:
    """Remove files that interrupted packings left behind at least a day ago; they can be gigabytes."""
    for path in folder.glob(".*.tmp-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _pack_temporary(source: Source, rules: Rules, talk: Talk) -> Dataset:
    """Pack into a temporary file that disappears with the process, for when the cache is not writable."""
    with tempfile.TemporaryDirectory(prefix="cmtool-") as folder:
        path = Path(folder) / "data.cmdata"
        pack(source, path, rules, talk)
        data = read_packed(path)
        # Windows cannot delete a mapped file, so the pixels are copied first.
        return data if os.name == "posix" else replace(data, storage=data.storage.clone())


def _from(source: Source, data: Dataset) -> Dataset:
    """Name the path the user gave in messages, not its packed copy."""
    return replace(data, info=replace(data.info, path=str(source.path)))


def load_source(source: Source, rules: Rules, talk: Talk = SILENCE) -> Dataset:
    """Load a source through its packed copy in the cache, which is made on first use and when files change.

    Raises:
        DataError: the disk is short, or no usable image is left.
    """
    path = _cached(source, rules)
    if path.exists():
        try:
            return _from(source, read_packed(path))
        except DataError:
            path.unlink()
    images = "image" if source.count == 1 else "images"
    talk.say(f"packing {source.count:,} {images} into the cache; the next start reads that copy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return _from(source, _pack_temporary(source, rules, talk))
    _sweep(path.parent)
    pack(source, path, rules, talk)
    return _from(source, read_packed(path))


def _matching(data: Dataset, cfg: DataConfig) -> Dataset:
    """Refuse a packed file of another shape; its pixels are not resized a second time."""
    if data.latent is not None:
        (_, side, _), shape = data.latent["pixels"], (data.channels, data.resolution)
        sets = [] if side == cfg.resolution else [f"--set data.resolution={side}"]
        sets += [] if cfg.channels == 3 else ["--set data.channels=3"]
        of_pixels = len(sets)
        sets += [] if cfg.latent in (None, shape) else [f"--set 'data.latent=[{shape[0]}, {shape[1]}]'"]
        if of_pixels:
            raise DataError(
                f"{data.info.path} holds latents of images of {side} pixels and 3 channels; the preset wants "
                f"{cfg.resolution} and {cfg.channels}.",
                f"add {' '.join(sets)}",
            )
        if sets:
            raise DataError(
                f"{data.info.path} holds latents of {shape[0]} channels and {shape[1]} a side; the preset "
                f"wants {cfg.shape[0]} and {cfg.shape[1]}.",
                f"add {' '.join(sets)}",
            )
        return data
    if (data.resolution, data.channels) != (cfg.resolution, cfg.channels):
        raise DataError(
            f"{data.info.path} holds images of {data.resolution} pixels and {data.channels} channels; "
            f"the preset wants {cfg.resolution} and {cfg.channels}.",
            f"pack it again: cmtool data make SRC --resolution {cfg.resolution} --out {data.info.path}",
        )
    return data


def _labeled(data: Dataset, cfg: DataConfig) -> Dataset:
    """Drop labels that are not wanted, and check those that are."""
    if not cfg.labels:
        return replace(data, labels=None, class_names=None, classes=None)
    place = data.info.path or cfg.source
    if data.labels is None:
        raise DataError(
            f"{place} has no class labels and the preset conditions on them.",
            "put images into one folder per class, or use --set data.labels=false",
        )
    if cfg.num_classes is not None and (data.classes or 0) > cfg.num_classes:
        raise DataError(
            f"{place} has {data.classes} classes, more than data.num_classes = {cfg.num_classes}.",
            f"use --set data.num_classes={data.classes}",
        )
    return replace(data, classes=cfg.num_classes or data.classes)


def _limited(data: Dataset, size: int | None) -> Dataset:
    """Keep `size` images in their order, drawn at random so that all classes are represented."""
    if size is None or size >= len(data):
        return data
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:size]
    return data.subset(rows.sort().values)


def _named(cfg: DataConfig) -> DataConfig:
    """Accept the name of a source in place of a path, unless a file of that name exists."""
    named = named_source(cfg.path)
    return cfg.model_copy(update={"source": named, "path": None}) if named else cfg


def find_data(cfg: DataConfig, talk: Talk = SILENCE) -> Source | Dataset:
    """Return what `cfg` names before its images are read: a listed source, or a data set that needs no packing.

    Args:
        cfg: the [data] table.
        talk: told about a download.

    Raises:
        DataError: the source is missing, empty or unreadable.
        OfflineError: a data set has to be downloaded and cannot be.
    """
    cfg = _named(cfg)
    found: Source | Dataset
    if cfg.path is None and cfg.source in BUILTIN:
        found, path = BUILTIN[cfg.source](cfg), Path(cfg.source)
    else:
        path = locate(cfg, talk)
        try:
            found = read_packed(path) if path.is_file() and is_packed(path) else open_source(path, cfg)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if cfg.latent is not None and (isinstance(found, Source) or found.latent is None):
        raise DataError(
            f"{path} holds pictures, and the preset trains on latents.",
            f"cmtool data make {path} --resolution {cfg.resolution} --encode VAE --out latents.cmdata encodes them",
        )
    return found


def load_dataset(cfg: DataConfig, talk: Talk = SILENCE, found: Source | Dataset | None = None) -> Dataset:
    """Load the data set of a run. A `path` takes precedence over the source's name; its format is detected.

    Labels are loaded only if `cfg.labels` is set. The images that `cfg.holdout` keeps from training are not among the
    data set's own but in its `held_out`.

    Args:
        cfg: the [data] table.
        talk: told once about a download and about the first packing, and shows their progress.
        found: what `find_data` returned, so that a large folder is listed once.

    Raises:
        DataError: the source is missing, empty, unreadable or of another shape than the configuration says.
        OfflineError: a data set has to be downloaded and cannot be.
    """
    cfg = _named(cfg)
    found = find_data(cfg, talk) if found is None else found
    if isinstance(found, Source):
        try:
            data = load_source(found, rules_of(cfg), talk)
        except OSError as error:
            raise DataError(f"{found.path} cannot be read: {error.strerror or error}.") from error
    elif cfg.path is None and cfg.source in BUILTIN:
        return hold_out(found, cfg.holdout)
    else:
        data = _matching(found, cfg)
    seen = condition_of(cfg.model_dump())
    if seen is not None and not seen.is_derived:
        data = _paired(data, cfg, locate(cfg, talk), seen.path, talk)
    return _limited(hold_out(_labeled(data, cfg), cfg.holdout), cfg.size)


def _paired(data: Dataset, cfg: DataConfig, path: Path, beside: str, talk: Talk) -> Dataset:
    """Pair every image with the picture of the same name.

    Raises:
        DataError: a picture is missing, too many, or cannot be used.
    """
    own = cfg.model_copy(update={"path": beside, "labels": False, "size": None, "condition": None, "holdout": 0.0})
    here, there = _stems(path, cfg), _stems(Path(beside).expanduser(), cfg)
    for names, others, one, other in ((here, there, path, beside), (there, here, beside, path)):
        if alone := sorted(set(names) - set(others)):
            raise DataError(
                f"{len(alone)} of the {len(names)} images in {one} have no picture of their name in {other}, "
                f"e.g. {alone[0]}.",
                "data.condition needs one for every image, and no others",
            )
    pictures = load_dataset(own, talk)
    for place, found, count in ((path, data, len(here)), (beside, pictures, len(there))):
        if len(found) != count:
            raise DataError(
                f"{count - len(found)} of {count} images in {place} cannot be used, and pairs need all of them.",
                "remove them and their pairs, or use --set data.small=upscale for small ones",
            )
    mark = hashlib.blake2b(f"{data.fingerprint} {pictures.fingerprint}".encode(), digest_size=16).hexdigest()
    return replace(data, beside=pictures.storage, fingerprint=mark)


def _stems(place: Path, cfg: DataConfig) -> list[str]:
    """Return the names of the images in a folder or zip, without their endings, in the order of packing."""
    if not place.exists():
        raise DataError(f"{place} does not exist.", "data.condition is superres:N, gray, edges, or a folder of pairs")
    if place.is_file() and is_packed(place):
        raise DataError(f"{place} keeps no names, and pairs are told by their names.", "name the folder of images")
    stems = [record.name.rpartition(".")[0] for record in open_source(place, cfg).records()]
    if len(set(stems)) != len(stems):
        raise DataError(f"{place} holds images that differ in their endings alone, and pairs are told by their names.")
    return stems
