"""`cmtool theory WHAT`: experiments on consistency training whose answers are known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from cmtool.cli import theory_all
from cmtool.cli.app import command
from cmtool.cli.lists import parse_floats, parse_ints
from cmtool.cli.options import Json, Quiet, Seed, sub_app
from cmtool.cli.output import Output
from cmtool.cli.theory_all import FOLDER, OutDir, prepare, show

app = sub_app(
    "The convergence theory of consistency training, checked by exact answers.\n\n"
    "Example: cmtool theory schedules --T 200"
)

Data = Annotated[str, typer.Option("--data", help="Law: 'gauss:MU;S', 'gmm:W,W;MU,MU;S' or 'diracs:W,W;MU,MU'.")]
Schedule = Annotated[str, typer.Option("--schedule", help="Noise schedule: li (the theorem's), angle, cosine, linear.")]
C0 = Annotated[float, typer.Option("--c0", help="Constant of the theorem's schedule: beta_1 = T^-c0.")]
C1 = Annotated[float, typer.Option("--c1", help="Constant of the theorem's schedule: step c1 log(T)/T, below 1.")]
Start = Annotated[str, typer.Option("--start", help="Where sampling starts: normal (N(0, 1)) or exact (p_T).")]
Levels = Annotated[str, typer.Option("--T", help="Numbers of noise levels, separated by commas.")]

GAUSS, GMM_A, GMM_E = "gauss:0;1", "gmm:0.3,0.7;-1,1;0.4", "gmm:0.3,0.7;-0.5,0.5;0.2"


class Written(Protocol):
    """The options that every study has."""

    @property
    def out(self) -> Path:
        """The folder of its files."""

    @property
    def json_mode(self) -> bool:
        """Whether it prints JSON."""

    @property
    def quiet(self) -> bool:
        """Whether it keeps its findings to itself."""


def _study(name: str, options: Written, law: str | None = None, **settings: Any) -> None:
    """Run one study, print its table and exponents, write its files; `law`: data whose notice is worth a line."""
    prepare()
    from cmtool.theory.figures import write
    from cmtool.theory.laws import parse_law
    from cmtool.theory.studies import find
    from cmtool.theory.study import document

    out = Output(options.json_mode, options.quiet)
    study = find(name)(**settings)
    notice = None if law is None else parse_law(law).notice
    if notice:
        out.say(f"Note: {notice}.")
    paths = write(study, options.out)
    show(out, study)
    out.say(f"Wrote {', '.join(path.name for path in paths)} in {options.out}/")
    out.json(document(study) | {"files": [str(path) for path in paths]})


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Options of `cmtool theory scaling`."""

    data: Data = GAUSS
    d: Annotated[str, typer.Option("--d", help="Dimensions, separated by commas.")] = "1,2,8,32"
    counts: Levels = "16,32,64,128,256,512"
    schedule: Schedule = "li"
    c0: C0 = 2.0
    c1: C1 = 4.0
    start: Start = "normal"
    eps_inject: Annotated[str, typer.Option("--eps-inject", help="Biases spread over the levels.")] = "0.01,0.03,0.1"
    samples: Annotated[int | None, typer.Option("--n", help="Also fit every level on this many pairs.")] = None
    covariance: Annotated[str | None, typer.Option("--cov", help="File with a covariance: data N(0, C) instead.")] = (
        None
    )
    seed: Seed = 0
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def scaling(options: Scaling) -> None:
    """W1 against T, d and eps.  Example: cmtool theory scaling --d 1,8 --T 16,32,64,128."""
    _study(
        "scaling",
        options,
        data=options.data,
        dims=parse_ints(options.d, "--d"),
        counts=parse_ints(options.counts, "--T"),
        schedule=options.schedule,
        c0=options.c0,
        c1=options.c1,
        start=options.start,
        eps=parse_floats(options.eps_inject, "--eps-inject"),
        samples=options.samples,
        seed=options.seed,
        covariance=options.covariance,
    )


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Options of `cmtool theory classes`."""

    family: Annotated[str, typer.Option("--family", help="poly, relu (exact projections) or mlp (trained).")] = "relu"
    size: Annotated[str, typer.Option("--size", help="Degrees, ramps or widths, separated by commas.")] = "1,3,9"
    data: Data = GMM_A
    count: Annotated[int | None, typer.Option("--T", help="Number of levels; default 32, for mlp 8.")] = None
    samples: Annotated[int | None, typer.Option("--n", help="Fit poly and relu on this many pairs per level.")] = None
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps per level of an mlp.")] = 200
    seed: Seed = 0
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def classes(options: Classes) -> None:
    """What a restricted function class costs.  Example: cmtool theory classes --family relu --size 1,3,9."""
    _study(
        "classes",
        options,
        law=options.data,
        family=options.family,
        sizes=parse_ints(options.size, "--size"),
        data=options.data,
        count=options.count,
        samples=options.samples,
        steps=options.steps,
        seed=options.seed,
    )


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Options of `cmtool theory schedules`."""

    count: Annotated[int, typer.Option("--T", help="Number of levels of the table.")] = 100
    c0: C0 = 2.0
    c1: C1 = 4.0
    stds: Annotated[str, typer.Option("--s", help="Widths of the Gaussian data.")] = "0.25,0.5,1,2,4"
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def schedules(options: Schedules) -> None:
    """Noise schedules compared.  Example: cmtool theory schedules --T 200."""
    _study(
        "schedules", options, count=options.count, c0=options.c0, c1=options.c1, stds=parse_floats(options.stds, "--s")
    )


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Options of `cmtool theory typical`."""

    data: Data = GMM_A
    count: Annotated[int, typer.Option("--T", help="Number of levels.")] = 100
    c3: Annotated[str, typer.Option("--c3", help="Sizes of the typical set.")] = "0.5,1,2"
    draws: Annotated[int, typer.Option("--count", help="Draws per level on digits.")] = 400
    seed: Seed = 0
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def typical(options: Typical) -> None:
    """Coverage of the typical set, c3 and c4 on digits.  Example: cmtool theory typical --c3 0.5,1."""
    _study(
        "typical",
        options,
        law=options.data,
        data=options.data,
        count=options.count,
        c3=parse_floats(options.c3, "--c3"),
        draws=options.draws,
        seed=options.seed,
    )


@dataclass(frozen=True, kw_only=True)
class Edm:
    """Options of `cmtool theory edm`."""

    counts: Annotated[str, typer.Option("--N", help="Grid points, separated by commas.")] = "10,18,36,72,144,288"
    data: Data = GMM_E
    std: Annotated[float, typer.Option("--s", help="Width of the Gaussian data.")] = 0.5
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def edm(options: Edm) -> None:
    """Training and distillation on the grid of practice.  Example: cmtool theory edm --N 18,36,72."""
    _study(
        "edm", options, law=options.data, counts=parse_ints(options.counts, "--N"), data=options.data, std=options.std
    )


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Options of `cmtool theory gap`."""

    std: Annotated[float, typer.Option("--s", help="Width of the Gaussian data.")] = 0.5
    majority: Annotated[float, typer.Option("--majority", help="Weight of the heavier Dirac, above 0.5.")] = 0.7
    counts: Annotated[str, typer.Option("--N", help="Grid points of the minimizers.")] = "18,80,320"
    huber: Annotated[str, typer.Option("--huber", help="Constants c of the pseudo-Huber loss.")] = "0.00054,0.03,0.3"
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def gap(options: Gap) -> None:
    """Where training and distillation differ: losses, minimizers, pairs.  Example: cmtool theory gap."""
    _study(
        "gap",
        options,
        std=options.std,
        majority=options.majority,
        counts=parse_ints(options.counts, "--N"),
        huber=parse_floats(options.huber, "--huber"),
    )


