"""One HTML file about runs: style, script and pictures inside it, nothing fetched from anywhere."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cmtool.config.load import to_toml
from cmtool.reporting.charts import Series, line_chart, number
from cmtool.reporting.runs import RunRecord, differences
from cmtool.units import human_time
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
        "overview": overview(runs),
        "curves": curves(runs),
        "progress": _progress(runs, galleries),
        "steps": _steps(runs, galleries),
        "nearest": _nearest(runs, galleries),
        "evaluation": evaluation_table(runs),
        "configuration": settings(runs),
        "environment": environment(runs, here),
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
    sliders = [slider(run.name, gallery.grids) for run, gallery in zip(runs, galleries, strict=True)]
    inner = "".join(sliders)
    note = '<p class="soft">Samples of the moving average, always of the same seeds; move the slider.</p>'
    return section("progress", PARTS["progress"], *([note, f'<div class="samples">{inner}</div>'] if inner else []))


def _steps(runs: Sequence[RunRecord], galleries: Sequence[Gallery]) -> str:
    parts = []
    for run, gallery in zip(runs, galleries, strict=True):
        if gallery.steps:
            inner = "".join(picture(shown) for shown in gallery.steps)
            parts.append(f'<h3>{escape(run.name)}</h3><div class="samples">{inner}</div>')
    return section("steps", PARTS["steps"], *parts)


def _nearest(runs: Sequence[RunRecord], galleries: Sequence[Gallery]) -> str:
    parts = []
    for run, gallery in zip(runs, galleries, strict=True):
        if gallery.nearest is not None:
            words = f"<p>{escape(gallery.nearest.words)}</p>"
            parts.append(f"<h3>{escape(run.name)}</h3>{words}{picture(gallery.nearest.picture)}")
    return section("nearest", PARTS["nearest"], *parts)


Column = tuple[str, Callable[[RunRecord], Any]]


def section(anchor: str, title: str, *parts: str) -> str:
    """Return a section with its heading; nothing when all parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{body}</section>' if body else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """Return a table that scrolls by itself on a narrow page; numbers are right-aligned, None is a dash.

    Args:
        heads: the column headings.
        rows: cells of any kind.
        kind: class of the style sheet.
    """
    if not rows:
        return ""
    sides = [' class="n"' if any(_is_number(row[index]) for row in rows) else "" for index in range(len(heads))]
    head = "".join(f'<th scope="col"{side}>{escape(text)}</th>' for text, side in zip(heads, sides, strict=True))
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    named = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{named}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if _is_number(value):
        return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f'<td class="n">{value:.4g}</td>'
    return "<td>-</td>" if value is None or value == "" else f"<td>{escape(_word(value))}</td>"


def picture(shown: Picture) -> str:
    """Return a picture with its caption."""
    alt = escape(shown.caption or "samples", quote=True)
    image = f'<img src="{shown.uri}" width="{shown.width}" height="{shown.height}" alt="{alt}">'
    caption = f"<figcaption>{escape(shown.caption)}</figcaption>" if shown.caption else ""
    return f'<figure class="picture">{image}{caption}</figure>'


# --- overview ---


def overview(runs: Sequence[RunRecord]) -> str:
    """Return a table of the runs and their results, and of what differs between the first run and the others."""
    columns: list[Column] = [
        ("run", lambda run: run.name),
        ("preset", lambda run: run.config.preset),
        ("recipe", lambda run: run.config.recipe_name),
        ("steps", lambda run: run.step),
        ("of", lambda run: run.config.train.steps),
        ("batch", lambda run: run.config.train.batch_size),
        ("time in steps", lambda run: human_time(run.seconds) if run.seconds else None),
        ("last loss", lambda run: run.loss),
        ("FD", lambda run: run.figures().get("fid")),
        ("precision", lambda run: run.figures().get("precision")),
        ("recall", lambda run: run.figures().get("recall")),
        ("copies (chance .5)", lambda run: run.figures().get("copies")),
    ]
    rows = [[read(run) for _, read in columns] for run in runs]
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    shown = table([columns[i][0] for i in used], [[row[i] for i in used] for row in rows])
    others = [_difference(runs[0], other) for other in runs[1:]]
    return section("overview", "Overview", shown, *others)


def _difference(first: RunRecord, other: RunRecord) -> str:
    rows = [[what, str(a), str(b)] for what, a, b in differences(first, other)]
    title = f"What differs between {first.name} and {other.name}"
    return f"<details><summary>{escape(title)}</summary>{table(['', first.name, other.name], rows)}</details>"


# --- curves ---


def _points(run: RunRecord, key: str) -> tuple[tuple[float, Any], ...]:
    return tuple((row["step"], row.get(key)) for row in run.rows)


def _overlaid(runs: Sequence[RunRecord], key: str) -> list[Series]:
    return [Series(run.name, _points(run, key), index) for index, run in enumerate(runs)]


def curves(runs: Sequence[RunRecord]) -> str:
    """Return the curves of all runs, overlaid; the distance for each band of noise levels has a chart for each run."""
    charts = [
        line_chart("Loss", _overlaid(runs, "loss"), y="weighted", log=True),
        *(_bands(run, len(runs) > 1) for run in runs),
        line_chart("Grid points N", _grid(runs), y="N"),
        _target(runs),
        line_chart("Learning rate", _overlaid(runs, "lr"), y="lr", from_zero=True),
        line_chart("Gradient norm", _overlaid(runs, "grad_norm"), y="norm", log=True),
        line_chart("Speed", _overlaid(runs, "images_per_s"), y="images a second", from_zero=True),
        *(_quality(runs, key, title) for key, title in JUDGED.items()),
    ]
    inner = "\n".join(chart for chart in charts if chart)
    note = '<p class="soft">A loss says how well neighbors agree, not how good samples are: look at these too.</p>'
    return section("curves", "Curves", f'<div class="charts">{inner}</div>' if inner else "", note if inner else "")


def _grid(runs: Sequence[RunRecord]) -> list[Series]:
    """Return N of the runs that train on a grid; a teacher's noise levels do not come from a grid."""
    lines = zip(runs, _overlaid(runs, "num_scales"), strict=True)
    return [line for run, line in lines if run.config.family != "edm"]


