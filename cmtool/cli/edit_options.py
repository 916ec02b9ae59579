"""The options of `cmtool edit`: what may be typed, and what each edit takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cmtool.cli.options import BatchSize, Device, Json, Model, Precision, Quiet, Seed

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
Fresh = Annotated[
    float | None,
    typer.Option("--fresh", min=0.001, max=1, help="Share of new noise between evaluations; 1: the paper's."),
]
Uncertainty = Annotated[bool, typer.Option("--uncertainty", help="Also write the spread of the variations as a map.")]
MaskFile = Annotated[
    Path | None, typer.Option("--mask", help="White: generate here; black: keep. Default: what is transparent.")
]
Invert = Annotated[bool, typer.Option("--invert-mask", help="White keeps, black is generated.")]
Factor = Annotated[int | None, typer.Option("--factor", "-f", min=2, help="Enlargement; default: to the model's size.")]
Kernel = Annotated[Literal["mean", "bicubic"], typer.Option("--kernel", help="What made the picture small.")]
Noise = Annotated[
    float | None,
    typer.Option("--noise", min=0, help="Noise of the picture on the scale of [-1, 1]; default: of its bytes at most."),
]
Width = Annotated[float, typer.Option("--sigma", help="Standard deviation of the blur in pixels of the picture.")]
Sigma = Annotated[float, typer.Option("--sigma", help="Standard deviation of the noise on the scale of [-1, 1].")]


# The help shows options in the order of the fields: of the bases of a class the last one's come first, and a base that
# inherits stands right behind what it inherits from. So the particular options of an edit stand among the common ones.


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    images: Images


@dataclass(frozen=True, kw_only=True)
class _Taken:
    model: Model = None


@dataclass(frozen=True, kw_only=True)
class _Rest:
    label: Label = None
    fit: Fit = None
    paste: Paste = False
    grid: Grid = False
    batch_size: BatchSize = None
    out: Out = None
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class EditOptions(_Rest, _Taken, _Pictures):
    """What every edit takes."""


@dataclass(frozen=True, kw_only=True)
class Tuned(_Taken):
    """What edits of tuned levels take."""

    times: Times = None
    steps: Steps = None
    indices: Indices = None
    of: Of = None
    guidance: Guidance = None
    fresh: Fresh = None
    num: Num = None
    best_of: BestOf = None
    metric: Metric = "l2"
    uncertainty: Uncertainty = False
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class TunedOptions(EditOptions, Tuned):
    """What edits of tuned levels take that need nothing besides a picture."""


@dataclass(frozen=True, kw_only=True)
class _Masked(_Pictures):
    mask: MaskFile = None
    invert_mask: Invert = False


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(EditOptions, Tuned, _Masked):
    """The options of `cmtool edit inpaint`."""


@dataclass(frozen=True, kw_only=True)
class _Enlarged(_Pictures):
    factor: Factor = None
    kernel: Kernel = "mean"
    noise: Noise = None


@dataclass(frozen=True, kw_only=True)
class SuperresOptions(EditOptions, Tuned, _Enlarged):
    """The options of `cmtool edit superres`."""


@dataclass(frozen=True, kw_only=True)
class _Blurred(_Pictures):
    sigma: Width
    noise: Noise = None


@dataclass(frozen=True, kw_only=True)
class DeblurOptions(EditOptions, Tuned, _Blurred):
    """The options of `cmtool edit deblur`."""


@dataclass(frozen=True, kw_only=True)
class Drawn(_Taken):
    """What edits take whose levels are a list."""

    times: Times = None
    steps: Steps = None
    indices: Indices = None
    of: Of = None
    num: Num = None
    uncertainty: Uncertainty = False
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class StrokeOptions(EditOptions, Drawn):
    """The options of `cmtool edit stroke`."""


@dataclass(frozen=True, kw_only=True)
class _Noisy(_Pictures):
    sigma: Sigma


@dataclass(frozen=True, kw_only=True)
class DenoiseOptions(EditOptions, _Noisy):
    """The options of `cmtool edit denoise`."""
