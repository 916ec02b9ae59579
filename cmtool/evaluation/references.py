"""What samples are compared with: published statistics and batches by name, built-in data, presets, files.

Two pixel sets are called ImageNet 64 x 64: the batch that ADM's evaluator and the consistency-model papers use
(`imagenet64`) and the statistics of EDM's own pixels (`imagenet64-edm`). Metrics against one cannot be compared with
metrics against the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmtool.checkpoint import read_header, resolve_file
from cmtool.config.judgments import held_out_data
from cmtool.config.load import from_toml, resolve
from cmtool.config.schema import DataConfig
from cmtool.data import Dataset, load_dataset
from cmtool.data.builtin import AVATARS_SIDE
from cmtool.data.packed import is_packed, read_packed
from cmtool.errors import DataError
from cmtool.evaluation.choices import check_reference_name
from cmtool.evaluation.features import general_features, usual_features
from cmtool.evaluation.samples import ImageSet, from_dataset, open_images, open_npz_images
from cmtool.evaluation.statistics import Array, Statistics
from cmtool.files.archives import NpzReader
from cmtool.files.cache import sha256
from cmtool.files.download import Remote, fetch
from cmtool.rng import generator

Say = Callable[[str], None]
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
CLEAN_FID = "https://www.cs.cmu.edu/~clean-fid/stats"


# The usual features of pictures that no network of ours was trained on.
GENERAL = "general"


@dataclass(frozen=True)
class Named:
    """A reference known by name: its usual features, resizing rule, number of samples, and where it is from.

    `GENERAL` features are `imagenet` where it is installed, else the small network.
    `shape` (H, W, C) is given for images of which only a file of statistics is published.
    """

    features: str
    count: int
    mode: str = "legacy_tensorflow"
    data: DataConfig | None = None
    remote: Callable[[str], Remote] | None = None
    shape: tuple[int, int, int] | None = None


def _adm(name: str, path: str) -> Callable[[str], Remote]:
    remote = Remote(f"the reference batch {name}", f"{ADM}/{path}", "references", path.rsplit("/", 1)[1])
    return lambda mode: remote


def _clean_fid(mode: str) -> Remote:
    file = f"cifar10_{mode}_train_32.npz"
    return Remote(f"the reference statistics cifar10 ({mode})", f"{CLEAN_FID}/{file}", "references", file)


def _edm(mode: str) -> Remote:
    url = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/imagenet-64x64.npz"
    return Remote("the reference statistics imagenet64-edm", url, "references", "edm-imagenet-64x64.npz")


NAMED: dict[str, Named] = {
    "digits": Named("digits", 1797, data=DataConfig(source="digits", resolution=8, channels=1, labels=True)),
    "shapes": Named("shapes", 1797, data=DataConfig(source="shapes", resolution=16, channels=3, labels=True)),
    "avatars": Named(
        GENERAL, 2000, data=DataConfig(source="avatars", resolution=AVATARS_SIDE, channels=3, kind="heldout", size=2000)
    ),
    "toy2d": Named("points", 10_000, data=DataConfig(source="toy2d", resolution=1, channels=2, labels=True)),
    "cifar10": Named("inception", 50_000, remote=_clean_fid, shape=(32, 32, 3)),
    "imagenet64": Named("inception", 50_000, remote=_adm("imagenet64", "imagenet/64/VIRTUAL_imagenet64_labeled.npz")),
    "imagenet64-edm": Named("inception", 50_000, remote=_edm, shape=(64, 64, 3)),
    "imagenet256": Named(
        "inception", 50_000, remote=_adm("imagenet256", "imagenet/256/VIRTUAL_imagenet256_labeled.npz")
    ),
    "lsun_bedroom256": Named(
        "inception", 50_000, remote=_adm("lsun_bedroom256", "lsun/bedroom/VIRTUAL_lsun_bedroom256.npz")
    ),
    "lsun_cat256": Named("inception", 50_000, remote=_adm("lsun_cat256", "lsun/cat/VIRTUAL_lsun_cat256.npz")),
}


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: images, ready statistics, or both.

    `given` are statistics from a file and `given_features` is the fingerprint of the network that they were measured
    with ("inception" if a published file says no more); `images` are for precision, recall and KID. `training` are as
    many of the images that the reference was held out of, to judge copying by. `shape` (H, W, C) is that of the images,
    None where statistics alone do not say it.
    """

    name: str
    source: str
    images: ImageSet | None
    features: str
    count: int
    mode: str = "legacy_tensorflow"
    given: Statistics | None = None
    given_spatial: Statistics | None = None
    given_features: str | None = None
    digest: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    training: ImageSet | None = None
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.images is not None:
            object.__setattr__(self, "shape", self.images.shape)

    def own(self, num: int | None, mode: str | None) -> Reference:
        """Return only its images (`num` of them), without statistics from a file: what a new reference is made from.

        `mode` replaces the resizing rule if it is given.
        """
        images = self.images if self.images is None or num is None else self.images.some(num)
        return Reference(self.name, self.source, images, self.features, self.count, mode or self.mode)


