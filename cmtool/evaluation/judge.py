"""One reference and one feature network, ready to judge sets of images one after another.

Every way to judge goes through `Judge`: the command line, Python, the search for sampling times, training, and the
making of references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cmtool.errors import DataError
from cmtool.evaluation import inception_score, kid
from cmtool.evaluation.bootstrap import Comparison, Statistic, compare, frechet_statistic, interval, share_statistic
from cmtool.evaluation.features import Features, build_features
from cmtool.evaluation.measure import Measured, Side, measure, measure_reference
from cmtool.evaluation.metrics import K_DENSITY, METRICS, Against, Case, K, Metrics, check_against, compute_metrics
from cmtool.evaluation.references import Reference, resolve_reference
from cmtool.evaluation.samples import ImageSet
from cmtool.machine.world import World
from cmtool.talk import SILENCE, Talk
from cmtool.version import __version__

Shape = tuple[int, int, int]
ALONE = World()


@dataclass(frozen=True)
class Judge:
    """Judges sets of images: `judge(images)` returns their metrics against the reference.

    Of several processes all must call it, with the same images; only process 0 gets the metrics, and only it has a
    `side`: the reference's features and statistics under the network, and those of `training`, as many of the images
    that the reference was held out of.
    """

    reference: Reference
    network: Features
    side: Side | None
    batch_size: int = 64
    talk: Talk = SILENCE
    world: World = ALONE
    training: Measured | None = None
    device: str = "cpu"
    _beside: dict[str, Judge] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        reference: str | Reference,
        shape: Shape | None = None,
        features: str | None = None,
        mode: str | None = None,
        device: str = "cpu",
        talk: Talk = SILENCE,
        world: World | None = None,
        batch_size: int = 64,
    ) -> Judge:
        """Set up a judge of images of one size.

        Args:
            reference: what to compare with: a name, file, folder or preset, or one that is resolved already.
            shape: (H, W, C) of the images to judge; None: that of the reference.
            features: the feature network; None: the reference's usual one.
            mode: Inception's resizing rule; None: the reference's.
            device: where the network runs, e.g. "cpu" or "cuda:0".
            talk: told about downloads and progress.
            world: processes that share the work.
            batch_size: images at once.

        Raises:
            UserError: unknown names, a reference of other images, or files that are not here and cannot be fetched.
        """
        world = world or ALONE
        if isinstance(reference, str):
            reference = resolve_reference(reference, shape, mode, talk.say)
        if shape is None:
            if reference.images is None:
                raise DataError(f"{reference.name} holds statistics only.", "name images: a folder or an .npz")
            shape = reference.images.shape
        if reference.shape is None and world.main:
            talk.warn(
                f"{reference.name} holds statistics alone and not the size of its images: whether these were "
                f"{shape[1]} x {shape[0]} as well cannot be checked."
            )
        name, rule = features or reference.features, mode or reference.mode
        check_size(shape, reference)
        network = build_features(name, shape, rule, device, talk.say)
        side = None
        if world.main:
            with talk.progress(reference.images.count if reference.images else None, "features of reference") as update:
                side = measure_reference(reference, network, batch_size, update, world)
        elif reference.images is not None:
            measure(reference.images, network, batch_size, world=world)
        training = None
        if reference.training is not None:
            with talk.progress(reference.training.count, "features of training images") as update:
                training = measure(reference.training, network, batch_size, update, world=world)
        return cls(reference, network, side, batch_size, talk, world, training, device)

    def __call__(
        self,
        images: ImageSet,
        metrics: Sequence[str] | None = None,
        trajectories: Callable[[], dict[str, float]] | None = None,
        use_cache: bool = True,
    ) -> Metrics:
        """Return the metrics of a set of images.

        Args:
            images: what to judge; a file among them is read once.
            metrics: some of `cmtool.evaluation.metrics.METRICS`; None: all usual ones that apply.
            trajectories: measures the consistency of the model that made them, where one did.
            use_cache: False keeps no features on disk.

        Raises:
            UserError: images of another size than the reference's, or a metric that lacks what it needs.
        """
        check_size(images.shape, self.reference, images.name)
        elsewhere = [name for name in metrics or () if METRICS[name].network not in (None, self.network.name)]
        names = None if metrics is None else [name for name in metrics if name not in elsewhere]
        found = self._found(images, names, trajectories, use_cache)
        for name in elsewhere:
            other = self.beside(name)(images, (name,), use_cache=use_cache)
            found.values |= {key: other.values[key] for key in METRICS[name].figures if key in other.values}
        return found

    def beside(self, metric: str) -> Judge:
        """Return the judge of the same reference in the features that a metric is defined with, set up once."""
        name = METRICS[metric].network
        if name in (None, self.network.name):
            return self
        if metric not in self._beside:
            plain = replace(self.reference, given=None, given_spatial=None)
            device, shape = self.device, None
            self._beside[metric] = Judge.of(plain, shape, name, None, device, self.talk, self.world, self.batch_size)
        return self._beside[metric]

    def _found(
        self,
        images: ImageSet,
        metrics: Sequence[str] | None,
        trajectories: Callable[[], dict[str, float]] | None,
        use_cache: bool,
    ) -> Metrics:
        """Return the metrics in this judge's own features."""
        with self.talk.progress(images.count, f"features of {images.name}") as update:
            measured = measure(images, self.network, self.batch_size, update, use_cache, self.world)
        if self.side is None:
            return Metrics({})
        case = Case(
            **vars(self._against(self.side)),
            samples=measured,
            images=images,
            trajectories=trajectories,
            strict=metrics is not None,
        )
        return compute_metrics(case, metrics)

    def _against(self, side: Side) -> Against:
        return Against(side=side, network=self.network, real=self.reference.images, training=self.training)

    def check(self, metrics: Sequence[str] | None) -> None:
        """Refuse metrics that cannot be computed whatever the samples, before any is made.

        Raises:
            UserError: the reference lacks what one asks of it, or its features are not here.
        """
        for name in metrics or ():
            judge = self.beside(name)
            if judge.side is not None:
                check_against((name,), judge._against(judge.side))

    def protocol(self, metrics: Sequence[str] | None) -> dict[str, Any]:
        """Return everything that has to be stated with a figure for it to be meaningful."""
        assert self.side is not None
        others = {name: self.beside(name).network for name in metrics or () if self.beside(name) is not self}
        beside = {name: {"features": one.name, **one.extras} for name, one in others.items()}
        return {
            "reference": self.reference.name,
            "reference_source": self.reference.source,
            "reference_fingerprint": self.reference.digest or self.side.fingerprint,
            "reference_count": self.side.fit.count or None,
            "reference_images": self.side.images,
            **({"training_images": self.training.count} if self.training is not None else {}),
            "features": self.network.name,
            "features_fingerprint": self.network.fingerprint,
            **self.network.extras,
            **({"beside": beside} if beside else {}),
            "domain_features": self.network.domain,
            "metrics": list(metrics) if metrics else None,
            "covariance": "unbiased, float64",
            "inception_score_block": inception_score.BLOCK,
            "kid": {"subsets": kid.SUBSETS, "subset_size": kid.SUBSET_SIZE, "seed": kid.SEED},
            "precision_recall_k": K,
            "density_coverage_k": K_DENSITY,
            "cmtool": __version__,
        }

    # --- how sure the metrics are ------------------------------------------------------------------------------------

    def intervals(self, found: Metrics, rounds: int) -> dict[str, list[float]]:
        """Return 95 % intervals [low, high] of the metrics that can be resampled, by key."""
        most = {"fid": math.inf, "precision": 1.0}
        ends = {
            key: interval(statistic, _measured(found).count, rounds, possible=(0, most[key]))
            for key, statistic in self._statistics(found)
        }
        return {key: [found.low, found.high] for key, found in ends.items()}

    def compare(self, first: Metrics, second: Metrics, paired: bool, rounds: int) -> list[Comparison]:
        """Compare two sets in the metrics that can be resampled; `paired`: sample i of both has the same seed."""
        others = dict(self._statistics(second))
        names = {"fid": self.network.distance}
        counts = _measured(first).count, _measured(second).count
        return [
            compare(names.get(key, key), statistic, others[key], counts, paired, rounds)
            for key, statistic in self._statistics(first)
            if key in others
        ]

    def _statistics(self, found: Metrics) -> Iterator[tuple[str, Statistic]]:
        assert self.side is not None
        if found.values["fid"] is not None:
            yield "fid", frechet_statistic(_measured(found).features, self.side.fit, self.side.factor)
        if found.manifold is not None and found.values["precision"] is not None:
            yield "precision", share_statistic(found.manifold.inside)


def _measured(found: Metrics) -> Measured:
    assert found.measured is not None
    return found.measured


def check_size(shape: Shape, reference: Reference, name: str = "the samples") -> None:
    """Refuse images (H, W, C) of another size than the reference's; raises `DataError`."""
    if reference.shape is None or reference.shape == shape:
        return
    said = [f"{s[1]} x {s[0]} with {s[2]} channel{'s' if s[2] > 1 else ''}" for s in (shape, reference.shape)]
    raise DataError(
        f"{name}: images of {said[0]} against a reference of {said[1]}.",
        "compare images of one size, or make a reference of that size: cmtool eval --make-ref REF.npz --data SRC",
    )
