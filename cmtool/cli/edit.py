"""`cmtool edit`: inpaint, colorize, superres, stroke, denoise: a person's own pictures, without retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cmtool.cli.options import BatchSize, Device, Json, Model, Precision, Quiet, Seed, sub_app

Images = Annotated[list[Path], typer.Argument(help="Pictures to edit.", metavar="IMAGE")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="A .png (the edit; several: a grid) or a folder; default edits/.")
]
Num = Annotated[int | None, typer.Option("--num", "-n", min=1, help="Variations of each picture.")]
Times = Annotated[
    str | None, typer.Option("--times", "--t", help="Noise levels, e.g. 5.38,2.24; 'paper': the published ones.")
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Evaluations, at tuned noise levels.")]
Indices = Annotated[str | None, typer.Option("--indices", help="Noise levels as grid indices, e.g. 0-39.")]
Of = Annotated[int | None, typer.Option("--of", help="Points of the grid that --indices count on.")]
Label = Annotated[str | None, typer.Option("--label", "-l", help="Class by name or number; default: the likeliest.")]
Fit = Annotated[
    Literal["crop", "pad", "stretch"] | None,
    typer.Option("--fit", help="How other shapes become square; default crop, with --paste pad."),
]
Paste = Annotated[bool, typer.Option("--paste", help="Return the edit inside the original, full-size picture.")]
Grid = Annotated[bool, typer.Option("--grid", help="Write one grid: what was given, then the results.")]
BestOf = Annotated[int | None, typer.Option("--best-of", min=2, help="Make N variations, keep the most consistent.")]
Metric = Annotated[Literal["l2", "lpips"], typer.Option("--metric", help="What --best-of compares by.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", min=0, max=10, help="Over-relaxation of the known part; 0: the paper's.")
]
Uncertainty = Annotated[bool, typer.Option("--uncertainty", help="Also write the spread of the variations as a map.")]
MaskFile = Annotated[
    Path | None, typer.Option("--mask", help="White: generate here; black: keep. Default: what is transparent.")
]
Invert = Annotated[bool, typer.Option("--invert-mask", help="White keeps, black is generated.")]
Factor = Annotated[int | None, typer.Option("--factor", "-f", min=2, help="Enlargement; default: to the model's size.")]
Sigma = Annotated[float, typer.Option("--sigma", help="Standard deviation of the noise on the scale of [-1, 1].")]

app = sub_app(
    "Edit pictures with a consistency model, without retraining.\n\n"
    "Example: cmtool edit inpaint --mask mask.png photo.png --model demo/shapes --num 6 --grid --out strip.png"
)


@app.command()
def inpaint(
    images: Images,
    mask: MaskFile = None,
    invert_mask: Invert = False,
    model: Model = None,
    times: Times = None,
    steps: Steps = None,
    indices: Indices = None,
    of: Of = None,
    guidance: Guidance = None,
    num: Num = None,
    best_of: BestOf = None,
    metric: Metric = "l2",
    uncertainty: Uncertainty = False,
    seed: Seed = 0,
    label: Label = None,
    fit: Fit = None,
    paste: Paste = False,
    grid: Grid = False,
    batch_size: BatchSize = None,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fill what the mask paints white; every other pixel keeps its bytes.

    Without --mask: what is transparent in the picture. Levels up to 24 are black, from 231 on white; two alone are
    the two, whatever they are.

    Example: cmtool edit inpaint --mask mask.png photo.png --model demo/shapes --paste --out done.png
    """
    _run("inpaint", locals())


@app.command()
def colorize(
    images: Images,
    model: Model = None,
    times: Times = None,
    steps: Steps = None,
    indices: Indices = None,
    of: Of = None,
    guidance: Guidance = None,
    num: Num = None,
    best_of: BestOf = None,
    metric: Metric = "l2",
    uncertainty: Uncertainty = False,
    seed: Seed = 0,
    label: Label = None,
    fit: Fit = None,
    paste: Paste = False,
    grid: Grid = False,
    batch_size: BatchSize = None,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a gray picture colors; the luma of every pixel stays.

    Example: cmtool edit colorize gray.png --model demo/shapes --num 8 --out grid.png
    """
    _run("colorize", locals())


@app.command()
def superres(
    images: Images,
    factor: Factor = None,
    model: Model = None,
    times: Times = None,
    steps: Steps = None,
    indices: Indices = None,
    of: Of = None,
    guidance: Guidance = None,
    num: Num = None,
    best_of: BestOf = None,
    metric: Metric = "l2",
    uncertainty: Uncertainty = False,
    seed: Seed = 0,
    label: Label = None,
    fit: Fit = None,
    paste: Paste = False,
    grid: Grid = False,
    batch_size: BatchSize = None,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Enlarge a small picture; each of its pixels stays the mean of its patch.

    With --paste a picture of any size is enlarged whole, in overlapping windows.

    Example: cmtool edit superres small.png --model demo/shapes --factor 2
    """
    _run("superres", locals())


@app.command()
def stroke(
    images: Images,
    model: Model = None,
    times: Times = None,
    steps: Steps = None,
    indices: Indices = None,
    of: Of = None,
    num: Num = None,
    uncertainty: Uncertainty = False,
    seed: Seed = 0,
    label: Label = None,
    fit: Fit = None,
    paste: Paste = False,
    grid: Grid = False,
    batch_size: BatchSize = None,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a rough drawing into a picture; a larger first --t frees it more from the drawing.

    Example: cmtool edit stroke scribble.png --model demo/shapes --t 5.38,2.24
    """
    _run("stroke", locals())


@app.command()
def denoise(
    images: Images,
    sigma: Sigma,
    model: Model = None,
    label: Label = None,
    fit: Fit = None,
    paste: Paste = False,
    grid: Grid = False,
    batch_size: BatchSize = None,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove Gaussian noise of a known strength in one evaluation.

    Example: cmtool edit denoise noisy.png --model demo/shapes --sigma 0.3
    """
    _run("denoise", locals())


def _run(task: str, given: dict[str, Any]) -> None:
    from cmtool.cli.edit_run import run_edit
    from cmtool.cli.output import Output

    run_edit(task, given, Output(given["json"], given["quiet"]))
