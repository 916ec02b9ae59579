"""From images to features and their statistics. Results are cached by the content of the images and the network."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from cmtool.errors import DataError, UserError
from cmtool.evaluation.features import Features
from cmtool.evaluation.frechet import covariance_factor, feature_factor
from cmtool.evaluation.references import Reference
from cmtool.evaluation.samples import ImageSet
from cmtool.evaluation.statistics import Array, Moments, Statistics, require_finite, statistics
from cmtool.files.atomic import atomic_write
from cmtool.files.cache import cache_dir
from cmtool.machine.world import World

Progress = Callable[[int], None]
VERSION = 1  # of the cached form
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """A network's output for a set: features (N, D), class probabilities (N, classes), spatial statistics.

    `fingerprint` is that of the images' pixels, "" if it was not needed.
    """

    features: Array
    probabilities: Array | None = None
    spatial: Statistics | None = None
    fingerprint: str = ""

    @property
    def count(self) -> int:
        """Number of images N."""
        return len(self.features)


@dataclass(frozen=True)
class Side:
    """The reference as metrics see it: always statistics, and features and probabilities if there are images.

    `given` says that the statistics come from a file and were not measured on these images.
    """

    fit: Statistics
    spatial: Statistics | None
    measured: Measured | None
    given: bool = False

    @cached_property
    def factor(self) -> Array:
        """A factor of the covariance, computed once for everything that is compared with this side."""
        if self.measured is not None and not self.given:
            return feature_factor(self.measured.features, self.fit)
        return covariance_factor(self.fit.covariance)

    @property
    def images(self) -> int:
        """Number of images whose features are known."""
        return 0 if self.measured is None else self.measured.count

    @property
    def fingerprint(self) -> str:
        """Fingerprint of those images; "" where there are none."""
        return "" if self.measured is None else self.measured.fingerprint


def measure(
    images: ImageSet,
    network: Features,
    batch_size: int = 64,
    advance: Progress = lambda count: None,
    use_cache: bool = True,
    world: World | None = None,
) -> Measured:
    """Return the features of every image, from the cache if the same network has seen the same images before.

    A file is read once. Its fingerprint comes from the same pass; only a file that has not changed since it was last
    read is recognized before it is read again. Several processes share the work by whole batches, so that
    every batch is the one that a single process would make.

    Args:
        images: what to look at.
        network: what to look with.
        batch_size: images at once; affects only speed and rounding.
        advance: called with the number of images done since the last call.
        use_cache: False keeps nothing on disk.
        world: processes that share the work; all must call this, and only process 0 gets the result.

    Raises:
        DataError: the network cannot take such images, or returns NaN.
    """
    world = world or World()
    network.accepts(images.shape)
    if not world.main:
        return _help(images, network, batch_size, world)
    # Each of several processes reads only its part, so none of them sees all pixels.
    fingerprint = _known_fingerprint(images, alone=world.size == 1) if use_cache else ""
    found = _unpack(cached(_key(network, fingerprint), "features")) if fingerprint else None
    known = found is not None and found.count == images.count
    if world.any(known, CPU) and found is not None:
        advance(images.count)
        return replace(found, fingerprint=fingerprint)
    result = _together(world.gather_first(_run(images, network, batch_size, advance, world)))
    if use_cache:
        fingerprint = images.fingerprint
        _remember(images)
        keep(_key(network, fingerprint), "features", _pack(result))
    return replace(result, fingerprint=fingerprint)


def _key(network: Features, fingerprint: str) -> str:
    return f"{VERSION}-{network.fingerprint}-{fingerprint}"


def _known_fingerprint(images: ImageSet, alone: bool) -> str:
    """Return the fingerprint if no file must be read for it: of pixels in memory, or of an unchanged file; else ""."""
    if images.stamp is None or images.seen or not alone:
        return images.fingerprint
    kept = cached(_stamp_key(images.stamp), "fingerprints") if images.stamp else None
    return str(kept["fingerprint"]) if kept is not None and "fingerprint" in kept else ""


def _remember(images: ImageSet) -> None:
    """Store the fingerprint under the file's size and times."""
    if images.stamp:
        keep(_stamp_key(images.stamp), "fingerprints", {"fingerprint": np.array(images.fingerprint)})


def _stamp_key(stamp: str) -> str:
    return hashlib.blake2b(stamp.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _help(images: ImageSet, network: Features, batch_size: int, world: World) -> Measured:
    """Compute this process's share for process 0, unless process 0 has found the features in the cache."""
    if not world.any(False, CPU):
        world.gather_first(_run(images, network, batch_size, lambda count: None, world))
    return Measured(np.empty((0, 0)))


@dataclass
class _Share:
    """The results of one process, batch by batch."""

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
    """Concatenate the shares of all processes in the order of the images."""
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
    """Return a reference's side under a network: its own statistics if they fit, and its images' features.

    Process 0 of `world` calls this; meanwhile the others call `measure` for the reference's images.

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


# --- the cache -------------------------------------------------------------------------------------------------------


def cached(key: str, kind: str) -> dict[str, Array] | None:
    """Return the arrays kept under a content key, or None; a damaged file counts as absent."""
    path = cache_dir() / kind / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive.items())
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def keep(key: str, kind: str, arrays: dict[str, Array]) -> None:
    """Keep arrays under a content key. A cache that cannot be written is no reason to lose a result."""
    path = cache_dir() / kind / f"{key}.npz"
    with contextlib.suppress(OSError, UserError), atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
