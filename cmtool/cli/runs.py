"""`cmtool runs`: list the runs below a folder, and say what differs between two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli.app import command
from cmtool.cli.complete import run_folders
from cmtool.cli.options import Json

if TYPE_CHECKING:
    from cmtool.reporting.runs import RunRecord

Root = Annotated[Path, typer.Option("--runs", help="Folder whose runs are listed.")]
First = Annotated[
    Path, typer.Argument(help="A run folder, or the name of one below runs/.", metavar="A", autocompletion=run_folders)
]
Second = Annotated[Path, typer.Argument(help="The run to compare with.", metavar="B", autocompletion=run_folders)]

app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)


@app.callback()
def runs(ctx: typer.Context, root: Root = Path("runs"), json: Json = False) -> None:
    """List the runs, the newest first: recipe, length, speed, figures.

    Examples: cmtool runs | cmtool runs diff runs/digits-ict-pm runs/digits-icd
    """
    if ctx.invoked_subcommand is None:
        _list(root, json)


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Options of `cmtool runs list`, in the order of the help."""

    root: Root = Path("runs")
    json: Json = False


@app.command("list")
@command
def list_runs(options: ListOptions) -> None:
    """List the runs, the newest first.

    Example: cmtool runs list --runs elsewhere
    """
    _list(options.root, options.json)


def _list(root: Path, json: bool) -> None:
    from cmtool.cli.output import Output
    from cmtool.errors import UserError
    from cmtool.reporting.runs import SHOWN_FIGURES, find_run_folders, read_run

    output = Output(json)
    found = []
    for path in find_run_folders(root):
        try:
            found.append(read_run(path))
        except UserError as error:
            output.warn(f"{path}: {error.message}")
    if not found:
        output.say(f"there is no run under ./{root}; train one: cmtool train-ct --preset digits")
    else:
        used = [key for key in SHOWN_FIGURES if any(key in run.figures() for run in found)]
        heads = ["run", "recipe", "steps", "time", "loss", *(SHOWN_FIGURES[key] for key in used)]
        output.table(f"Runs in {root}", heads, [_row(run, used) for run in found])
    output.json({"runs": [_document(run) for run in found]})


def _row(run: RunRecord, used: list[str]) -> list[Any]:
    from cmtool.units import human_time

    length = f"{run.step:,}" if run.finished else f"{run.step:,} of {run.config.train.steps:,}"
    figures = run.figures()
    spent = human_time(run.seconds) if run.seconds else None
    numbers = [run.loss, *(figures.get(key) for key in used)]
    shown = [None if value is None else f"{value:.4g}" for value in numbers]
    return [run.name, f"{run.config.preset} {run.config.recipe_name}", length, spent, *shown]


def _document(run: RunRecord) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "preset": run.config.preset,
        "recipe": run.config.recipe_name,
        "finished": run.finished,
        "step": run.step,
        "steps": run.config.train.steps,
        "seconds": run.seconds,
        "loss": run.loss,
        "figures": run.figures(),
    }


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """Options of `cmtool runs diff`, in the order of the help."""

    first: First
    second: Second
    root: Root = Path("runs")
    json: Json = False


@app.command()
@command
def diff(options: DiffOptions) -> None:
    """Say what differs between two runs: settings, versions, lengths, figures.

    Example: cmtool runs diff runs/digits-ict-pm runs/digits-icd
    """
    from cmtool.cli.output import Output
    from cmtool.reporting.runs import differences, read_run

    output = Output(options.json)
    a, b = (read_run(_run_folder(path, options.root)) for path in (options.first, options.second))
    found = differences(a, b)
    if found:
        output.table("", ["", a.name, b.name], [[what, _text(left), _text(right)] for what, left, right in found])
    else:
        output.say(f"{a.name} and {b.name} have the same settings, lengths and figures.")
    output.json({"first": str(a.path), "second": str(b.path), "differences": [list(row) for row in found]})


def _run_folder(given: Path, root: Path) -> Path:
    """Return the folder as given, or the run of this name below `root` where there is no such folder here."""
    return given if given.exists() or given.parent != Path(".") else root / given


def _text(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
