"""`cmtool sample`: images from a model, as a picture, a grid, a file or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cmtool.cli.app import command
from cmtool.cli.options import (
    BatchSize,
    Device,
    GuidanceOptions,
    Json,
    Model,
    Out,
    Precision,
    Quiet,
    parse_floats,
    parse_ints,
)

Num = Annotated[int | None, typer.Option("--num", "-n", min=1, help="How many; default 64 (2000 points).")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Evaluations (a teacher: solver steps).")]
Times = Annotated[str | None, typer.Option("--times", help="Noise levels of all evaluations, e.g. 80,0.8.")]
Indices = Annotated[str | None, typer.Option("--indices", help="Published grid indices, e.g. 0,22,39.")]
Of = Annotated[int | None, typer.Option("--of", help="Points of the grid that --indices count on, e.g. 40.")]
SamplerName = Annotated[str | None, typer.Option("--sampler", help="multistep; for teachers heun, euler, ...")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", "-l", help="Class by name or number, or all; may be repeated.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of all randomness; default 0.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="One seed for each sample, e.g. 37,40-47.")]
Grid = Annotated[bool, typer.Option("--grid", help="Frame a single sample as a grid too.")]
Quantize = Annotated[
    Literal["round", "truncate"], typer.Option("--quantize", help="How floats become bytes; papers truncate.")
]


Condition = Annotated[
    Path | None, typer.Option("--condition", help="Picture (or folder of them) that the model is conditioned on.")
]


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    model: Model = None
    num: Num = None
    steps: Steps = None
    times: Times = None
    indices: Indices = None
    of: Of = None
    sampler: SamplerName = None
    label: Labels = None


@dataclass(frozen=True, kw_only=True)
class SampleOptions(GuidanceOptions, _Wanted):
    """The options of `cmtool sample`."""

    seed: Seed = None
    seeds: Seeds = None
    condition: Condition = None
    batch_size: BatchSize = None
    quantize: Quantize = "round"
    grid: Grid = False
    out: Out = None
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False


@command
def sample(options: SampleOptions) -> None:
    """Make images in one or a few steps.

    Sample i depends on its seed alone; --seed N owns the seeds N x 1,000,000 and up. A large .npz or folder that was
    cut off is continued by the same command.

    Examples: cmtool sample --model demo/shapes --label all | cmtool sample --steps 2 --num 50000 --out big.npz
    """
    from cmtool.api.sample import Wish, decide, make
    from cmtool.cli.output import Output, command_line

    output = Output.of_rank(options.json, options.quiet)
    wish = Wish(
        num=options.num,
        steps=options.steps,
        times=None if options.times is None else parse_floats(options.times, "--times"),
        indices=None if options.indices is None else parse_ints(options.indices, "--indices"),
        of=options.of,
        sampler=options.sampler,
        labels=options.label,
        seed=options.seed,
        seeds=None if options.seeds is None else parse_ints(options.seeds, "--seeds"),
        **options.guided(),
    )
    job = decide(
        options.model,
        wish,
        options.out,
        output,
        quantize=options.quantize,
        precision=options.precision,
        grid=options.grid,
        command=command_line(),
        condition=options.condition,
    )
    made = make(job, options.batch_size, options.device, output)
    if made is None:
        return
    if made.signal:
        raise typer.Exit(128 + made.signal)
    rate = (len(job.seeds) - made.start) / max(made.seconds, 1e-9)
    output.say(f"{len(job.seeds)} samples in {made.seconds:.1f} s ({rate:.4g} a second)")
    output.result(str(made.path))
    document = {**job.meta(), "path": str(made.path), "num": len(job.seeds), "continued_at": made.start}
    output.json({**document, "seconds": round(made.seconds, 3), "samples_per_second": round(rate, 3)})
