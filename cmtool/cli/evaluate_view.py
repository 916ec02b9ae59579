"""How results of `cmtool eval` and `cmtool search-times` are shown: tables, documents, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmtool.cli.output import Output
    from cmtool.evaluation.bootstrap import Comparison
    from cmtool.evaluation.features import Features
    from cmtool.evaluation.measure import Side
    from cmtool.evaluation.references import Reference

BESIDE = 3  # sets that fit side by side
COLUMNS = (
    ("fid", "FID"),
    ("sfid", "sFID"),
    ("is", "IS"),
    ("kid", "KID"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
    ("class_agreement", "classes"),
    ("copies_features", "copies"),
    ("copies_expected", "expected"),
    ("copies_pixels", "pixel copies"),
    ("consistency", "inconsistency"),
)


def protocol(reference: Reference, side: Side, network: Features, metrics: Sequence[str] | None) -> dict[str, Any]:
    """Return everything that has to be said beside a figure for it to mean something."""
    from cmtool.evaluation.figures import K_DENSITY, K
    from cmtool.evaluation.inception_score import BLOCK
    from cmtool.evaluation.kid import SEED, SUBSET_SIZE, SUBSETS
    from cmtool.version import __version__

    return {
        "reference": reference.name,
        "reference_source": reference.source,
        "reference_fingerprint": reference.fingerprint,
        "reference_count": side.fit.count or None,
        "reference_images": side.images,
        "features": network.name,
        "features_fingerprint": network.fingerprint,
        **network.extras,
        "domain_features": network.domain,
        "metrics": list(metrics) if metrics else None,
        "covariance": "unbiased, float64",
        "inception_score_block": BLOCK,
        "kid": {"subsets": SUBSETS, "subset_size": SUBSET_SIZE, "seed": SEED},
        "precision_recall_k": K,
        "density_coverage_k": K_DENSITY,
        "cmtool": __version__,
    }


def distance_name(network: Features) -> str:
    """What the Frechet distance is called: FID for Inception alone, else with the features' name."""
    return "FID" if network.name.startswith("inception") else f"FD ({network.name})"


def show_results(rows: Sequence[dict[str, Any]], said: dict[str, Any], network: Features, output: Output) -> None:
    """Draw one table, leaving out figures that no set has: a few sets side by side, many one below another."""
    used = [(key, head) for key, head in COLUMNS if any(row["metrics"].get(key) is not None for row in rows)]
    names = {"fid": distance_name(network), "kid": "KID" if not network.domain else f"KD ({network.name})"}
    heads = [names.get(key, head) for key, head in used]
    images = said["reference_count"] or said["reference_images"]
    count = f" ({images:,} images)" if images else ""
    title = f"Against {said['reference']}{count} {said['reference_fingerprint'][:12]}, features {network.name}"
    facts = ("nfe", "times", "count", "seeds")
    if len(rows) <= BESIDE:
        lines = [[key if key != "nfe" else "NFE", *(_fact(row, key) for row in rows)] for key in facts]
        lines += [[head, *(_cell(row, key) for row in rows)] for (key, _), head in zip(used, heads, strict=True)]
        return output.table(title, ["", *(row["samples"] for row in rows)], [line for line in lines if any(line[1:])])
    cells = [[row["samples"], row.get("nfe"), row["count"], *(_cell(row, key) for key, _ in used)] for row in rows]
    return output.table(title, ["samples", "NFE", "images", *heads], cells)


def _fact(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if key == "times" and value:
        return ", ".join(f"{level:.4g}" for level in value[:6]) + (" ..." if len(value) > 6 else "")
    return None if value is None else str(value)


def _cell(row: dict[str, Any], key: str) -> str | None:
    value = row["metrics"].get(key)
    ends = row.get("intervals", {}).get(key)
    spread = row["metrics"].get(f"{key}_std")
    if value is None:
        return None
    if ends:
        return f"{value:.4g} [{ends[0]:.4g}, {ends[1]:.4g}]"
    return f"{value:.4g} ± {spread:.2g}" if spread else f"{value:.4g}"


def show_notes(notes: Sequence[str], network: Features, output: Output) -> None:
    """Say once what every figure has to be read with."""
    if network.domain:
        output.say(
            f"{network.name} features are a small network trained on {network.name} by this project: its distances are "
            "no FID, and mean something only beside others of the same network."
        )
    for note in dict.fromkeys(notes):
        output.say(f"note: {note}")


def show_comparisons(
    found: Sequence[tuple[str, str, Comparison]], paired: bool, output: Output
) -> list[dict[str, Any]]:
    """Say for each pair of sets and figure whether they differ; return the same as documents."""
    documents = []
    for first, second, comparison in found:
        verdict = "differ" if comparison.distinguishable else "not distinguishable"
        ends = f"[{comparison.low:+.4g}, {comparison.high:+.4g}]"
        output.result(
            f"{comparison.metric}: {second} - {first} = {comparison.difference:+.4g} {ends} (95 %, "
            f"{'paired' if paired else 'unpaired'} bootstrap): {verdict}"
        )
        documents.append(
            {
                "metric": comparison.metric,
                "first": first,
                "second": second,
                "difference": comparison.difference,
                "interval": [comparison.low, comparison.high],
                "paired": paired,
                "distinguishable": comparison.distinguishable,
            }
        )
    return documents
