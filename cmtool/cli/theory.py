"""`cmtool theory WHAT`: experiments on consistency training whose answers are known exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmtool.cli import theory_all
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


def _study(name: str, folder: Path, json_mode: bool, quiet: bool, **settings: Any) -> None:
    """Run one study, print its table and exponents, write its files."""
    prepare()
    from cmtool.theory.laws import parse_law
    from cmtool.theory.studies import find
    from cmtool.theory.study import document, write

    out = Output(json_mode, quiet)
    study = find(name)(**settings)
    if name not in ("scaling", "chain") and "data" in settings:
        notice = parse_law(settings["data"]).notice
        if notice:
            out.say(f"Note: {notice}.")
    paths = write(study, folder)
    show(out, study)
    out.say(f"Wrote {', '.join(path.name for path in paths)} in {folder}/")
    out.json(document(study) | {"files": [str(path) for path in paths]})


@app.command()
def scaling(
    data: Data = GAUSS,
    d: Annotated[str, typer.Option("--d", help="Dimensions, separated by commas.")] = "1,2,8,32",
    counts: Levels = "16,32,64,128,256,512",
    schedule: Schedule = "li",
    c0: C0 = 2.0,
    c1: C1 = 4.0,
    start: Start = "normal",
    eps_inject: Annotated[str, typer.Option("--eps-inject", help="Biases spread over the levels.")] = "0.01,0.03,0.1",
    samples: Annotated[int | None, typer.Option("--n", help="Also fit every level on this many pairs.")] = None,
    covariance: Annotated[
        str | None, typer.Option("--cov", help="File with a covariance: data N(0, C) instead.")
    ] = None,
    seed: Seed = 0,
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """W1 against T, d and eps.  Example: cmtool theory scaling --d 1,8 --T 16,32,64,128."""
    _study(
        "scaling",
        out,
        json_mode,
        quiet,
        data=data,
        dims=parse_ints(d, "--d"),
        counts=parse_ints(counts, "--T"),
        schedule=schedule,
        c0=c0,
        c1=c1,
        start=start,
        eps=parse_floats(eps_inject, "--eps-inject"),
        samples=samples,
        seed=seed,
        covariance=covariance,
    )


@app.command()
def classes(
    family: Annotated[str, typer.Option("--family", help="poly, relu (exact projections) or mlp (trained).")] = "relu",
    size: Annotated[str, typer.Option("--size", help="Degrees, ramps or widths, separated by commas.")] = "1,3,9",
    data: Data = GMM_A,
    count: Annotated[int | None, typer.Option("--T", help="Number of levels; default 32, for mlp 8.")] = None,
    samples: Annotated[int | None, typer.Option("--n", help="Fit poly and relu on this many pairs per level.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps per level of an mlp.")] = 200,
    seed: Seed = 0,
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a restricted function class costs.  Example: cmtool theory classes --family relu --size 1,3,9."""
    _study(
        "classes",
        out,
        json_mode,
        quiet,
        family=family,
        sizes=parse_ints(size, "--size"),
        data=data,
        count=count,
        samples=samples,
        steps=steps,
        seed=seed,
    )


@app.command()
def schedules(
    count: Annotated[int, typer.Option("--T", help="Number of levels of the table.")] = 100,
    c0: C0 = 2.0,
    c1: C1 = 4.0,
    stds: Annotated[str, typer.Option("--s", help="Widths of the Gaussian data.")] = "0.25,0.5,1,2,4",
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """Noise schedules compared.  Example: cmtool theory schedules --T 200."""
    _study("schedules", out, json_mode, quiet, count=count, c0=c0, c1=c1, stds=parse_floats(stds, "--s"))


@app.command()
def typical(
    data: Data = GMM_A,
    count: Annotated[int, typer.Option("--T", help="Number of levels.")] = 100,
    c3: Annotated[str, typer.Option("--c3", help="Sizes of the typical set.")] = "0.5,1,2",
    draws: Annotated[int, typer.Option("--count", help="Draws per level on digits.")] = 400,
    seed: Seed = 0,
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """Coverage of the typical set, c3 and c4 on digits.  Example: cmtool theory typical --c3 0.5,1."""
    _study(
        "typical", out, json_mode, quiet, data=data, count=count, c3=parse_floats(c3, "--c3"), draws=draws, seed=seed
    )


@app.command()
def edm(
    counts: Annotated[str, typer.Option("--N", help="Grid points, separated by commas.")] = "10,18,36,72,144,288",
    data: Data = GMM_E,
    std: Annotated[float, typer.Option("--s", help="Width of the Gaussian data.")] = 0.5,
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """Training and distillation on the grid of practice.  Example: cmtool theory edm --N 18,36,72."""
    _study("edm", out, json_mode, quiet, counts=parse_ints(counts, "--N"), data=data, std=std)


@app.command()
def gap(
    std: Annotated[float, typer.Option("--s", help="Width of the Gaussian data.")] = 0.5,
    majority: Annotated[float, typer.Option("--majority", help="Weight of the heavier Dirac, above 0.5.")] = 0.7,
    counts: Annotated[str, typer.Option("--N", help="Grid points of the minimizers.")] = "18,80,320",
    huber: Annotated[str, typer.Option("--huber", help="Constants c of the pseudo-Huber loss.")] = "0.00054,0.03,0.3",
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """Where training and distillation differ: losses, minimizers, pairs.  Example: cmtool theory gap."""
    _study(
        "gap",
        out,
        json_mode,
        quiet,
        std=std,
        majority=majority,
        counts=parse_ints(counts, "--N"),
        huber=parse_floats(huber, "--huber"),
    )


@app.command()
def samplers(
    data: Data = GMM_A,
    nfe: Annotated[str, typer.Option("--nfe", help="Evaluations or levels: powers of two.")] = "4,8,16,32,64",
    count: Annotated[int, typer.Option("--T", help="Levels of the trained networks.")] = 10,
    seeds: Annotated[int, typer.Option("--seeds", help="Trained networks of each kind.")] = 3,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps per level.")] = 300,
    seed: Seed = 0,
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """W1 per evaluation of ODE, SDE, CT, CD; trained models.  Example: cmtool theory samplers --nfe 4,8,16."""
    _study(
        "samplers",
        out,
        json_mode,
        quiet,
        data=data,
        budgets=parse_ints(nfe, "--nfe"),
        count=count,
        seeds=seeds,
        steps=steps,
        seed=seed,
    )


@app.command()
def chain(
    data: Annotated[str | None, typer.Option("--data", help="Points: .npy, .npz, .csv, .txt; default a ring.")] = None,
    counts: Levels = "16,64",
    count: Annotated[int, typer.Option("--count", help="Points compared.")] = 600,
    walks: Annotated[int, typer.Option("--walks", help="Chains per point.")] = 100,
    schedule: Schedule = "li",
    seed: Seed = 0,
    out: OutDir = FOLDER,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perfect training on any points, by simulation.  Example: cmtool theory chain --data points.csv."""
    _study(
        "chain",
        out,
        json_mode,
        quiet,
        data=data,
        counts=parse_ints(counts, "--T"),
        count=count,
        walks=walks,
        schedule=schedule,
        seed=seed,
    )


for _name, _command in theory_all.COMMANDS.items():
    app.command(name=_name)(_command)
