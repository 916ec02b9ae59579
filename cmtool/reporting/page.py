"""One HTML file about runs: style, script and pictures inside it, nothing fetched from anywhere."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from cmtool.reporting import sections
from cmtool.reporting.runs import RunRecord
from cmtool.version import __version__

if TYPE_CHECKING:
    from cmtool.reporting.pictures import Nearest, Picture

# Keeps the page from reaching the network, whatever a run's files hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PARTS = {"overview": "Overview", "curves": "Curves", "progress": "Progress", "steps": "One step and two",
         "nearest": "Nearest training images", "evaluation": "Evaluations", "configuration": "Configuration",
         "environment": "Environment"}  # fmt: skip


@dataclass
class Gallery:
    """The pictures of one run: grids by step, samples in one and two steps, nearest training images."""

    grids: list[tuple[int, Picture]] = field(default_factory=list)
    steps: list[Picture] = field(default_factory=list)
    nearest: Nearest | None = None


def asset(name: str) -> str:
    """Return a file of the page's style or script."""
    return (files("cmtool.reporting") / "assets" / name).read_text(encoding="utf-8")


def render(runs: Sequence[RunRecord], galleries: Sequence[Gallery], now: Callable[[], float] = time.time) -> str:
    """Return the page about `runs`, with one gallery for each.

    Args:
        runs: what to show; several are overlaid.
        galleries: their pictures, in the same order.
        now: returns the time that the page shows.
    """
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now()))
    here = {"made": stamp, "cmtool": __version__, "python": platform.python_version(),
            "system": platform.platform()}  # fmt: skip
    parts = {
        "overview": sections.overview(runs),
        "curves": sections.curves(runs),
        "progress": _progress(runs, galleries),
        "steps": _steps(runs, galleries),
        "nearest": _nearest(runs, galleries),
        "evaluation": sections.evaluation_table(runs),
        "configuration": sections.settings(runs),
        "environment": sections.environment(runs, here),
    }
    links = "".join(f'<a href="#{key}">{PARTS[key]}</a>' for key, body in parts.items() if body)
    title = escape(", ".join(run.name for run in runs))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} - cmtool report</title>\n<style>\n{asset('page.css')}</style></head>\n<body>"
        f'<header><h1>{title}</h1><p class="soft">{escape(_subtitle(runs))}</p><nav>{links}</nav></header>\n'
        f"<main>{chr(10).join(body for body in parts.values() if body)}</main>\n"
        f"<footer>Written by cmtool {__version__}, {stamp}.</footer>\n"
        f"<script>\n{asset('page.js')}</script></body></html>\n"
    )


def _subtitle(runs: Sequence[RunRecord]) -> str:
    config = runs[0].config
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    what = config.recipe.title or config.recipe.method
    return f"{what}, on {config.about.title or config.data.source}"


def _progress(runs: Sequence[RunRecord], galleries: Sequence[Gallery]) -> str:
    sliders = [sections.slider(run.name, gallery.grids) for run, gallery in zip(runs, galleries, strict=True)]
    inner = "".join(sliders)
    note = '<p class="soft">Samples of the moving average, always of the same seeds; move the slider.</p>'
    return sections.section(
        "progress", PARTS["progress"], *([note, f'<div class="samples">{inner}</div>'] if inner else [])
    )


def _steps(runs: Sequence[RunRecord], galleries: Sequence[Gallery]) -> str:
    parts = []
    for run, gallery in zip(runs, galleries, strict=True):
        if gallery.steps:
            inner = "".join(sections.picture(shown) for shown in gallery.steps)
            parts.append(f'<h3>{escape(run.name)}</h3><div class="samples">{inner}</div>')
    return sections.section("steps", PARTS["steps"], *parts)


def _nearest(runs: Sequence[RunRecord], galleries: Sequence[Gallery]) -> str:
    parts = []
    for run, gallery in zip(runs, galleries, strict=True):
        if gallery.nearest is not None:
            words = f"<p>{escape(gallery.nearest.words)}</p>"
            parts.append(f"<h3>{escape(run.name)}</h3>{words}{sections.picture(gallery.nearest.picture)}")
    return sections.section("nearest", PARTS["nearest"], *parts)
