"""Describes a data set for people: counts, sizes, classes and a few pictures."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmtool.config.schema import DataConfig
from cmtool.config.sources import SOURCES, named_source
from cmtool.data.builtin import BUILTIN
from cmtool.data.dataset import Dataset
from cmtool.data.decode import Bytes, SkippedImage, channels_of, fit_image
from cmtool.data.images import to_nhwc
from cmtool.data.packed import Rules, is_packed, pack, read_packed
from cmtool.data.sources.base import Source, decode
from cmtool.data.sources.known import locate
from cmtool.data.sources.sniff import dataset_source, open_source
from cmtool.errors import DataError
from cmtool.talk import SILENCE, Talk

PROBE = 256  # files of an unpacked source that are decoded to learn their sizes


@dataclass(frozen=True)
class Survey:
    """`facts` are plain values for JSON; `pictures` is uint8 (B, H, W, C), `points` (B, 2, 1, 1) for toy data."""

    facts: dict[str, Any]
    pictures: Bytes | None
    points: Tensor | None = None


def _spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` of range(count), evenly spread so that all of the sorted classes appear."""
    return sorted({index * count // min(count, wanted) for index in range(min(count, wanted))})


def _class_counts(counts: Counter[int], names: tuple[str, ...] | None, classes: int) -> list[dict[str, Any]]:
    given = names or ()
    return [
        {"label": label, "name": given[label] if label < len(given) else None, "images": counts[label]}
        for label in range(classes)
    ]


def survey_dataset(data: Dataset, path: Path | None, pictures: int) -> Survey:
    """Describe a packed or built-in data set exactly."""
    facts: dict[str, Any] = {**data.summary, "path": None if path is None else str(path), "images": len(data)}
    facts |= {"resolution": data.resolution, "channels": data.channels, "fingerprint": data.fingerprint}
    facts["bytes"] = None if path is None else path.stat().st_size
    if data.labels is not None:
        counts = Counter(data.labels.tolist())
        facts["class_counts"] = _class_counts(counts, data.class_names, data.classes or 0)
    if data.latent is not None:
        facts["latent"] = dict(data.latent)
    if data.float_samples or not pictures:
        return Survey(facts, None, data.images if data.float_samples else None)
    chosen = torch.tensor(_spread(len(data), pictures), dtype=torch.long)
    if data.latent is not None:
        from cmtool.data.latents import decoder

        return Survey(facts, to_nhwc(decoder(data.latent)(data.batch(chosen)[0])))
    return Survey(facts, data.images[chosen].permute(0, 2, 3, 1).numpy())


def _probe(source: Source, wanted: int) -> tuple[list[Bytes], Counter[str], Counter[int]]:
    """Decode some images of an unpacked source and count the labels of all."""
    chosen = set(_spread(source.count, wanted))
    images: list[Bytes] = []
    problems: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    for index, record in enumerate(source.records()):
        if record.label is not None:
            labels[record.label] += 1
        if index in chosen:
            try:
                images.append(decode(record, None))
            except SkippedImage as skip:
                problems[skip.reason] += 1
    return images, problems, labels


def survey_source(source: Source, pictures: int) -> Survey:
    """Describe an unpacked source: every label is counted, sizes come from a sample of its images."""
    images, problems, labels = _probe(source, max(PROBE, pictures))
    sizes = Counter(f"{image.shape[1]}x{image.shape[0]}" for image in images)
    facts: dict[str, Any] = {"source": source.kind, "path": str(source.path), "found": source.found}
    facts |= {"images": source.count, "skipped": dict(source.skipped), "classes": source.classes}
    facts |= {"class_names": list(source.class_names) if source.class_names else None, "notes": list(source.notes)}
    facts |= {"looked_at": sum(sizes.values()) + sum(problems.values()), "unusable": dict(problems)}
    facts["sizes"] = dict(sizes.most_common(10))
    if source.classes:
        facts["class_counts"] = _class_counts(labels, source.class_names, source.classes)
    side = max((min(128, max(image.shape[:2])) for image in images), default=0)
    shown = [fit_image(channels_of(images[i], 3), side, "pad", "lanczos") for i in _spread(len(images), pictures)]
    return Survey(facts, np.stack(shown) if shown else None)


def _builtin(name: str, resolution: int | None) -> Dataset:
    usual = SOURCES[name].usual
    assert usual is not None
    table = DataConfig.model_validate(
        {"source": name, "resolution": resolution or usual[0], "channels": usual[1], "labels": True}
    )
    return BUILTIN[name](table)


def resolve(path: str, kind: str | None = None, resolution: int | None = None) -> Source:
    """Open anything a user may name as data: a path, `lsun:PATH`, or the name of a published or built-in set."""
    named = named_source(path)
    if named in BUILTIN:
        data = _builtin(path, resolution)
        return dataset_source(data, Path(path), data.fingerprint)
    table = DataConfig.model_validate({"source": "folder", "path": path, "resolution": resolution or 64, "kind": kind})
    if named:
        table = table.model_copy(update={"source": named, "path": None})
        return open_source(locate(table), table)
    return open_source(path, table)


def survey(path: str, kind: str | None = None, pictures: int = 64) -> Survey:
    """Describe any data set a user may name.

    Args:
        path: a file, a folder, `lsun:PATH`, or the name of a published or built-in set.
        kind: label rule of a folder ("prefix"), part of CIFAR-10 ("test").
        pictures: how many images to return for a grid.

    Raises:
        DataError: see `open_source`.
    """
    if named_source(path) in BUILTIN:
        return survey_dataset(_builtin(path, None), None, pictures)
    place = Path(path).expanduser()
    if place.is_file() and is_packed(place):
        return survey_dataset(read_packed(place), place, pictures)
    return survey_source(resolve(path, kind), pictures)


def make(
    path: str,
    out: Path,
    rules: Rules,
    kind: str | None = None,
    talk: Talk = SILENCE,
    latents: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Pack any data set a user may name into `out` and return the header of the packed file.

    `latents`: an autoencoder and a normalization (see `latents`); None packs the pictures themselves.

    Raises:
        DataError: see `open_source` and `pack`; or `out` is a file of another kind, or the source itself.
    """
    source = resolve(path, kind, rules.resolution)
    if out.is_dir():
        raise DataError(f"{out} is a folder; --out names the packed file.", f"use --out {out / 'data.cmdata'}")
    if out.exists() and out.resolve() == source.path.resolve():
        raise DataError(f"{out} is the source itself.", "choose another --out")
    if out.exists() and not is_packed(out):
        raise DataError(f"{out} exists and is no packed data set; it is left alone.", "choose another --out")
    if latents is None:
        return pack(source, out, rules, talk)
    from cmtool.data.latents import fitting_autoencoder, pack_latents

    fitting_autoencoder(*latents, rules.resolution, rules.channels)
    with tempfile.TemporaryDirectory(prefix="cmtool-", dir=out.parent) as folder:
        pack(source, Path(folder) / "pictures.cmdata", rules, talk)
        return pack_latents(Path(folder) / "pictures.cmdata", out, *latents, talk)
