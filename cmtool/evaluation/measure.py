"""Images -> features and their statistics, once: results are kept by the content of images and network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cmtool.errors import DataError
from cmtool.evaluation.features import Features
from cmtool.evaluation.frechet import covariance_factor, feature_factor
from cmtool.evaluation.references import Reference
from cmtool.evaluation.samples import ImageSet
from cmtool.evaluation.statistics import Array, Moments, Statistics, require_finite, statistics
from cmtool.evaluation.store import cached, keep

Progress = Callable[[int], None]
VERSION = 1  # of the cached form


@dataclass(frozen=True)
class Measured:
    """What a network says about a set: features (N, D), class probabilities (N, classes), spatial statistics."""

    features: Array
    probabilities: Array | None = None
    spatial: Statistics | None = None


@dataclass(frozen=True)
class Side:
    """The reference as metrics need it: statistics always, features and probabilities where there are images.

    `given` says that the statistics are from a file and not those of the images.
    """

    fit: Statistics
    spatial: Statistics | None
    measured: Measured | None
    given: bool = False

    @cached_property
    def factor(self) -> Array:
        """A factor of the covariance, found once for all that is compared with this side."""
        if self.measured is not None and not self.given:
            return feature_factor(self.measured.features, self.fit)
        return covariance_factor(self.fit.covariance)

    @property
    def images(self) -> int:
        """Number of images whose features are known."""
        return 0 if self.measured is None else len(self.measured.features)


def measure(
    images: ImageSet,
    network: Features,
    batch_size: int = 64,
    advance: Progress = lambda count: None,
    use_cache: bool = True,
) -> Measured:
    """Return features of every image, from the cache where the same images met the same network before.

    Args:
        images: what to look at.
        network: what to look with.
        batch_size: images at once; changes nothing but speed and rounding.
        advance: called with the number of images done since the last call.
        use_cache: False keeps nothing on disk.

    Raises:
        DataError: the network is not for such images, or answers NaN.
    """
    network.accepts(images.shape)
    key = f"{VERSION}-{network.fingerprint}-{images.fingerprint}"
    found = _unpack(cached(key, "features")) if use_cache else None
    if found is not None and len(found.features) == images.count:
        advance(images.count)
        return found
    result = _run(images, network, batch_size, advance)
    if use_cache:
        keep(key, "features", _pack(result))
    return result


def _run(images: ImageSet, network: Features, batch_size: int, advance: Progress) -> Measured:
    parts: list[Array] = []
    chances: list[Array] = []
    moments: Moments | None = None
    for pixels in images.batches(batch_size):
        batch = network.call(pixels)
        require_finite(batch.features)
        parts.append(batch.features)
        if batch.probabilities is not None:
            chances.append(batch.probabilities)
        if batch.spatial is not None:
            moments = moments or Moments(batch.spatial.shape[1])
            moments.add(batch.spatial)
        advance(len(pixels))
    spatial = moments.finish() if moments is not None and moments.count > 1 else None
    return Measured(np.concatenate(parts), np.concatenate(chances) if chances else None, spatial)


def _pack(result: Measured) -> dict[str, Array]:
    arrays = {"features": result.features}
    if result.probabilities is not None:
        arrays["probabilities"] = result.probabilities
    if result.spatial is not None:
        arrays |= {"mu_s": result.spatial.mean, "sigma_s": result.spatial.covariance}
    return arrays


def _unpack(arrays: dict[str, Array] | None) -> Measured | None:
    if arrays is None or "features" not in arrays:
        return None
    spatial = Statistics(len(arrays["features"]), arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
    return Measured(arrays["features"], arrays.get("probabilities"), spatial)


def measure_reference(
    reference: Reference, network: Features, batch_size: int = 64, advance: Progress = lambda count: None
) -> Side:
    """Return the reference's side for a network: its given statistics where they fit, and its images' features.

    Raises:
        DataError: its statistics were measured with another network, or it holds nothing to compare with.
    """
    if reference.given is not None:
        _check_given(reference, network)
    measured = measure(reference.images, network, batch_size, advance) if reference.images is not None else None
    if reference.given is not None:
        return Side(reference.given, reference.given_spatial, measured, given=True)
    if measured is None:
        raise DataError(f"the reference {reference.name} holds neither images nor statistics.")
    return Side(statistics(measured.features), measured.spatial, measured)


def _check_given(reference: Reference, network: Features) -> None:
    """Refuse statistics of another network or resizing rule."""
    said = reference.given_features or "inception"
    fits = network.fingerprint == said or (said == "inception" and network.fingerprint.startswith("inception-"))
    wrong_mode = fits and said == "inception" and network.extras.get("resize") != reference.mode
    if not fits or wrong_mode:
        wanted = f"{reference.features} ({reference.mode})" if reference.features == "inception" else reference.features
        raise DataError(
            f"the reference {reference.name} holds statistics of {wanted} features, not of {network.name}.",
            f"use --features {reference.features}"
            + (f" --mode {reference.mode}" if reference.features == "inception" else "")
            + ", or make one of your own with cmtool eval --make-ref",
        )
