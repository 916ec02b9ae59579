"""From features to the figures of a table: which metrics there are, what each needs, and what to say beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cmtool.errors import DataError
from cmtool.evaluation.features import Features
from cmtool.evaluation.frechet import frechet_distance, frechet_to_fit
from cmtool.evaluation.inception_score import inception_score
from cmtool.evaluation.kid import SUBSET_SIZE, KernelDistance, kernel_distance
from cmtool.evaluation.manifold import Manifold, manifold
from cmtool.evaluation.measure import Measured, Side
from cmtool.evaluation.names import KEYS, METRICS
from cmtool.evaluation.statistics import Array

RECOMMENDED = 10_000
K, K_DENSITY = 3, 5


@dataclass
class Figures:
    """Figures by key (None: does not apply) and notes to print beside them."""

    values: dict[str, float | None]
    notes: list[str] = field(default_factory=list)
    manifold: Manifold | None = None
    per_class: dict[str, float] = field(default_factory=dict)


def compute_figures(
    samples: Measured,
    reference: Side,
    network: Features,
    metrics: Sequence[str] | None = None,
    labels: Array | None = None,
) -> Figures:
    """Compute figures of one sample set against a reference.

    Args:
        samples: features of the samples.
        reference: the side to compare with.
        network: the features' network, for its name and its classes.
        metrics: some of `METRICS`; None: all that apply. One that is asked for and cannot be had is refused.
        labels: (N,) the labels the samples were made for.

    Raises:
        DataError: different features on the two sides, too few images, no images where precision or KID needs them.
    """
    wanted = METRICS if metrics is None else metrics
    figures = Figures(dict.fromkeys(KEYS))
    _distances(figures, samples, reference, wanted, metrics)
    if "is" in wanted:
        _score(figures, samples, network, asked=metrics is not None)
    if reference.measured is not None:
        _neighbors(figures, samples, reference.measured, wanted, asked=metrics is not None)
    elif metrics is not None and {"pr", "dc", "kid"} & set(metrics):
        raise DataError(
            "precision, recall, density, coverage and KID need images, and the reference holds statistics only.",
            "ask for --metrics fid, or make a reference with images: cmtool eval --make-ref REF.npz --data SRC",
        )
    if "classes" in wanted and labels is not None and network.labels is not None and samples.probabilities is not None:
        figures.per_class = class_agreement(samples.probabilities, labels, network.labels)
        figures.values["class_agreement"] = float(np.mean(list(figures.per_class.values())))
    figures.notes += _notes(samples, reference)
    return figures


def _distances(
    figures: Figures, samples: Measured, reference: Side, wanted: Sequence[str], asked: Sequence[str] | None
) -> None:
    if "fid" in wanted:
        figures.values["fid"] = frechet_to_fit(samples.features, reference.fit, reference.factor)
    if "sfid" in wanted and samples.spatial is not None and reference.spatial is not None:
        figures.values["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    elif asked is not None and "sfid" in asked:
        side = "these features have no" if samples.spatial is None else "the reference holds no"
        raise DataError(f"sfid compares spatial features, and {side} spatial part.")


def _score(figures: Figures, samples: Measured, network: Features, asked: bool) -> None:
    if samples.probabilities is None:
        if asked:
            raise DataError(f"the Inception Score needs class probabilities, which {network.name} does not give.")
        return
    score = inception_score(samples.probabilities)
    figures.values |= {"is": score.mean, "is_std": score.std}


def _neighbors(figures: Figures, samples: Measured, real: Measured, wanted: Sequence[str], asked: bool) -> None:
    if "kid" in wanted:
        kid = kernel_distance(samples.features, real.features)
        figures.values |= {"kid": kid.mean, "kid_std": kid.std}
        figures.notes += kid_notes(kid, len(samples.features), len(real.features))
    if not {"pr", "dc"} & set(wanted):
        return
    if not asked and min(len(samples.features), len(real.features)) <= K_DENSITY:
        figures.notes.append(f"precision and recall need more than {K_DENSITY} images a side.")
        return
    figures.manifold = manifold(real.features, samples.features, K, K_DENSITY)
    chosen = [name for group, names in _GROUPS.items() if group in wanted for name in names]
    figures.values |= {name: value for name, value in figures.manifold.figures().items() if name in chosen}


def kid_notes(kid: KernelDistance, samples: int, reference: int) -> list[str]:
    """Say what the spread over subsets stands for, where it is less than the error of the kernel distance."""
    smaller = min(samples, reference)
    if kid.mean == 0 and kid.std is None and samples == reference:
        return ["samples and reference have the same features: the kernel distance is 0 and no estimate."]
    if kid.std is None:
        return [
            f"every subset of the kernel distance holds all {smaller:,} images of a side, so it stands without an "
            f"error; more than {SUBSET_SIZE:,} images on both sides give one."
        ]
    if smaller < 2 * kid.subset:
        return [
            f"the subsets of the kernel distance share most of {smaller:,} images: the spread beside it is less than "
            "its error."
        ]
    return []


_GROUPS = {"pr": ("precision", "recall"), "dc": ("density", "coverage")}


def class_agreement(probabilities: Array, labels: Array, class_labels: Sequence[int]) -> dict[str, float]:
    """Share of samples, for each label, that the network recognizes as what they were made for.

    Args:
        probabilities: (N, classes) of the network.
        labels: (N,) labels that the samples were made for.
        class_labels: the label that each of the network's classes belongs to.
    """
    groups = np.asarray(class_labels)
    by_label = np.stack([probabilities[:, groups == label].sum(axis=1) for label in range(groups.max() + 1)], axis=1)
    right = by_label.argmax(axis=1) == labels
    return {str(label): float(right[labels == label].mean()) for label in np.unique(labels)}


def _notes(samples: Measured, reference: Side) -> list[str]:
    count, dim = samples.features.shape
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
    if 0 < reference.fit.count < RECOMMENDED:
        return [f"the reference holds {reference.fit.count:,} images: the Frechet distance keeps an upward bias."]
    return []
