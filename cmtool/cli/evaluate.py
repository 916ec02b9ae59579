"""`cmtool eval` and `cmtool search-times`: how good samples are, and where to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli import complete
from cmtool.cli.options import BatchSize, Device, Json, Model, Precision, Quiet, Seed

if TYPE_CHECKING:
    from cmtool.cli.output import Output

Samples = Annotated[
    list[str] | None,
    typer.Argument(
        help=".npz, folder or zip of images, model or run folder; default: the model's samples.", metavar="SAMPLES"
    ),
]
Ref = Annotated[
    str | None,
    typer.Option("--ref", help="Reference: a name, .npz, folder, or preset.", autocompletion=complete.references),
]
Num = Annotated[
    int | None, typer.Option("--num", "-n", min=2, help="Images to judge; default: the reference's number.")
]
Steps = Annotated[str | None, typer.Option("--steps", help="Evaluations an image; several make a table: 1,2,4,8.")]
Times = Annotated[str | None, typer.Option("--times", help="Noise levels of all evaluations, e.g. 80,0.8.")]
Metrics = Annotated[
    str | None, typer.Option("--metrics", help="fid,sfid,is,kid,pr,dc,classes; memorization, consistency by name.")
]
FeatureName = Annotated[str | None, typer.Option("--features", help="inception, digits, shapes, points or FILE.pt.")]
Mode = Annotated[
    str | None, typer.Option("--mode", help="Inception's resizing: legacy_tensorflow, clean, legacy_pytorch.")
]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write the results as JSON to this file.")]
Bootstrap = Annotated[
    int | None, typer.Option("--bootstrap", min=0, help="Resamples for 95 % intervals; default 200 in comparisons.")
]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Diffusion model for --metrics consistency.")]
MakeRef = Annotated[Path | None, typer.Option("--make-ref", help="Write a reference .npz of --data, and stop.")]
Data = Annotated[str | None, typer.Option("--data", help="Images for --make-ref: folder, .npz, zip, preset or name.")]


def evaluate(
    samples: Samples = None,
    ref: Ref = None,
    model: Model = None,
    num: Num = None,
    steps: Steps = None,
    times: Times = None,
    metrics: Metrics = None,
    features: FeatureName = None,
    mode: Mode = None,
    bootstrap: Bootstrap = None,
    teacher: Teacher = None,
    make_ref: MakeRef = None,
    data: Data = None,
    out: OutFile = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge samples: FID, Inception Score, KID, precision, recall, with the protocol said beside them.

    Examples: cmtool eval --ref digits --model demo/digits | cmtool eval a.npz b/ --ref digits --metrics fid,pr |
    cmtool eval --ref digits --steps 1,2,4 | cmtool eval runs/a runs/b --ref digits
    """
    from cmtool.cli.output import Output

    given = locals()
    output = Output.of_rank(json, quiet)
    request = _check(given)
    if make_ref is not None:
        return _make_ref(make_ref, data, features, mode, given, output)
    _evaluate(request, given, output)


def _check(given: dict[str, Any]) -> dict[str, Any]:
    """Read what can be read without torch, and refuse what is wrong with it."""
    from cmtool.cli.lists import parse_floats, parse_ints
    from cmtool.errors import UsageError
    from cmtool.evaluation.names import check_features, check_metrics, check_mode, check_reference_name

    names = [name.strip() for name in given["metrics"].split(",") if name.strip()] if given["metrics"] else None
    metrics = check_metrics(names)
    check_features(given["features"])
    check_mode(given["mode"])
    if given["ref"] is not None:
        check_reference_name(given["ref"])
    if given["steps"] is not None and given["times"] is not None:
        raise UsageError("--steps and --times both say when to evaluate; give one of them.")
    if (given["data"] is None) != (given["make_ref"] is None):
        raise UsageError("--make-ref and --data belong together.", "cmtool eval --make-ref REF.npz --data photos/")
    if given["bootstrap"] and given["bootstrap"] < 20:
        raise UsageError(f"--bootstrap {given['bootstrap']} is too few for an interval; use at least 20.")
    steps = parse_ints(given["steps"], "--steps") if given["steps"] is not None else ()
    times = parse_floats(given["times"], "--times") if given["times"] is not None else None
    return {"metrics": metrics, "steps": steps, "times": times}


