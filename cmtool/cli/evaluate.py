"""`cmtool eval`: how good samples are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from json import dumps as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import complete
from cmtool.cli.app import command
from cmtool.cli.options import BatchSize, Device, GuidanceOptions, Json, Model, Precision, Quiet, Seed
from cmtool.files.atomic import atomic_text

if TYPE_CHECKING:
    from cmtool.api.find import FoundModel
    from cmtool.api.sample import Wish
    from cmtool.cli.evaluate_sets import Making, Wanted
    from cmtool.cli.output import Output
    from cmtool.evaluation.verdict import Verdict
    from cmtool.machine.world import World

Samples = Annotated[
    list[str] | None,
    typer.Argument(
        help=".npz, folder or zip of images, model or run folder; default: the model's samples.", metavar="SAMPLES"
    ),
]
Ref = Annotated[
    str | None,
    typer.Option("--ref", help="Reference: a name, .npz, folder, preset or run.", autocompletion=complete.references),
]
Num = Annotated[
    int | None, typer.Option("--num", "-n", min=2, help="Images to judge; default: the reference's number.")
]
Steps = Annotated[str | None, typer.Option("--steps", help="Evaluations an image; several make a table: 1,2,4,8.")]
Times = Annotated[str | None, typer.Option("--times", help="Noise levels of all evaluations, e.g. 80,0.8.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics", help="fid,sfid,is,kid,pr,dc,classes,copies; fdd, cmmd, memorization, consistency by name."
    ),
]
FeatureName = Annotated[
    str | None,
    typer.Option("--features", help="inception, imagenet, timm:NAME, digits, shapes, small, points or FILE.pt."),
]
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


@dataclass(frozen=True, kw_only=True)
class _Judged:
    samples: Samples = None
    ref: Ref = None
    model: Model = None
    num: Num = None
    steps: Steps = None
    times: Times = None


@dataclass(frozen=True, kw_only=True)
class EvalOptions(GuidanceOptions, _Judged):
    """The options of `cmtool eval`."""

    metrics: Metrics = None
    features: FeatureName = None
    mode: Mode = None
    bootstrap: Bootstrap = None
    teacher: Teacher = None
    make_ref: MakeRef = None
    data: Data = None
    out: OutFile = None
    seed: Seed = 0
    batch_size: BatchSize = None
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False

    @cached_property
    def metric_names(self) -> tuple[str, ...] | None:
        """The requested metrics; None: all usual ones."""
        from cmtool.evaluation.metrics import check_metrics

        names = self.metrics.split(",") if self.metrics else []
        return check_metrics([name.strip() for name in names if name.strip()])

    @cached_property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of evaluations an image; empty: what the model takes."""
        from cmtool.cli.options import parse_ints

        return parse_ints(self.steps, "--steps") if self.steps is not None else ()

    @cached_property
    def levels(self) -> tuple[float, ...] | None:
        """Noise levels of all evaluations, where they are given."""
        from cmtool.cli.options import parse_floats

        return parse_floats(self.times, "--times") if self.times is not None else None

    def wishes(self) -> list[Wish]:
        """Return how each model is to be sampled: once for every number of evaluations."""
        from cmtool.api.sample import Wish

        return [Wish(steps=count, times=self.levels, **self.guided()) for count in self.step_counts or (None,)]

    def check(self) -> None:
        """Refuse, without torch, whatever can be told to be wrong; raises `UserError`."""
        from cmtool.errors import UsageError
        from cmtool.evaluation.choices import check_features, check_mode, check_reference_name

        _ = self.metric_names
        check_features(self.features)
        check_mode(self.mode)
        if self.ref is not None:
            check_reference_name(self.ref)
        if self.steps is not None and self.times is not None:
            raise UsageError("--steps and --times both say when to evaluate; give one of them.")
        if (self.data is None) != (self.make_ref is None):
            raise UsageError("--make-ref and --data belong together.", "cmtool eval --make-ref REF.npz --data photos/")
        if self.bootstrap and self.bootstrap < 20:
            raise UsageError(f"--bootstrap {self.bootstrap} is too few for an interval; use at least 20.")
        _ = self.step_counts, self.levels, self.guided()


@command
def evaluate(options: EvalOptions) -> None:
    """Judge samples: FID, Inception Score, KID, precision, recall, with the protocol said beside them.

    Examples: cmtool eval --ref digits --model demo/digits | cmtool eval a.npz b/ --ref digits --metrics fid,pr |
    cmtool eval --ref digits --steps 1,2,4 | cmtool eval runs/a runs/b --ref digits
    """
    from cmtool.cli.output import Output

    output = Output.of_rank(options.json, options.quiet)
    options.check()
    if options.make_ref is not None and options.data is not None:
        return _make_ref(options.make_ref, options.data, options, output)
    from cmtool.machine.world import join_world

    with join_world("cpu") as world:
        _judge(options, output, world)


