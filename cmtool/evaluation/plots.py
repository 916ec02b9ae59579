"""Plots of metrics: quality against evaluations, distance against time, the closest pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmtool.data import save_grid
from cmtool.evaluation.samples import ImageSet
from cmtool.evaluation.statistics import Array
from cmtool.files.atomic import atomic_write

WIDEST_PAIRS = 4  # pairs in a row of the picture of closest pairs


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _write(figure: Any, path: Path) -> Path:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
    return path


def plot_quality(
    path: Path, evaluations: Sequence[int], distance: Sequence[float], precision: Sequence[float | None], name: str
) -> Path:
    """Plot a distance (and precision, if known) against evaluations per image; `path` ends in .png, .svg or .pdf."""
    figure, axes = _figure()
    axes.plot(evaluations, distance, "o-")
    axes.set(xlabel="evaluations an image", xscale="log")
    axes.set_ylabel(name, color="tab:blue")
    axes.set_xticks(list(evaluations), [str(count) for count in evaluations])
    axes.set_ylim(bottom=0)
    if all(value is not None for value in precision):
        right = axes.twinx()
        right.plot(evaluations, precision, "s--", color="tab:orange")
        right.set_ylabel("precision", color="tab:orange")
        right.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    return _write(figure, path)


def plot_search(
    path: Path, trace: Sequence[tuple[tuple[float, ...], float]], best: tuple[float, ...], name: str
) -> Path:
    """Plot the distance of every candidate of a search against its last time, one line per number of times."""
    figure, axes = _figure()
    for count in sorted({len(times) for times, _ in trace if len(times) > 1}):
        points = sorted((times[-1], value) for times, value in trace if len(times) == count)
        axes.plot([t for t, _ in points], [value for _, value in points], "o-", label=f"{count} evaluations")
    for level in best[1:]:
        axes.axvline(level, color="0.6", linestyle=":")
    axes.set(xlabel="last noise level t", ylabel=name, xscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    return _write(figure, path)


def draw_pairs(path: Path, samples: ImageSet, real: ImageSet, pairs: Sequence[tuple[int, int]]) -> Path:
    """Draw pairs (sample left, training image right), the closest first."""
    left, right = pick(samples, [a for a, _ in pairs]), pick(real, [b for _, b in pairs])
    both = np.stack([left, right], axis=1).reshape(-1, *left.shape[1:])
    return save_grid(both, path, columns=2 * WIDEST_PAIRS)


def pick(images: ImageSet, rows: Sequence[int]) -> Array:
    """Return some images of a set in the given order, reading the set once."""
    found: dict[int, Array] = {}
    start = 0
    for batch in images.batches(256):
        for row in rows:
            if start <= row < start + len(batch):
                found[row] = batch[row - start]
        start += len(batch)
    return np.stack([found[row] for row in rows])
