"""Every metric is one row: its name, the figures it gives and their headings, what it needs, and how it is computed.

Importing this file costs nothing, so that the command line can check names: a metric imports what computes it when it
is computed. To add a metric, add a row to `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cmtool.config.classes import class_places
from cmtool.errors import DataError, UsageError, UserError, unknown

if TYPE_CHECKING:
    from cmtool.evaluation.features import Features
    from cmtool.evaluation.manifold import Manifold
    from cmtool.evaluation.measure import Measured, Side
    from cmtool.evaluation.samples import ImageSet

RECOMMENDED = 10_000
K, K_DENSITY = 3, 5
# The networks of FD-DINOv2 and of CMMD: CLIP with the activation it was trained with, which timm's plain name lacks.
DINOV2 = "timm:vit_large_patch14_dinov2.lvd142m"
CLIP = "timm:vit_large_patch14_clip_quickgelu_336.openai"


@dataclass(frozen=True, kw_only=True)
class Against:
    """What samples are compared with.

    `side` are the reference's features under `network`, `real` its pixels where they are known, `training` the features
    of as many training images where the reference was held out of them.
    """

    side: Side
    network: Features
    real: ImageSet | None = None
    training: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Case(Against):
    """One set of samples and everything that metrics compare it with.

    `samples` are its features, `images` its pixels, and `trajectories` measures the model's consistency along a
    teacher's. `strict`: the metrics were requested by name, so that one that cannot be computed is refused instead of
    left out.
    """

    samples: Measured
    images: ImageSet
    trajectories: Callable[[], dict[str, float]] | None = None
    strict: bool = False

    @property
    def real_features(self) -> Measured:
        """The reference's features, of metrics that need its images."""
        assert self.side.measured is not None
        return self.side.measured


@dataclass
class Metrics:
    """What is known of one set of samples.

    `values` are figures by key (None: does not apply), `notes` are shown with them, `per_class` is the class agreement
    of each label, `manifold` which samples lie inside the reference, `closest` pairs (sample, training image), and
    `measured` the features that all of it came from.
    """

    values: dict[str, float | None]
    notes: list[str] = field(default_factory=list)
    per_class: dict[str, float] = field(default_factory=dict)
    manifold: Manifold | None = None
    closest: list[tuple[int, int]] = field(default_factory=list)
    measured: Measured | None = None

    @property
    def known(self) -> dict[str, float]:
        """The figures that apply, by key."""
        return {key: value for key, value in self.values.items() if value is not None}


Lack = Callable[[Case], UserError | None]
LackOfReference = Callable[[Against], UserError | None]


@dataclass(frozen=True)
class Metric:
    """A row: `figures` maps each key of the result to its heading in a table ("": not shown).

    `asks` of the reference and `needs` of the case are called in turn; each returns why the metric cannot be
    computed, or None. A metric that is not `usual` is computed only when it is requested by name. `network` names the
    features that it is defined with; None: any.
    """

    name: str
    figures: dict[str, str]
    compute: Callable[[Case, Metrics], None]
    needs: tuple[Lack, ...] = ()
    asks: tuple[LackOfReference, ...] = ()
    usual: bool = True
    network: str | None = None


# --- what metrics need -----------------------------------------------------------------------------------------------


def _reference_images(against: Against) -> UserError | None:
    if against.side.measured is not None:
        return None
    return DataError(
        "precision, recall, density, coverage and KID need images, and the reference holds statistics only.",
        "ask for --metrics fid, or make a reference with images: cmtool eval --make-ref REF.npz --data SRC",
    )


def _spatial_features(case: Case) -> UserError | None:
    if case.samples.spatial is not None and case.side.spatial is not None:
        return None
    side = "these features have no" if case.samples.spatial is None else "the reference holds no"
    return DataError(f"sfid compares spatial features, and {side} spatial part.")


def _probabilities(case: Case) -> UserError | None:
    if case.samples.probabilities is not None:
        return None
    return DataError(f"the Inception Score needs class probabilities, which {case.network.name} does not give.")


def _training_images(against: Against) -> UserError | None:
    if against.side.measured is not None and against.real is not None:
        return None
    return DataError(
        "memorization is judged against training images, and the reference holds statistics only.",
        "name the training images with --ref",
    )


