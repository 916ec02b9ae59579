"""`cmtool report`: one HTML file about a run, or several runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli import complete
from cmtool.cli.app import command
from cmtool.cli.options import Device, GuidanceOptions, Json, Quiet

if TYPE_CHECKING:
    from cmtool.api.sample import Wish
    from cmtool.cli.output import Output
    from cmtool.reporting.page import Gallery
    from cmtool.reporting.runs import RunRecord

Runs = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Run folders; default: the newest under ./runs.", metavar="RUN", autocompletion=complete.run_folders
    ),
]
Root = Annotated[Path, typer.Option("--runs", help="Where the newest run is looked for.")]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")]
Samples = Annotated[bool, typer.Option("--samples/--no-samples", help="Make new samples from the models.")]


@dataclass(frozen=True, kw_only=True)
class _Written:
    runs: Runs = None
    root: Root = Path("runs")
    out: OutFile = Path("report.html")
    samples: Samples = True


@dataclass(frozen=True, kw_only=True)
class ReportOptions(GuidanceOptions, _Written):
    """Options of `cmtool report`, in the order of the help."""

    device: Device = "auto"
    json: Json = False
    quiet: Quiet = False


@command
def report(options: ReportOptions) -> None:
    """Write a page about a run: curves, samples, nearest training images, figures, settings.

    The page is one file that needs no network; several runs are laid over one another.

    Examples: cmtool report | cmtool report runs/* --out report.html
    """
    from cmtool.cli.output import Output
    from cmtool.errors import UsageError
    from cmtool.files.atomic import atomic_text
    from cmtool.reporting.runs import read_runs

    output, out = Output(options.json, options.quiet), options.out
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a report is an .html file.", "e.g. --out report.html")
    found, passed = read_runs(options.runs or [], options.root)
    for sentence in passed:
        output.say(sentence)
    from cmtool.api.sample import Wish
    from cmtool.reporting.page import render

    galleries, wish = [], Wish(**options.guided())
    with output.progress(len(found), "report") as update:
        for run in found:
            galleries.append(_gallery(run, options, wish, output))
            update(note=run.name)
    atomic_text(out, render(found, galleries))
    output.say(f"{len(found)} run{'s' * (len(found) != 1)}; open it in any browser")
    output.result(str(out))
    output.json(_document(out, found, passed))


def _document(out: Path, runs: list[RunRecord], passed: list[str]) -> dict[str, Any]:
    listed = [{"run": str(run.path), "step": run.step, "finished": run.finished} for run in runs]
    return {"report": str(out), "bytes": out.stat().st_size, "runs": listed, "passed_over": passed}


def _gallery(run: RunRecord, options: ReportOptions, wish: Wish, output: Output) -> Gallery:
    """Collect the pictures of a run; report what cannot be shown, and make the page without it."""
    from cmtool.api.find import find_model, load_model
    from cmtool.api.sample import weak_model
    from cmtool.errors import UsageError, UserError
    from cmtool.reporting.page import Gallery
    from cmtool.reporting.pictures import grid_pictures, nearest_training, step_pictures

    gallery = Gallery(grid_pictures(run.grids))
    if not (options.samples and run.finished):
        return gallery
    try:
        found = find_model(str(run.path))
        plan = wish.plan(found.header, output)
        model = load_model(found, options.device, "fp32")
        guided = (plan.guidance, weak_model(plan, model, "fp32"))
        gallery.steps = step_pictures(model, guided)
        if not model.float_samples:
            gallery.nearest = nearest_training(model, run.config.data, guided)
    except UsageError:  # an option that is wrong for every run
        raise
    except UserError as error:
        output.say(f"{run.name}: {error.message} The page goes without.")
    return gallery