JUDGED = {"fid": "Frechet distance while training", "precision": "Precision", "recall": "Recall",
          "copies": "Copies: nearer to training than to held-out images (chance .5)"}  # fmt: skip


def _bands(run: RunRecord, several: bool) -> str:
    names = list(dict.fromkeys(name for row in run.rows for name in row.get("bands") or {}))
    order = sorted(names, key=lambda name: (float(name.lstrip("<>=")), name.startswith(">")))
    series = [
        Series(f"t {name}", tuple((row["step"], (row.get("bands") or {}).get(name)) for row in run.rows), index)
        for index, name in enumerate(order)
    ]
    title = "Distance per noise level" + (f", {run.name}" if several else "")
    return line_chart(title, series, y="distance", log=True)


def _target(runs: Sequence[RunRecord]) -> str:
    if not any(row.get("target_ema") for run in runs for row in run.rows):
        return ""
    return line_chart("Decay mu of the target", _overlaid(runs, "target_ema"), y="mu")


def _quality(runs: Sequence[RunRecord], key: str, title: str) -> str:
    series = [
        Series(run.name, tuple((row["step"], row["eval"].get(key)) for row in run.judged), index)
        for index, run in enumerate(runs)
    ]
    return line_chart(title, series, y="FD" if key == "fid" else key, from_zero=True)


# --- samples ---


def slider(name: str, frames: Sequence[tuple[int, Picture]]) -> str:
    """Return the sample grids of one run behind a slider, set to the last; nothing without a grid."""
    if not frames:
        return ""
    last, shown = frames[-1]
    # No "<" can end the script early: data URIs contain none, and steps are numbers.
    data = json.dumps([{"step": f"{step:,}", "uri": frame.uri} for step, frame in frames])
    label = escape(f"step of {name}", quote=True)
    control = (
        f'<input type="range" min="0" max="{len(frames) - 1}" value="{len(frames) - 1}" aria-label="{label}">'
        if len(frames) > 1
        else ""
    )
    return (
        f'<div class="slider"><h3>{escape(name)}</h3><output>step {last:,}</output>{control}'
        f'<figure class="picture"><img src="{shown.uri}" width="{shown.width}" height="{shown.height}" '
        f'alt="samples at step {last:,}"></figure><script type="application/json">{data}</script></div>'
    )