def check_reference(text: str, mode: str | None = None, say: Say = lambda text: None) -> None:
    """Refuse an unknown reference, and download a published one, before anything slow begins.

    Raises:
        DataError: there is no such name, file or preset.
        OfflineError: the published file is not here and cannot be downloaded.
    """
    named = NAMED.get(text)
    if named and named.remote:
        fetch(named.remote(mode or named.mode), say)
    elif not named:
        check_reference_name(text)


def resolve_reference(
    text: str, shape: tuple[int, int, int] | None = None, mode: str | None = None, say: Say = lambda text: None
) -> Reference:
    """Return the reference that `text` names: a published or built-in one, a file or folder, a preset's data.

    A model or a run folder names the images that its training held out.

    Args:
        text: name or path.
        shape: (H, W, C) of the samples; procedural data are drawn at that resolution.
        mode: the resizing rule of Inception, if published statistics exist for several.
        say: told about downloads.

    Raises:
        DataError: there is no such name or file, or it is damaged.
        OfflineError: a published file is not here and cannot be downloaded.
    """
    check_reference(text, mode, say)
    named = NAMED.get(text)
    if named and named.remote:
        chosen = mode or named.mode
        return _from_file(text, fetch(named.remote(chosen), say), named, chosen)
    if named and named.data:
        return _builtin(text, named, shape)
    if Path(text).exists():
        found = _from_path(Path(text))
        for note in found.images.notes if found.images else ():
            say(f"{text}: {note}")
        return found
    return _from_preset(text)


def _builtin(name: str, named: Named, shape: tuple[int, int, int] | None) -> Reference:
    assert named.data is not None
    data = named.data
    grows = name == "shapes" or (name == "avatars" and shape is not None and shape[0] % AVATARS_SIDE == 0)
    if grows and shape is not None and shape[0] == shape[1] and shape[2] == 3:
        data = data.model_copy(update={"resolution": shape[0]})
    images = from_dataset(load_dataset(data), name)
    said = f"{images.count:,} held-out images" if data.kind == "heldout" else f"all {images.count:,} images"
    features = general_features() if named.features == GENERAL else named.features
    training = None
    if data.kind == "heldout":
        learned = load_dataset(data.model_copy(update={"kind": "train", "size": images.count}))
        training = from_dataset(learned, f"training images of {name}")
    return Reference(name, f"{said} of the data set", images, features, named.count, training=training)


def _from_preset(name: str) -> Reference:
    config = resolve(name).config
    images = from_dataset(load_dataset(config.data.model_copy(update={"holdout": 0.0})), name)
    features = config.eval.features or usual_features()
    return Reference(name, f"the data of preset {name}", images, features, config.eval.count)


def _from_path(path: Path) -> Reference:
    if path.suffix == ".npz" and path.is_file():
        return _from_file(str(path), path, Named("inception", 50_000), "legacy_tensorflow")
    if path.suffix == ".safetensors" or any((path / name).is_file() for name in ("config.toml", "model.safetensors")):
        return _from_model(path)
    if path.is_file() and is_packed(path):
        images = from_dataset(read_packed(path), str(path))
    else:
        images = open_images(path)
    return Reference(str(path), f"{images.count:,} images", images, usual_features(), images.count)


# --- images held out of training --------------------------------------------------------------------------------------

