"""What a study leaves on disk: tables, a JSON document, and plots drawn without any of matplotlib's global state."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmtool.errors import UserError
from cmtool.files.atomic import atomic_bytes
from cmtool.theory.study import Curve, Panel, Study, document, fits_table, slug, table_csv

# Okabe and Ito's colors, which every kind of color vision can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKS = "osD^vPX*"
SETTINGS: Any = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "svg.hashsalt": "cmtool",
    "svg.fonttype": "path",
}


def render(study: Study, kind: str) -> bytes:
    """All panels of a study side by side (two to a row) as "png" (150 dpi) or "svg", the same bytes every time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(study.panels))
    rows = -(-len(study.panels) // columns)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.4 * columns, 3.9 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, study.panels, strict=False):
            _draw(ax, panel)
        for ax in axes[len(study.panels) :]:
            ax.set_visible(False)
        data = io.BytesIO()
        metadata = {"Date": None, "Creator": "cmtool"} if kind == "svg" else {"Software": "cmtool"}
        figure.savefig(data, format=kind, dpi=150, metadata=metadata)
    return data.getvalue()


def _draw(ax: Any, panel: Panel) -> None:
    measured = 0
    for curve in panel.curves:
        measured += _line(ax, curve, measured)
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log_x:
        ax.set_xscale("log")
        _name_ticks(ax.xaxis, [x for curve in panel.curves for x in curve.x])
    if panel.log_y:
        ax.set_yscale("log")
    if len(panel.curves) > 1:
        ax.legend(loc="best")


def _line(ax: Any, curve: Curve, measured: int) -> int:
    """Draw a curve; measured ones take the next color and mark, references stay gray."""
    if curve.kind == "measured":
        color, mark = COLORS[measured % len(COLORS)], MARKS[measured % len(MARKS)]
        mark = mark if len(curve.x) <= 30 else ""
        ax.plot(curve.x, curve.y, color=color, marker=mark, markersize=4, linewidth=1.5, label=curve.label)
        return 1
    style = "--" if curve.kind == "law" else ":"
    ax.plot(curve.x, curve.y, color="#666666", linestyle=style, linewidth=1.3, label=curve.label)
    return 0


def _name_ticks(axis: Any, places: Sequence[float]) -> None:
    """Write the measured places (T = 16, 32, ...) below a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import NullFormatter, NullLocator

    ticks = sorted(set(places))
    if 2 <= len(ticks) <= 9 and all(float(tick).is_integer() for tick in ticks):
        axis.set_major_locator(_fixed(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _fixed(ticks: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(ticks)


def write(study: Study, folder: Path) -> list[Path]:
    """Write NAME.csv (and one CSV per further table), NAME.json, NAME.png and NAME.svg; return their paths.

    Raises:
        UserError: when `folder` cannot be a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}", "choose another --out") from None
    files = {folder / f"{study.name}.csv": table_csv(study.tables[0]).encode()}
    for table in [*study.tables[1:], *([fits_table(study.fits)] if study.fits else [])]:
        files[folder / f"{study.name}-{slug(table.title)}.csv"] = table_csv(table).encode()
    files[folder / f"{study.name}.json"] = (json.dumps(document(study), indent=2, ensure_ascii=False) + "\n").encode()
    if study.panels:
        files[folder / f"{study.name}.png"] = render(study, "png")
        files[folder / f"{study.name}.svg"] = render(study, "svg")
    for path, data in files.items():
        atomic_bytes(path, data)
    return list(files)
