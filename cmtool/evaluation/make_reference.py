"""Write a reference of your own: statistics, images for precision and recall, and what they were made with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cmtool.errors import DataError
from cmtool.evaluation.judge import Judge
from cmtool.evaluation.samples import ImageSet
from cmtool.evaluation.statistics import Array
from cmtool.files.atomic import atomic_write
from cmtool.version import __version__

KEPT = 10_000  # images kept next to the statistics, as in ADM's batches


def make_reference(path: Path, judge: Judge, features: str, kept: int = KEPT) -> Path:
    """Write `mu`, `sigma` (and `mu_s`, `sigma_s`) of a judge's reference images, and `arr_0` with up to `kept` of them.

    Args:
        path: the npz to write.
        judge: of real images, uint8, without statistics from elsewhere.
        features: the name that `build_features` knows the judge's network by.
        kept: images to keep (0: none), chosen at random with a fixed seed where there are more.

    Raises:
        DataError: points, which are no images; another ending than .npz.
    """
    images, side = judge.reference.images, judge.side
    assert images is not None and side is not None and side.measured is not None
    if images.points:
        raise DataError("a reference file holds images, and these are points.")
    check_place(path)
    arrays = {"mu": side.fit.mean, "sigma": side.fit.covariance}
    if side.spatial is not None:
        arrays |= {"mu_s": side.spatial.mean, "sigma_s": side.spatial.covariance}
    meta = {
        "count": images.count,
        "source": f"{images.count:,} images of {images.name}",
        "images_fingerprint": side.fingerprint,
        "shape": list(images.shape),
        "features": features,
        "features_fingerprint": judge.network.fingerprint,
        "mode": judge.reference.mode,
        "samples": min(50_000, images.count),
        "cmtool": __version__,
    }
    arrays["meta"] = np.array(json.dumps(meta))
    if kept:
        arrays["arr_0"] = _kept_images(images, kept)
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
    return path


def check_place(path: Path) -> None:
    """Refuse to write a reference to a file of another ending; raises `DataError`."""
    if path.suffix != ".npz":
        raise DataError(f"{path} must end in .npz.")


def _kept_images(images: ImageSet, kept: int) -> Array:
    rows, parts, start = _chosen(images.count, kept), [], 0
    for batch in images.batches(256):
        inside = rows[(rows >= start) & (rows < start + len(batch))] - start
        parts.append(batch[inside])
        start += len(batch)
    return np.concatenate(parts)


def _chosen(count: int, kept: int) -> Array:
    if count <= kept:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, size=kept, replace=False))