def _held_out(against: Against) -> UserError | None:
    if against.training is not None:
        return None
    return DataError(
        "copies compares distances to training images and to held-out ones, and the reference was not held out.",
        "name a run with data.holdout as --ref, or ask for --metrics memorization",
    )


def _model(case: Case) -> UserError | None:
    if case.trajectories is not None:
        return None
    return UsageError("--metrics consistency asks a consistency model, not samples.", "name a model with --model")


# --- how they are computed -------------------------------------------------------------------------------------------


def _fid(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.frechet import frechet_to_fit

    found.values["fid"] = frechet_to_fit(case.samples.features, case.side.fit, case.side.factor)


def _fdd(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.frechet import frechet_to_fit

    found.values["fdd"] = frechet_to_fit(case.samples.features, case.side.fit, case.side.factor)


def _cmmd(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.kid import gaussian_mmd

    found.values["cmmd"] = gaussian_mmd(case.samples.features, case.real_features.features)


def _sfid(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.frechet import frechet_distance

    assert case.samples.spatial is not None and case.side.spatial is not None
    found.values["sfid"] = frechet_distance(case.samples.spatial, case.side.spatial)


def _is(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.inception_score import inception_score

    assert case.samples.probabilities is not None
    score = inception_score(case.samples.probabilities)
    found.values |= {"is": score.mean, "is_std": score.std}


def _kid(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.kid import kernel_distance, kid_notes

    samples, real = case.samples.features, case.real_features.features
    kid = kernel_distance(samples, real)
    found.values |= {"kid": kid.mean, "kid_std": kid.std}
    found.notes += kid_notes(kid, len(samples), len(real))


def _manifold(case: Case, found: Metrics) -> Manifold | None:
    """Return the manifold of both sides, found once for the metrics that read it; None where there are too few."""
    from cmtool.evaluation.manifold import manifold

    fake, real = case.samples.features, case.real_features.features
    if not case.strict and min(len(fake), len(real)) <= K_DENSITY:
        note = f"precision and recall need more than {K_DENSITY} images a side."
        found.notes += [note] if note not in found.notes else []
        return None
    found.manifold = found.manifold or manifold(real, fake, K, K_DENSITY)
    return found.manifold


def _precision(case: Case, found: Metrics) -> None:
    if (both := _manifold(case, found)) is not None:
        found.values |= {"precision": both.precision, "recall": both.recall}


def _density(case: Case, found: Metrics) -> None:
    if (both := _manifold(case, found)) is not None:
        found.values |= {"density": both.density, "coverage": both.coverage}


def _classes(case: Case, found: Metrics) -> None:
    import numpy as np

    from cmtool.evaluation.domain import class_agreement

    labels, chances = case.images.labels, case.samples.probabilities
    if labels is None or chances is None or case.network.labels is None:
        return
    names, known = case.images.meta.get("class_names"), case.network.class_names
    if names and known and tuple(names) != known:
        try:
            places = np.array(class_places(names, known, f"the {case.network.name} features"))
        except DataError as error:
            found.notes.append(f"no class agreement: {error.message}")
            return
        agreed = class_agreement(chances, places[labels], case.network.labels)
        found.per_class = {str(label): agreed[str(places[label])] for label in np.unique(labels)}
    else:
        found.per_class = class_agreement(chances, labels, case.network.labels)
    found.values["class_agreement"] = float(np.mean(list(found.per_class.values())))


def _copies(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.memorization import nearer_to_training

    assert case.training is not None
    judged = nearer_to_training(case.samples.features, case.training.features, case.real_features.features)
    found.values |= {"copies": judged.share, "copies_std": judged.error}
    if judged.significant:
        found.notes.append(copying(judged.share, judged.error))


def copying(share: float, error: float) -> str:
    """Say that a model copies: by the share of samples nearer to a training image than to a held-out one."""
    return (
        f"{share:.0%} of the samples lie nearer to a training image than to a held-out one, where chance gives "
        f"50 ± {100 * error:.1f} %: the model copies images that it was trained on."
    )


PAIRS = 24  # closest pairs that are kept


def _memorization(case: Case, found: Metrics) -> None:
    from cmtool.evaluation.memorization import copies

    assert case.real is not None
    by_features = copies(case.samples.features, case.real_features.features)
    flat = [side.all().reshape(side.count, -1).astype("float32") for side in (case.images, case.real)]
    by_pixels = copies(flat[0], flat[1])
    found.values |= {
        "copies_features": by_features.share,
        "copies_expected": by_features.expected,
        "copies_pixels": by_pixels.share,
        "copies_pixels_expected": by_pixels.expected,
        "nearest_ratio": by_features.ratio,
    }
    found.closest = by_features.closest(PAIRS)


def _consistency(case: Case, found: Metrics) -> None:
    assert case.trajectories is not None
    found.values |= case.trajectories()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("fid", {"fid": "FID"}, _fid),
        Metric("sfid", {"sfid": "sFID"}, _sfid, (_spatial_features,)),
        Metric("is", {"is": "IS", "is_std": ""}, _is, (_probabilities,)),
        Metric("kid", {"kid": "KID", "kid_std": ""}, _kid, asks=(_reference_images,)),
        Metric("pr", {"precision": "precision", "recall": "recall"}, _precision, asks=(_reference_images,)),
        Metric("dc", {"density": "density", "coverage": "coverage"}, _density, asks=(_reference_images,)),
        Metric("classes", {"class_agreement": "classes"}, _classes),
        Metric("fdd", {"fdd": "FDD"}, _fdd, usual=False, network=DINOV2),
        Metric("cmmd", {"cmmd": "CMMD"}, _cmmd, asks=(_reference_images,), usual=False, network=CLIP),
        Metric("copies", {"copies": "copies (chance .5)", "copies_std": ""}, _copies, asks=(_held_out,)),
        Metric(
            "memorization",
            {
                "copies_features": "copies",
                "copies_expected": "expected",
                "copies_pixels": "pixel copies",
                "copies_pixels_expected": "",
                "nearest_ratio": "",
            },
            _memorization,
            asks=(_training_images,),
            usual=False,
        ),
        Metric(
            "consistency",
            {
                "consistency": "inconsistency",
                "consistency_neighbor": "",
                "consistency_far": "",
                "consistency_end": "",
                "consistency_shuffled": "",
            },
            _consistency,
            (_model,),
            usual=False,
        ),
    )
}
# The keys that every result has, null where one does not apply.
KEYS = tuple(key for metric in METRICS.values() if metric.usual for key in metric.figures)
HEADINGS = {key: heading for metric in METRICS.values() for key, heading in metric.figures.items() if heading}


def check_metrics(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the requested metrics, None for all that apply; raises `UsageError` for an unknown one."""
    if not names:
        return None
    for name in names:
        if name not in METRICS:
            raise UsageError(unknown("metric", name, METRICS))
    return tuple(dict.fromkeys(names))


def check_against(names: Sequence[str], against: Against) -> None:
    """Refuse a reference that lacks what a metric asks of it, before any sample is made.

    Raises:
        UserError: one sentence.
    """
    for name in names:
        for ask in METRICS[name].asks:
            if (lack := ask(against)) is not None:
                raise lack


def compute_metrics(case: Case, names: Sequence[str] | None = None) -> Metrics:
    """Compute the metrics of one set of samples.

    Args:
        case: the samples and what they are compared with.
        names: some of `METRICS`; None: all usual ones that apply. One that is requested but impossible is refused.

    Raises:
        UserError: different features on the two sides, too few images, or a metric that lacks what it needs.
    """
    found = Metrics(dict.fromkeys(KEYS), measured=case.samples)
    for metric in METRICS.values():
        if not (metric.usual if names is None else metric.name in names):
            continue
        lack = next((why for need in (*metric.asks, *metric.needs) if (why := need(case)) is not None), None)
        if lack is None:
            metric.compute(case, found)
        elif names is not None:
            raise lack
    found.notes += _count_notes(case)
    return found


def _count_notes(case: Case) -> list[str]:
    count, dim = case.samples.features.shape
    if count <= dim:
        return [
            f"{count:,} samples for {dim:,} features: the covariance is singular and the Frechet distance too large; "
            "compare only with figures of the same count."
        ]
    if count < RECOMMENDED:
        return [
            f"{count:,} samples, fewer than {RECOMMENDED:,}: the Frechet distance is biased upward by about c / N, so "
            "compare only with figures of the same count."
        ]
    if 0 < case.side.fit.count < RECOMMENDED:
        return [f"the reference holds {case.side.fit.count:,} images: the Frechet distance keeps an upward bias."]
    return []
