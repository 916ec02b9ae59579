"""How results of `cmtool eval` are shown: tables, pictures, notes, documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.evaluation.metrics import HEADINGS

if TYPE_CHECKING:
    from cmtool.cli.output import Output
    from cmtool.evaluation.features import Features
    from cmtool.evaluation.verdict import Verdict

BESIDE = 3  # sets that fit side by side


def show_results(rows: Sequence[dict[str, Any]], said: dict[str, Any], network: Features, output: Output) -> None:
    """Draw one table, leaving out figures that no set has: a few sets side by side, many one below another."""
    used = [(key, head) for key, head in HEADINGS.items() if any(row["metrics"].get(key) is not None for row in rows)]
    names = {"fid": network.distance, "kid": "KID" if network.distance == "FID" else f"KD ({network.name})"}
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
    if network.caveat:
        output.say(network.caveat)
    for note in dict.fromkeys(notes):
        output.say(f"note: {note}")


def show_comparisons(verdict: Verdict, output: Output) -> list[dict[str, Any]]:
    """Say for each pair of sets and metric whether they differ; return the same as documents."""
    if verdict.undecided:
        output.say("note: --bootstrap 50 would say whether the sets can be distinguished (minutes).")
    documents = []
    for compared in verdict.comparisons:
        found = compared.result
        ends = f"[{found.low:+.4g}, {found.high:+.4g}]"
        output.result(
            f"{found.metric}: {compared.second} - {compared.first} = {found.difference:+.4g} {ends} (95 %, "
            f"{'paired' if compared.paired else 'unpaired'} bootstrap): "
            f"{'differ' if found.distinguishable else 'not distinguishable'}"
        )
        documents.append(
            {
                "metric": found.metric,
                "first": compared.first,
                "second": compared.second,
                "difference": found.difference,
                "interval": [found.low, found.high],
                "paired": compared.paired,
                "distinguishable": found.distinguishable,
            }
        )
    return documents


def draw_closest(verdict: Verdict, output: Output) -> list[str | None]:
    """Draw for each set its samples that lie closest to training images; return the pictures, None where none is."""
    from cmtool.evaluation.plots import draw_pairs

    real, paths = verdict.judge.reference.images, []
    for one in verdict.sets:
        opened, path = one.opened, None
        if one.found.closest and real is not None and not opened.images.points:
            stem = Path(opened.name.replace(", ", "-").replace(" ", "")).stem
            path = str(draw_pairs(Path("samples") / f"{stem}-closest.png", opened.images, real, one.found.closest))
            output.say(f"closest pairs (sample left, training image right): {path}")
        paths.append(path)
    return paths


def draw_quality(
    rows: Sequence[dict[str, Any]], models: Sequence[str], network: Features, output: Output
) -> str | None:
    """Plot quality against evaluations where one model was judged at several numbers of them; return the picture.

    Args:
        rows: of all sets.
        models: the name of each set's model, for sets of models.
        network: whose distance it is.
        output: told where the picture is.
    """
    from cmtool.evaluation.plots import plot_quality

    known = [row for row in rows if row.get("nfe") and row["metrics"]["fid"] is not None]
    if len(known) < 2 or len(set(models)) != 1 or len({row["nfe"] for row in known}) < 2:
        return None
    ordered = sorted(known, key=lambda row: row["nfe"])
    path = plot_quality(
        Path("samples") / f"{models[0]}-quality.png",
        [row["nfe"] for row in ordered],
        [row["metrics"]["fid"] for row in ordered],
        [row["metrics"]["precision"] for row in ordered],
        network.distance,
    )
    output.say(f"quality against evaluations: {path}")
    return str(path)