# How many samples are usually compared with held-out images: a handful would be judged by chance.
LEAST_SAMPLES = 1000


def held_out_reference(data: Dataset, place: str) -> Reference:
    """Return the reference of a run on `data`: the images that were held out, and as many of the others.

    Args:
        data: a training set with `held_out` images.
        place: where they are from, for messages.
    """
    held = data.held_out
    assert held is not None
    others = torch.randperm(len(data), generator=generator(0, "beside-held-out"))[: len(held)].sort().values
    images = from_dataset(held, f"held-out images of {place}")
    training = from_dataset(data.subset(others), f"training images of {place}")
    said = f"{len(held):,} images held out of training by content"
    return Reference(
        images.name, said, images, usual_features("small"), max(LEAST_SAMPLES, len(held)), training=training
    )


def _from_model(path: Path) -> Reference:
    """Return what the training of a model held out, found again by its content.

    Raises:
        DataError: nothing was held out, or its images are gone.
    """
    config = path / "config.toml"
    if path.is_dir() and not (path / "model.safetensors").is_file():
        table: DataConfig | None = from_toml(config).data
    else:
        table = held_out_data(read_header(resolve_file(path)))
    if table is None or not table.holdout:
        raise DataError(f"the training of {path} held no images out.", "name another reference with --ref")
    try:
        data = load_dataset(table)
    except DataError as error:
        raise DataError(
            f"the images that {path} was trained on are needed for those it held out: {error.message}",
            "name another reference with --ref",
        ) from error
    if data.held_out is None:
        raise DataError(
            f"{table.path or table.source} holds too few images to hold any out.", "name another with --ref"
        )
    return held_out_reference(data, str(table.path or table.source))


# --- npz files with statistics ---------------------------------------------------------------------------------------


def _from_file(name: str, path: Path, named: Named, mode: str) -> Reference:
    reader = NpzReader(path)
    entries = reader.arrays.keys()
    if "mu" not in entries:
        images = open_npz_images(path, reader)
        features = named.features if named.remote else usual_features()
        return Reference(name, f"{images.count:,} images", images, features, images.count, mode)
    meta = _meta(reader) if "meta" in entries else {}
    count = int(meta.get("count", 0))
    given = _pair(reader, "mu", "sigma", count)
    spatial = _pair(reader, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= entries else None
    return Reference(
        name,
        str(meta.get("source") or f"statistics from {path.name}"),
        open_npz_images(path, reader) if "arr_0" in entries else None,
        str(meta.get("features", named.features)),
        int(meta.get("samples", named.count)),
        str(meta.get("mode", mode)),
        given,
        spatial,
        str(meta.get("features_fingerprint", "inception")),
        sha256(path),
        meta,
        shape=named.shape or (tuple(meta["shape"]) if "shape" in meta else None),
    )


def _pair(reader: NpzReader, mean_name: str, covariance_name: str, count: int) -> Statistics:
    path, mean, covariance = reader.path, _read(reader, mean_name), _read(reader, covariance_name)
    size = mean.shape[0] if mean.ndim == 1 else -1
    if covariance.shape != (size, size):
        raise DataError(
            f"{path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} do not fit together."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: {mean_name} or {covariance_name} holds values that are not finite.")
    return Statistics(count, mean, covariance)


def _read(reader: NpzReader, name: str) -> Array:
    found = reader.read(name)
    if found.dtype.kind not in "fiu":
        raise DataError(f"{reader.path}: {name} holds {found.dtype}, not numbers.")
    return found.astype(np.float64)


def _meta(reader: NpzReader) -> dict[str, Any]:
    try:
        found = json.loads(str(reader.read("meta")))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{reader.path}: the entry meta cannot be read ({error}).") from error
    found = found if isinstance(found, dict) else {}
    for key in ("count", "samples"):
        if not isinstance(found.get(key, 0), int):
            raise DataError(f"{reader.path}: the entry meta has {key} = {str(found[key])[:40]!r}, which is no number.")
    shape = found.get("shape", [1, 1, 1])
    if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(length, int) for length in shape)):
        raise DataError(
            f"{reader.path}: the entry meta has shape = {str(shape)[:40]!r}, which is no height, width, channels."
        )
    return found
