"""From a preset's [data] table to a data set."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cmtool.config.schema import DATA_SOURCES, DataConfig
from cmtool.data.builtin import BUILTIN
from cmtool.data.cache import cache_dir
from cmtool.data.dataset import Dataset
from cmtool.data.packed import is_packed, read_packed
from cmtool.data.packing import Progress, Rules, pack
from cmtool.data.sources.base import Source
from cmtool.data.sources.known import locate
from cmtool.data.sources.sniff import open_source
from cmtool.errors import DataError
from cmtool.talk import Talk, Update

_STALE = 24 * 3600  # seconds
StageProgress = Callable[[str, int, int | None], None]


def rules_of(cfg: DataConfig) -> Rules:
    """Return the size and fitting rules of a [data] table."""
    return Rules(cfg.resolution, cfg.channels, cfg.fit, cfg.filter, cfg.small)


def _cached(source: Source, rules: Rules) -> Path:
    key = hashlib.blake2b(f"2 {source.signature} {rules}".encode(), digest_size=8).hexdigest()
    return cache_dir() / "packed" / f"{source.path.stem[:40]}-{rules.resolution}px-{key}.cmdata"


def _sweep(folder: Path) -> None:
    """Remove what a killed packing left a day or more ago: such files can be gigabytes."""
    for path in folder.glob(".*.tmp-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _pack_temporary(source: Source, rules: Rules, progress: Progress | None) -> Dataset:
    """Pack where no cache can be written: into a temporary file that goes when the process ends."""
    with tempfile.TemporaryDirectory(prefix="cmtool-") as folder:
        path = Path(folder) / "data.cmdata"
        pack(source, path, rules, progress)
        data = read_packed(path)
        # Windows keeps mapped files: there the pixels are copied before the file goes.
        return data if os.name == "posix" else replace(data, images=data.images.clone())


def _from(source: Source, data: Dataset) -> Dataset:
    """Let messages name what the user gave, not its packed copy."""
    return replace(data, info=replace(data.info, path=str(source.path)))


def load_source(source: Source, rules: Rules, progress: Progress | None = None) -> Dataset:
    """Load a source through its packed copy in the cache, which is made the first time and whenever files changed.

    Raises:
        DataError: the disk is short, or no usable image is left.
    """
    path = _cached(source, rules)
    if path.exists():
        try:
            return _from(source, read_packed(path))
        except DataError:
            path.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return _from(source, _pack_temporary(source, rules, progress))
    _sweep(path.parent)
    pack(source, path, rules, progress)
    return _from(source, read_packed(path))


def _matching(data: Dataset, cfg: DataConfig, path: Path) -> Dataset:
    """Refuse a packed file of another shape: its pixels were fitted once and are not fitted again."""
    if (data.resolution, data.channels) != (cfg.resolution, cfg.channels):
        raise DataError(
            f"{path} holds images of {data.resolution} pixels and {data.channels} channels; "
            f"the preset wants {cfg.resolution} and {cfg.channels}.",
            f"pack it again: cmtool data make SRC --resolution {cfg.resolution} --out {path}",
        )
    return data


def _labeled(data: Dataset, cfg: DataConfig) -> Dataset:
    """Drop labels that are not asked for, and check those that are."""
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
    """Keep `size` images, drawn at random so that every class stays in, in their old order."""
    if size is None or size >= len(data):
        return data
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:size]
    return data.subset(rows.sort().values)


def _named(cfg: DataConfig) -> DataConfig:
    """Understand the name of a source where a path may stand, unless something of that name is there."""
    if cfg.path in DATA_SOURCES and not Path(cfg.path).exists():
        return cfg.model_copy(update={"source": cfg.path, "path": None})
    return cfg


def load_dataset(cfg: DataConfig, progress: StageProgress | None = None) -> Dataset:
    """Load the data set of a run. A `path` wins over the name of the source, and its form is found by looking.

    Labels are loaded only when `cfg.labels` asks for them.

    Args:
        cfg: the [data] table.
        progress: called with ("packing", images, of images) or ("fetching", bytes, of bytes or None).

    Raises:
        DataError: the source is missing, empty, unreadable or of another shape than the configuration says.
        OfflineError: a data set has to be fetched and cannot be.
    """
    cfg = _named(cfg)
    if cfg.path is None and cfg.source in BUILTIN:
        return BUILTIN[cfg.source](cfg)
    path = locate(cfg, partial(progress, "fetching") if progress else None)
    try:
        if path.is_file() and is_packed(path):
            data = _matching(read_packed(path), cfg, path)
        else:
            data = load_source(
                open_source(path, cfg), rules_of(cfg), partial(progress, "packing") if progress else None
            )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _limited(_labeled(data, cfg), cfg.size)


_SAID = {
    "packing": "packing {total:,} image{s} into the cache; the next start reads that copy",
    "fetching": "fetching the data set, {total:,} bytes; an interrupted download is resumed",
}


def load_and_tell(cfg: DataConfig, talk: Talk) -> Dataset:
    """Load the data set of a run; a first-time packing or download is said once and shown as progress.

    Raises:
        UserError: see `load_dataset`.
    """
    with ExitStack() as stack:
        bars: dict[str, Update] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in bars:
                stack.close()  # a terminal shows one bar at a time
                talk.say(_SAID[stage].format(total=total or 0, s="s" * (total != 1)))
                bars[stage] = stack.enter_context(talk.progress(total, stage))
            bars[stage](completed=done)

        return load_dataset(cfg, progress)
