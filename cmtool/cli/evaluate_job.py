"""One run of `cmtool eval`, from arguments that are already checked to tables and files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.checkpoint import atomic_text
from cmtool.cli.evaluate_sets import Judged, Wanted, append_row, open_set, same_seeds
from cmtool.cli.evaluate_view import distance_name, protocol, show_comparisons, show_notes, show_results
from cmtool.errors import DataError, UsageError
from cmtool.evaluation.bootstrap import compare, frechet_statistic, interval, share_statistic
from cmtool.evaluation.features import build_features
from cmtool.evaluation.figures import Figures, compute_figures
from cmtool.evaluation.measure import Measured, measure, measure_reference
from cmtool.evaluation.memorization import copies
from cmtool.evaluation.plots import draw_pairs, plot_quality
from cmtool.evaluation.references import resolve_reference

if TYPE_CHECKING:
    from cmtool.cli.output import Output
    from cmtool.training.distributed import World

# Comparing two sets costs two covariances a resample: done unasked only where that is nothing.
CHEAP_DIM, ROUNDS = 512, 200
PAIRS = 24


class Evaluation:
    """Resolves reference and features, judges every set, shows and keeps what it found."""

    def __init__(
        self,
        ref: str,
        wanted: Sequence[Wanted],
        request: dict[str, Any],
        given: dict[str, Any],
        output: Output,
        world: World,
    ) -> None:
        self.world = world
        self.wanted = wanted
        self.metrics: tuple[str, ...] | None = request["metrics"]
        self.given = given
        self.output = output
        self.batch = given["batch_size"] or 64
        shape = _shape(wanted[0])
        self.reference = resolve_reference(ref, shape, given["mode"], output.say)
        mode = given["mode"] or self.reference.mode
        name = given["features"] or self.reference.features
        self.network = build_features(name, shape, mode, self._device(), output.say)
        _same_size(shape, self.reference)
        if world.main:
            with self._progress(self.reference.images, "reference") as advance:
                self.side = measure_reference(self.reference, self.network, self.batch, advance, world)
        elif self.reference.images is not None:
            measure(self.reference.images, self.network, self.batch, world=world)
        self.plain = None if self.metrics is None else tuple(m for m in self.metrics if m not in _EXTRA)

    def _device(self) -> str:
        from cmtool.training.setup import choose_device

        return str(choose_device(self.given["device"], self.world.local_rank))

    @contextmanager
    def _progress(self, images: Any, what: str) -> Iterator[Any]:
        with self.output.progress(images.count if images is not None else None, f"features of {what}") as update:
            yield update

    def run(self) -> None:
        """Judge every set and show the results; all but the first of several processes only help."""
        rows, notes, sets = [], [], []
        for wanted in self.wanted:
            judged = self._open(wanted)
            if not self.world.main:
                measure(judged.images, self.network, self.batch, world=self.world)
                continue
            row, figures, measured = self._judge(judged)
            rows.append(row)
            notes += figures.notes
            sets.append((judged, figures, measured))
        if self.world.main:
            self._show(rows, notes, sets)

    def _open(self, wanted: Wanted) -> Judged:
        usual, alone = self.reference.count, len(self.wanted) == 1
        judged = open_set(
            wanted, self.given["num"], usual, self.given["seed"], alone, self.given, self.output, self.world
        )
        _same_size(judged.images.shape, self.reference, judged.name)
        return judged

    def _show(
        self, rows: list[dict[str, Any]], notes: list[str], sets: Sequence[tuple[Judged, Figures, Measured]]
    ) -> None:
        said = protocol(self.reference, self.side, self.network, self.metrics)
        show_results(rows, said, self.network, self.output)
        document = {"protocol": said, "results": rows, "comparisons": self._compare(sets)}
        show_notes(notes, self.network, self.output)
        self._plot(rows, document)
        for judged, row in zip((judged for judged, _, _ in sets), rows, strict=True):
            append_row(judged, {"created": _now(), "protocol": said, **row}, self.output)
        self._finish(document)

    def _judge(self, judged: Judged) -> tuple[dict[str, Any], Figures, Measured]:
        with self._progress(judged.images, judged.name) as advance:
            measured = measure(judged.images, self.network, self.batch, advance, world=self.world)
        figures = compute_figures(measured, self.side, self.network, self.plain, judged.images.labels)
        row: dict[str, Any] = {"samples": judged.name, "count": judged.images.count, **judged.about}
        row["fingerprint"] = judged.images.fingerprint
        row["metrics"] = figures.values
        if figures.per_class:
            row["per_class"] = figures.per_class
        if self.given["bootstrap"]:
            row["intervals"] = self._intervals(figures, measured)
        if self.metrics and "memorization" in self.metrics:
            self._memorization(judged, measured, row)
        if self.metrics and "consistency" in self.metrics:
            self._consistency(judged, row)
        row["notes"] = [*judged.images.notes, *figures.notes]
        return row, figures, measured

    def _intervals(self, figures: Figures, measured: Measured) -> dict[str, list[float]]:
        rounds, count, found = self.given["bootstrap"], len(measured.features), {}
        if figures.values["fid"] is not None:
            distance = frechet_statistic(measured.features, self.side.fit, self.side.factor)
            found["fid"] = interval(distance, count, rounds, possible=(0, math.inf))
        if figures.manifold is not None and figures.values["precision"] is not None:
            found["precision"] = interval(share_statistic(figures.manifold.inside), count, rounds, possible=(0, 1))
        return {name: [ends.low, ends.high] for name, ends in found.items()}

    def _compare(self, sets: Sequence[tuple[Judged, Figures, Measured]]) -> list[dict[str, Any]]:
        rounds = self.given["bootstrap"]
        if rounds is None:
            rounds = ROUNDS if self.side.fit.dim <= CHEAP_DIM else 0
        if len(sets) < 2:
            return []
        if not rounds:
            self.output.say("note: --bootstrap 50 would say whether the sets can be distinguished (minutes).")
            return []
        documents: list[dict[str, Any]] = []
        for second in sets[1:]:
            paired = same_seeds(sets[0][0], second[0])
            found = [
                (sets[0][0].name, second[0].name, compare(metric, a, b, _counts(sets[0], second), paired, rounds))
                for metric, a, b in self._statistics(sets[0], second)
            ]
            documents += show_comparisons(found, paired, self.output)
        return documents

    def _statistics(self, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
        if first[1].values["fid"] is not None:
            sides = [
                frechet_statistic(measured.features, self.side.fit, self.side.factor)
                for _, _, measured in (first, second)
            ]
            yield distance_name(self.network), sides[0], sides[1]
        if first[1].manifold is not None and first[1].values["precision"] is not None:
            inside = [share_statistic(figures.manifold.inside) for _, figures, _ in (first, second)]
            yield "precision", inside[0], inside[1]

    def _memorization(self, judged: Judged, measured: Measured, row: dict[str, Any]) -> None:
        real, images = self.side.measured, self.reference.images
        if real is None or images is None:
            raise DataError(
                "memorization is judged against training images, and the reference holds statistics only.",
                "name the training images with --ref",
            )
        by_features = copies(measured.features, real.features)
        flat = [side.all().reshape(side.count, -1) for side in (judged.images, images)]
        by_pixels = copies(flat[0].astype("float32"), flat[1].astype("float32"))
        row["metrics"] |= {
            "copies_features": by_features.share,
            "copies_expected": by_features.expected,
            "copies_pixels": by_pixels.share,
            "copies_pixels_expected": by_pixels.expected,
            "nearest_ratio": by_features.ratio,
        }
        if not judged.images.points:
            path = Path("samples") / f"{Path(judged.name.replace(', ', '-').replace(' ', '')).stem}-closest.png"
            row["closest"] = str(draw_pairs(path, judged.images, images, by_features.closest(PAIRS)))
            self.output.say(f"closest pairs (sample left, training image right): {path}")

    def _consistency(self, judged: Judged, row: dict[str, Any]) -> None:
        from cmtool.cli.find_model import find_model
        from cmtool.cli.run_model import load_model
        from cmtool.config.judgments import same_data
        from cmtool.evaluation.consistency import measure_consistency

        found = judged.wanted.found
        if found is None or found.header.get("kind") != "consistency":
            raise UsageError(
                "--metrics consistency asks a consistency model, not samples.", "name a model with --model"
            )
        data = found.header["data"]
        teacher = find_model(
            self.given["teacher"],
            kinds=("diffusion",),
            fits=lambda header: same_data(header["data"], data),
            wanted="teacher",
            option="--teacher",
        )
        self.output.say(teacher.describe())
        models = [load_model(one, self.given["device"], self.given["precision"]) for one in (found, teacher)]
        row["metrics"] |= measure_consistency(models[0], models[1], min(256, self.given["num"] or 256)).figures()

    def _plot(self, rows: Sequence[dict[str, Any]], document: dict[str, Any]) -> None:
        known = [row for row in rows if row.get("nfe") and row["metrics"]["fid"] is not None]
        models = {str(wanted.found.path) for wanted in self.wanted if wanted.found is not None}
        if len(known) < 2 or len(models) != 1 or len({row["nfe"] for row in known}) < 2:
            return
        assert self.wanted[0].found is not None
        ordered = sorted(known, key=lambda row: row["nfe"])
        path = plot_quality(
            Path("samples") / f"{self.wanted[0].found.name}-quality.png",
            [row["nfe"] for row in ordered],
            [row["metrics"]["fid"] for row in ordered],
            [row["metrics"]["precision"] for row in ordered],
            distance_name(self.network),
        )
        document["plot"] = str(path)
        self.output.say(f"quality against evaluations: {path}")

    def _finish(self, document: dict[str, Any]) -> None:
        out = self.given["out"]
        if out is not None:
            atomic_text(out, json.dumps(document, indent=2, default=str) + "\n")
            self.output.result(str(out))
        self.output.json(document)


_EXTRA = ("memorization", "consistency")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _counts(first: Any, second: Any) -> tuple[int, int]:
    return first[0].images.count, second[0].images.count


def _shape(wanted: Wanted) -> tuple[int, int, int]:
    """(H, W, C) of a set, from its file or its model's header."""
    if wanted.path is not None:
        return wanted.images.shape
    assert wanted.found is not None
    data = wanted.found.header["data"]
    side = data["resolution"]
    return (data["channels"], 1, 1) if data.get("float_samples") else (side, side, data["channels"])


def _same_size(shape: tuple[int, int, int], reference: Any, name: str = "the samples") -> None:
    if reference.images is None or reference.images.shape == shape:
        return
    said = [f"{s[1]} x {s[0]} with {s[2]} channel{'s' if s[2] > 1 else ''}" for s in (shape, reference.images.shape)]
    raise DataError(
        f"{name}: images of {said[0]} against a reference of {said[1]}.",
        "compare images of one size, or make a reference of that size: cmtool eval --make-ref REF.npz --data SRC",
    )