@dataclass(frozen=True, kw_only=True)
class Samplers:
    """Options of `cmtool theory samplers`."""

    data: Data = GMM_A
    nfe: Annotated[str, typer.Option("--nfe", help="Evaluations or levels: powers of two.")] = "4,8,16,32,64"
    count: Annotated[int, typer.Option("--T", help="Levels of the trained networks.")] = 10
    seeds: Annotated[int, typer.Option("--seeds", help="Trained networks of each kind.")] = 3
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps per level.")] = 300
    seed: Seed = 0
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def samplers(options: Samplers) -> None:
    """W1 per evaluation of ODE, SDE, CT, CD; trained models.  Example: cmtool theory samplers --nfe 4,8,16."""
    _study(
        "samplers",
        options,
        law=options.data,
        data=options.data,
        budgets=parse_ints(options.nfe, "--nfe"),
        count=options.count,
        seeds=options.seeds,
        steps=options.steps,
        seed=options.seed,
    )


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Options of `cmtool theory chain`."""

    data: Annotated[str | None, typer.Option("--data", help="Points: .npy, .npz, .csv, .txt; default a ring.")] = None
    counts: Levels = "16,64"
    count: Annotated[int, typer.Option("--count", help="Points compared.")] = 600
    walks: Annotated[int, typer.Option("--walks", help="Chains per point.")] = 100
    schedule: Schedule = "li"
    seed: Seed = 0
    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False


@app.command()
@command
def chain(options: Chain) -> None:
    """Perfect training on any points, by simulation.  Example: cmtool theory chain --data points.csv."""
    _study(
        "chain",
        options,
        data=options.data,
        counts=parse_ints(options.counts, "--T"),
        count=options.count,
        walks=options.walks,
        schedule=options.schedule,
        seed=options.seed,
    )


for _name, _command in theory_all.COMMANDS.items():
    app.command(name=_name)(_command)