# --- figures ---

HEADS = {"fid": "FD", "sfid": "sFD", "is": "IS", "kid": "KD", "precision": "precision", "recall": "recall",
         "density": "density", "coverage": "coverage", "copies": "copies", "fdd": "FDD", "cmmd": "CMMD",
         "class_agreement": "classes"}  # fmt: skip


def evaluation_table(runs: Sequence[RunRecord]) -> str:
    """Return every evaluation of `cmtool eval`, with the reference and features that its figures depend on."""
    found = [(run, row) for run in runs for row in run.evaluations if isinstance(row.get("metrics"), dict)]
    used = [key for key in HEADS if any(row["metrics"].get(key) is not None for _, row in found)]
    rows = [_evaluation(run, row, used) for run, row in found]
    heads = ["run", "evaluations", "times", "images", "reference", "features", *(HEADS[key] for key in used), "when"]
    none = '<p class="soft">None yet: <code>cmtool eval</code> appends one here.</p>'
    note = (
        "FD is the Frechet distance: FID where the features are Inception's, else comparable within one network only."
    )
    return section(
        "evaluation", "Evaluations", table(heads, rows, "rows") or none, f'<p class="soft">{note}</p>' * bool(rows)
    )


def _evaluation(run: RunRecord, row: dict[str, Any], used: Sequence[str]) -> list[Any]:
    protocol = row.get("protocol") or {}
    times = row.get("times") or []
    shown = ", ".join(number(float(level)) for level in times[:4]) + (" ..." if len(times) > 4 else "")
    figures = [row["metrics"].get(key) for key in used]
    fixed = [run.name, row.get("nfe"), shown, row.get("count"), protocol.get("reference"), protocol.get("features")]
    return [*fixed, *figures, str(row.get("created") or "").replace("T", " ").removesuffix("Z")]


# --- settings and environment ---


def settings(runs: Sequence[RunRecord]) -> str:
    """Return each run's resolved configuration as TOML."""
    parts = [
        f"<details><summary>{escape(run.name)}/config.toml</summary><pre>{escape(to_toml(run.config))}</pre></details>"
        for run in runs
    ]
    return section("configuration", "Configuration", *parts)


def environment(runs: Sequence[RunRecord], here: dict[str, str]) -> str:
    """Return command, machine, versions, seed, data and log of each run, and what the page itself was made with."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for found in facts for name in found))
    rows = [[name, *(found.get(name) for found in facts)] for name in names]
    logs = [
        f"<details><summary>{escape(run.name)}/run.log</summary><pre>{escape(chr(10).join(run.log))}</pre></details>"
        for run in runs
        if run.log
    ]
    made = ", ".join(f"{name} {value}" for name, value in here.items())
    return section(
        "environment",
        "Environment",
        table(["", *(run.name for run in runs)], rows, "facts"),
        *logs,
        f'<p class="soft">This page: {escape(made)}.</p>',
    )


def _facts(run: RunRecord) -> dict[str, str]:
    """Return what is needed to repeat a run, from its last start in the log and from its model's header."""
    # A run folder may come from anywhere: nothing in it is assumed to have the right type.
    header = run.header or {}
    machine = {**_dict(header.get("machine")), **run.started}
    words = machine.get("command")
    versions = {**_dict(header.get("versions")), **_dict(machine.get("versions"))}
    said = {
        "command": shlex.join(["cmtool", *map(str, words[1:])]) if words and isinstance(words, list) else None,
        **{name: machine.get(name) for name in ("device", "precision", "threads", "deterministic", "system")},
        "seed": run.config.train.seed,
        "data": _dict(header.get("data")).get("fingerprint") or machine.get("data"),
        "time in steps": human_time(run.seconds) if run.seconds else None,
        **{f"version of {name}": value for name, value in versions.items()},
    }
    return {name: _word(value) for name, value in said.items() if value is not None}


def _word(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
