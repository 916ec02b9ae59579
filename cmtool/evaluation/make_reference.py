"""Write a reference of one's own: statistics, images for precision and recall, and what they were made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cmtool.checkpoint import atomic_write
from cmtool.errors import DataError
from cmtool.evaluation.features import Features
from cmtool.evaluation.measure import measure
from cmtool.evaluation.samples import ImageSet
from cmtool.evaluation.statistics import Array, statistics
from cmtool.version import __version__

KEPT = 10_000  # images kept beside the statistics, as in ADM's batches


def make_reference(
    path: Path,
    images: ImageSet,
    network: Features,
    mode: str,
    features: str,
    kept: int = KEPT,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write `mu`, `sigma` (and `mu_s`, `sigma_s`) of all images, and `arr_0` with up to `kept` of them.

    Args:
        path: the npz to write.
        images: the real images; uint8.
        network: from `build_features`.
        mode: resizing rule, for the record.
        features: the name that `build_features` knows the network by.
        kept: images to keep (0: none), chosen at random with a fixed seed when there are more.
        batch_size: images at once.
        advance: told the number of images done.

    Raises:
        DataError: points, which are no images; too few images.
    """
    if images.points:
        raise DataError("a reference file holds images, and these are points.")
    if path.suffix != ".npz":
        raise DataError(f"{path} must end in .npz.")
    measured = measure(images, network, batch_size, advance)
    fit = statistics(measured.features)
    arrays = {"mu": fit.mean, "sigma": fit.covariance}
    if measured.spatial is not None:
        arrays |= {"mu_s": measured.spatial.mean, "sigma_s": measured.spatial.covariance}
    meta = {
        "count": images.count,
        "source": f"{images.count:,} images of {images.name}",
        "images_fingerprint": images.fingerprint,
        "features": features,
        "features_fingerprint": network.fingerprint,
        "mode": mode,
        "samples": min(50_000, images.count),
        "cmtool": __version__,
    }
    arrays["meta"] = np.array(json.dumps(meta))
    if kept:
        arrays["arr_0"] = _kept_images(images, kept)
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
    return path


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
