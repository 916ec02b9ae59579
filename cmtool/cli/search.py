"""`cmtool search-times`: where to evaluate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli.app import command
from cmtool.cli.evaluate import FeatureName, Mode, Num, Ref, usual_reference
from cmtool.cli.options import BatchSize, Device, Json, Model, Precision, Quiet, Seed
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.api.evaluate import FoundTimes
    from cmtool.api.find import FoundModel
    from cmtool.cli.output import Output

SearchSteps = Annotated[int, typer.Option("--steps", min=2, help="Evaluations an image to find times for.")]
Grid = Annotated[int, typer.Option("--grid", min=4, max=1281, help="Points of the grid of candidate times.")]
Joint = Annotated[bool, typer.Option("--joint/--greedy", help="Also move all times together, from the greedy answer.")]
Write = Annotated[bool, typer.Option("--write", help="Put the times into the model's header, for sample --steps K.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Where the plot goes; default below samples/.")]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of `cmtool search-times`."""

    model: Model = None
    ref: Ref = None
    steps: SearchSteps = 2
    num: Num = None
    grid: Grid = 40
    joint: Joint = True
    write: Write = False
    plot: Plot = None
    features: FeatureName = None
    mode: Mode = None
    seed: Seed = 0
    batch_size: BatchSize = None
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False


@command
def search_times(options: SearchOptions) -> None:
    """Find the best noise levels for several steps by the paper's ternary search, then all together.

    Example: cmtool search-times --ref digits --steps 2 --num 1797 --write
    """
    from cmtool.cli.output import Output
    from cmtool.evaluation.choices import check_features, check_mode, check_reference_name

    check_features(options.features)
    check_mode(options.mode)
    if options.ref is not None:
        check_reference_name(options.ref)
    _search(options, Output(options.json, options.quiet))


def _search(options: SearchOptions, output: Output) -> None:
    from cmtool.api.evaluate import write_times
    from cmtool.cli.evaluate_sets import model_for

    found = model_for(options.model, options.ref, ("consistency",))
    output.say(found.describe())
    if options.write:
        check_own(found.path)
    ref = options.ref or usual_reference([found], output)
    times = _find(found, ref, options, output)
    path = _show(times, found, ref, options.plot, output)
    if options.write:
        write_times(found.path, times.times)
        output.say(f"written into {found.path}: cmtool sample --steps {len(times.times)} uses them now")
    output.result(",".join(f"{t:.6g}" for t in times.times))
    output.json(
        {
            "model": str(found.path),
            "reference": ref,
            "features": times.features,
            "steps": options.steps,
            "times": list(times.times),
            "value": times.value,
            "method": times.method,
            "count": times.count,
            "candidates": _candidates(times),
            "evaluations": [{"times": list(levels), "value": value} for levels, value in times.trace],
            "plot": str(path),
            "written": options.write,
        }
    )


def _find(found: FoundModel, ref: str, options: SearchOptions, output: Output) -> FoundTimes:
    from cmtool.api.evaluate import search_times
    from cmtool.api.find import load_model
    from cmtool.api.model import Model

    return search_times(
        Model(load_model(found, options.device, options.precision), found.path),
        ref,
        steps=options.steps,
        num=options.num,
        grid=options.grid,
        joint=options.joint,
        features=options.features,
        mode=options.mode,
        seed=options.seed,
        batch_size=options.batch_size,
        talk=output,
    )


def _candidates(times: FoundTimes) -> dict[str, float]:
    return {", ".join(f"{t:.4g}" for t in levels): value for levels, value in times.candidates.items()}


def _show(times: FoundTimes, found: FoundModel, ref: str, plot: Path | None, output: Output) -> Path:
    """Draw the table of the candidates and the picture of the search; return where the picture is."""
    from cmtool.evaluation.plots import plot_search

    name = times.distance
    rows = [[levels, value, "<-" if value == times.value else ""] for levels, value in _candidates(times).items()]
    output.table(f"{name} against {ref}, {times.count:,} samples of fresh seeds", ["times", name, ""], rows)
    path = plot or Path("samples") / f"{found.name}-times-{len(times.times)}.png"
    plot_search(path, times.trace, times.times, name)
    output.say(f"{len(times.trace)} sets of times were tried: {path}")
    return path


def check_own(path: Path) -> None:
    """Refuse to change a model that is not the user's: one that came along, or one that was fetched by its name.

    Raises:
        UserError: it is such a file, or its folder cannot be written.
    """
    from cmtool.files.cache import cache_dir

    file = path.resolve()
    strange = {
        Path(__file__).resolve().parents[1]: "came along with cmtool",
        cache_dir(): "was fetched and is kept as published",
    }
    for folder, how in strange.items():
        if file.is_relative_to(folder.resolve()):
            raise UserError(
                f"--write would change {path}, which {how}.", f"copy it and name the copy: cp {path} {path.name}"
            )
    if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        raise UserError(
            f"--write would change {path}, and there is no permission to write it.", "copy it and name the copy"
        )
