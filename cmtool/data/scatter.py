"""Scatter pictures of two-dimensional samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cmtool.data.images import png_info
from cmtool.files.atomic import atomic_write


def save_scatter(
    points: Tensor,
    path: str | Path,
    labels: Tensor | None = None,
    reference: Tensor | None = None,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Draw 2-D samples (B, 2, 1, 1) or (B, 2) as a scatter picture, over `reference` points in gray when given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if reference is not None:
        ground = reference.detach().cpu().reshape(len(reference), 2).numpy()
        axes.scatter(ground[:, 0], ground[:, 1], s=3, c="0.8", linewidths=0)
    data = points.detach().cpu().reshape(len(points), 2).float().numpy()
    colors = "tab:blue" if labels is None else labels.cpu().numpy()
    axes.scatter(data[:, 0], data[:, 1], s=4, c=colors, cmap=None if labels is None else "tab10", linewidths=0)
    axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    target = Path(path)
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"pnginfo": png_info(text)} if text else None)
    return target
