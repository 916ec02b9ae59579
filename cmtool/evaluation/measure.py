"""Images -> features and their statistics, once: results are kept by the content of images and network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from cmtool.errors import DataError
from cmtool.evaluation.features import Features
from cmtool.evaluation.frechet import covariance_factor, feature_factor
from cmtool.evaluation.references import Reference
from cmtool.evaluation.samples import ImageSet
from cmtool.evaluation.statistics import Array, Moments, Statistics, require_finite, statistics
from cmtool.evaluation.store import cached, keep
from cmtool.training.distributed import World

Progress = Callable[[int], None]
VERSION = 1  # of the cached form
CPU = torch.device("cpu")


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
    world: World | None = None,
) -> Measured:
    """Return features of every image, from the cache where the same images met the same network before.

    Several processes take turns by whole batches, so that every batch is the one a single process makes.

    Args:
        images: what to look at.
        network: what to look with.
        batch_size: images at once; changes nothing but speed and rounding.
        advance: called with the number of images done since the last call.
        use_cache: False keeps nothing on disk.
        world: processes that share the work; all must call this, and process 0 alone is given what was found.

    Raises:
        DataError: the network is not for such images, or answers NaN.
    """
    world = world or World()
    network.accepts(images.shape)
    if not world.main:
        return _help(images, network, batch_size, world)
    key = f"{VERSION}-{network.fingerprint}-{images.fingerprint}"
    found = _unpack(cached(key, "features")) if use_cache else None
    known = found is not None and len(found.features) == images.count
    if world.any(known, CPU) and found is not None:
        advance(images.count)
        return found
    result = _together(world.gather_first(_run(images, network, batch_size, advance, world)))
    if use_cache:
        keep(key, "features", _pack(result))
    return result


def _help(images: ImageSet, network: Features, batch_size: int, world: World) -> Measured:
    """Do this process's share for process 0, unless that one knows the features already."""
    if not world.any(False, CPU):
        world.gather_first(_run(images, network, batch_size, lambda count: None, world))
    return Measured(np.empty((0, 0)))


@dataclass
class _Share:
    """What one process has found, batch by batch."""

    features: list[Array] = field(default_factory=list)
    chances: list[Array] = field(default_factory=list)
    moments: Moments | None = None


def _run(images: ImageSet, network: Features, batch_size: int, advance: Progress, world: World) -> _Share:
    found = _Share()
    first, count = world.rows(-(-images.count // batch_size))
    for pixels in itertools.islice(images.batches(batch_size), first, first + count):
        batch = network.call(pixels)
        require_finite(batch.features)
        found.features.append(batch.features)
        if batch.probabilities is not None:
            found.chances.append(batch.probabilities)
        if batch.spatial is not None:
            found.moments = found.moments or Moments(batch.spatial.shape[1])
            found.moments.add(batch.spatial)
        advance(len(pixels) * world.size)
    return found


def _together(shares: Sequence[_Share]) -> Measured:
    """Put the shares of all processes side by side, in the order of the images."""
    features = [batch for share in shares for batch in share.features]
    chances = [batch for share in shares for batch in share.chances]
    moments = [share.moments for share in shares if share.moments is not None]
    for other in moments[1:]:
        moments[0].merge(other)
    spatial = moments[0].finish() if moments and moments[0].count > 1 else None
    return Measured(np.concatenate(features), np.concatenate(chances) if chances else None, spatial)


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
    reference: Reference,
    network: Features,
    batch_size: int = 64,
    advance: Progress = lambda count: None,
    world: World | None = None,
) -> Side:
    """Return the reference's side for a network: its given statistics where they fit, and its images' features.

    In process 0 of `world`; the others call `measure` for the reference's images meanwhile.

    Raises:
        DataError: its statistics were measured with another network, or it holds nothing to compare with.
    """
    if reference.given is not None:
        _check_given(reference, network)
    measured = None
    if reference.images is not None:
        measured = measure(reference.images, network, batch_size, advance, world=world)
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