def _evaluate(request: dict[str, Any], given: dict[str, Any], output: Output) -> None:
    from cmtool.cli.evaluate_job import Evaluation
    from cmtool.cli.evaluate_sets import list_wanted
    from cmtool.evaluation.references import check_reference
    from cmtool.training.distributed import join_world

    ref = given["ref"]
    with join_world("cpu") as world:
        if ref is not None:
            check_reference(ref, given["mode"], output.say)
        wanted = list_wanted(given["samples"] or [], given["model"], ref, request["steps"], request["times"], output)
        ref = ref or usual_reference(wanted, output)
        Evaluation(ref, wanted, request, given, output, world).run()


def usual_reference(wanted: Sequence[Any], output: Output) -> str:
    """The reference that the model's run was judged against, where --ref is left out.

    Raises:
        UsageError: it had none, or several models had different ones.
    """
    from cmtool.config.judgments import reference_of
    from cmtool.errors import UsageError
    from cmtool.evaluation.names import REFERENCES

    choices = f"choose from {', '.join(REFERENCES)}, or name an .npz, a folder of images, or a preset"
    models = [one.found for one in wanted if one.found is not None]
    known = {reference_of(found.header) for found in models}
    if len(known) > 1:
        said = ", ".join(f"{found.name} {reference_of(found.header) or 'none'}" for found in models)
        raise UsageError(f"--ref is missing, and the models' own references differ: {said}.", choices)
    reference = next(iter(known), None)
    if reference is not None:
        output.say(f"reference {reference}, that of the model's training")
        return reference
    if models:
        data = models[0].header.get("data") or {}
        trained_on = f"it was trained on {data.get('path') or data.get('source')}"
        raise UsageError(f"--ref is missing, and {models[0].name} has no reference of its own: {trained_on}.", choices)
    raise UsageError("--ref is missing: what are the samples to be compared with?", choices)


def _make_ref(
    path: Path, data: str | None, features: str | None, mode: str | None, given: dict[str, Any], output: Output
) -> None:
    from cmtool.errors import UsageError
    from cmtool.evaluation.features import build_features
    from cmtool.evaluation.make_reference import make_reference
    from cmtool.evaluation.references import resolve_reference
    from cmtool.training.setup import choose_device

    if data is None:
        raise UsageError("--make-ref needs --data, the images to describe.")
    source = resolve_reference(data, None, mode, output.say)
    if source.images is None:
        raise UsageError(f"{data} holds statistics only; a reference is made from images.", "name a folder or an .npz")
    images = source.images if given["num"] is None else source.images.some(given["num"])
    for note in images.notes[len(source.images.notes) :]:
        output.say(f"{data}: {note}")
    name, rule = features or source.features, mode or source.mode
    network = build_features(name, images.shape, rule, str(choose_device(given["device"])), output.say)
    with output.progress(images.count, "features") as update:
        made = make_reference(path, images, network, rule, name, batch_size=given["batch_size"] or 64, advance=update)
    output.say(f"{images.count:,} images of {data}, features {network.name}")
    output.result(str(made))
    output.json({"reference": str(made), "count": images.count, "features": network.name, "data": data})


SearchSteps = Annotated[int, typer.Option("--steps", min=2, help="Evaluations an image to find times for.")]
Grid = Annotated[int, typer.Option("--grid", min=4, max=1281, help="Points of the grid of candidate times.")]
Joint = Annotated[bool, typer.Option("--joint/--greedy", help="Also move all times together, from the greedy answer.")]
Write = Annotated[bool, typer.Option("--write", help="Put the times into the model's header, for sample --steps K.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Where the plot goes; default below samples/.")]


def search_times(
    model: Model = None,
    ref: Ref = None,
    steps: SearchSteps = 2,
    num: Num = None,
    grid: Grid = 40,
    joint: Joint = True,
    write: Write = False,
    plot: Plot = None,
    features: FeatureName = None,
    mode: Mode = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the best noise levels for several steps by the paper's ternary search, then all together.

    Example: cmtool search-times --ref digits --steps 2 --num 1797 --write
    """
    from cmtool.cli.output import Output
    from cmtool.cli.search import run_search
    from cmtool.evaluation.names import check_features, check_mode, check_reference_name

    given = locals()
    check_features(features)
    check_mode(mode)
    if ref is not None:
        check_reference_name(ref)
    run_search(given, Output(json, quiet))