def _judge(options: EvalOptions, output: Output, world: World) -> None:
    from cmtool.cli.evaluate_sets import list_wanted
    from cmtool.evaluation.references import check_reference
    from cmtool.evaluation.verdict import Judging, judge_sets

    ref = options.ref
    if ref is not None:
        check_reference(ref, options.mode, output.say)
    making = _making(options, output, world)
    wanted = list_wanted(options.samples or [], options.model, ref, options.wishes(), making)
    ref = ref or usual_reference([one.found for one in wanted if one.found is not None], output)
    how = Judging(
        metrics=options.metric_names,
        features=options.features,
        mode=options.mode,
        bootstrap=options.bootstrap,
        batch_size=options.batch_size or 64,
        device=options.device,
    )
    verdict = judge_sets(wanted, ref, how, output, world)
    if world.main:
        _show(verdict, wanted, options.out, output)


def _making(options: EvalOptions, output: Output, world: World) -> Making:
    from cmtool.cli.evaluate_sets import Making

    return Making(
        num=options.num,
        seed=options.seed,
        alone=True,
        batch_size=options.batch_size,
        device=options.device,
        precision=options.precision,
        consistency="consistency" in (options.metric_names or ()),
        teacher=options.teacher,
        output=output,
        world=world,
    )


def _show(verdict: Verdict, wanted: Sequence[Wanted], out: Path | None, output: Output) -> None:
    """Show what was found, and keep it: a row in the run of each model, all of it in `out`."""
    from cmtool.cli.evaluate_sets import append_row, model_file
    from cmtool.cli.evaluate_view import draw_closest, draw_quality, show_comparisons, show_notes, show_results

    network, rows = verdict.judge.network, [one.row() for one in verdict.sets]
    for row, path in zip(rows, draw_closest(verdict, output), strict=True):
        row.update({"closest": path} if path else {})
    show_results(rows, verdict.protocol, network, output)
    document = {"protocol": verdict.protocol, "results": rows, "comparisons": show_comparisons(verdict, output)}
    show_notes([note for one in verdict.sets for note in one.found.notes], network, output)
    models = [one.found.name for one in wanted if one.found is not None]
    if plot := draw_quality(rows, models, network, output):
        document["plot"] = plot
    for one, judged, row in zip(wanted, verdict.sets, rows, strict=True):
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = {"created": created, "protocol": verdict.protocol, **row}
        append_row(model_file(one, judged.opened.about), row, output)
    if out is not None:
        atomic_text(out, to_json(document, indent=2, default=str) + "\n")
        output.result(str(out))
    output.json(document)


def usual_reference(models: Sequence[FoundModel], output: Output) -> str:
    """The reference that the model's run was judged against, where --ref is left out.

    Raises:
        UsageError: it had none, or several models had different ones.
    """
    from cmtool.config.judgments import held_out_data, own_reference, reference_of
    from cmtool.errors import UsageError
    from cmtool.evaluation.choices import REFERENCES

    choices = f"choose from {', '.join(REFERENCES)}, or name an .npz, a folder of images, or a preset"
    own = {reference_of(found.header) or held_out_data(found.header): found for found in models}
    if len(own) > 1:
        said = ", ".join(f"{found.name} {own_reference(found.header, found.path) or 'none'}" for found in models)
        raise UsageError(f"--ref is missing, and the models' own references differ: {said}.", choices)
    for reference, found in own.items():
        if isinstance(reference, str):
            output.say(f"reference {reference}, that of the model's training")
            return reference
        if reference is not None:
            output.say(f"reference: the images that the training of {found.name} held out")
            return str(found.path)
    if models:
        data = models[0].header.get("data") or {}
        trained_on = f"it was trained on {data.get('path') or data.get('source')}"
        raise UsageError(f"--ref is missing, and {models[0].name} has no reference of its own: {trained_on}.", choices)
    raise UsageError("--ref is missing: what are the samples to be compared with?", choices)


def _make_ref(path: Path, data: str, options: EvalOptions, output: Output) -> None:
    from cmtool.api.evaluate import make_reference

    made = make_reference(
        path,
        data,
        features=options.features,
        mode=options.mode,
        num=options.num,
        batch_size=options.batch_size or 64,
        device=options.device,
        talk=output,
    )
    output.say(f"{made.count:,} images of {data}, features {made.features}")
    output.result(str(made.path))
    output.json({"reference": str(made.path), "count": made.count, "features": made.features, "data": data})
