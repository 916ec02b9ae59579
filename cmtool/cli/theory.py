"""`cmtool theory WHAT`: experiments on consistency training whose answers are known exactly."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Json, Quiet, Seed, parse_floats, parse_ints, sub_app
from cmtool.cli.output import Output
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.theory import study

app = sub_app(
    "The convergence theory of consistency training, checked by exact answers.\n\n"
    "Example: cmtool theory schedules --T 200"
)

Data = Annotated[str, typer.Option("--data", help="Law: 'gauss:MU;S', 'gmm:W,W;MU,MU;S' or 'diracs:W,W;MU,MU'.")]
Schedule = Annotated[str, typer.Option("--schedule", help="Noise schedule: li (the theorem's), angle, cosine, linear.")]
C0 = Annotated[float, typer.Option("--c0", help="Constant of the theorem's schedule: beta_1 = T^-c0.")]
C1 = Annotated[float, typer.Option("--c1", help="Constant of the theorem's schedule: step c1 log(T)/T, below 1.")]
Start = Annotated[str, typer.Option("--start", help="Where sampling starts: normal (N(0, 1)) or exact (p_T).")]
Levels = Annotated[str, typer.Option("--T", help="Numbers of noise levels, separated by commas."), parse_ints]
OutDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for CSV, JSON, PNG and SVG files.")]
FOLDER = Path("theory")

GAUSS, GMM_A, GMM_E = "gauss:0;1", "gmm:0.3,0.7;-1,1;0.4", "gmm:0.3,0.7;-0.5,0.5;0.2"


def prepare() -> None:
    """One thread before numpy and torch load: the arrays are small, and threads only get in each other's way."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def draw(out: Output, table: study.Table) -> None:
    """Put a table on stdout."""
    out.table(table.title, table.columns, table.rows)


def show(out: Output, found: study.Study) -> None:
    """Put a study's table and exponents on stdout, its findings on stderr."""
    from cmtool.theory.study import fits_table

    draw(out, found.tables[0])
    if found.fits:
        draw(out, fits_table(found.fits))
    for finding in found.findings:
        out.say(f"* {finding}")
    for note in found.notes:
        out.say(f"  {note}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options that every study has; a study adds those that its function takes, lists as text with their reader."""

    out: OutDir = FOLDER
    json_mode: Json = False
    quiet: Quiet = False

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the study's function."""
        found = {}
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if name not in COMMON:
                option, *readers = hint.__metadata__
                value = getattr(self, name)
                found[name] = readers[0](value, option.default) if readers else value  # the first word given
        return found


COMMON = [field.name for field in fields(Study)]


@dataclass(frozen=True, kw_only=True)
class Scaling(Study):
    """W1 against T, d and eps.  Example: cmtool theory scaling --d 1,8 --T 16,32,64,128."""

    data: Data = GAUSS
    dims: Annotated[str, typer.Option("--d", help="Dimensions, separated by commas."), parse_ints] = "1,2,8,32"
    counts: Levels = "16,32,64,128,256,512"
    schedule: Schedule = "li"
    c0: C0 = 2.0
    c1: C1 = 4.0
    start: Start = "normal"
    eps: Annotated[str, typer.Option("--eps-inject", help="Biases spread over the levels."), parse_floats] = (
        "0.01,0.03,0.1"
    )
    samples: Annotated[int | None, typer.Option("--n", help="Also fit every level on this many pairs.")] = None
    covariance: Annotated[str | None, typer.Option("--cov", help="File with a covariance: data N(0, C) instead.")] = (
        None
    )
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Classes(Study):
    """What a restricted function class costs.  Example: cmtool theory classes --family relu --size 1,3,9."""

    family: Annotated[str, typer.Option("--family", help="poly, relu (exact projections) or mlp (trained).")] = "relu"
    sizes: Annotated[str, typer.Option("--size", help="Degrees, ramps or widths, separated by commas."), parse_ints] = (
        "1,3,9"
    )
    data: Data = GMM_A
    count: Annotated[int | None, typer.Option("--T", help="Number of levels; default 32, for mlp 8.")] = None
    samples: Annotated[int | None, typer.Option("--n", help="Fit poly and relu on this many pairs per level.")] = None
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps per level of an mlp.")] = 200
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Schedules(Study):
    """Noise schedules compared.  Example: cmtool theory schedules --T 200."""

    count: Annotated[int, typer.Option("--T", help="Number of levels of the table.")] = 100
    c0: C0 = 2.0
    c1: C1 = 4.0
    stds: Annotated[str, typer.Option("--s", help="Widths of the Gaussian data."), parse_floats] = "0.25,0.5,1,2,4"


@dataclass(frozen=True, kw_only=True)
class Typical(Study):
    """Coverage of the typical set, c3 and c4 on digits.  Example: cmtool theory typical --c3 0.5,1."""

    data: Data = GMM_A
    count: Annotated[int, typer.Option("--T", help="Number of levels.")] = 100
    c3: Annotated[str, typer.Option("--c3", help="Sizes of the typical set."), parse_floats] = "0.5,1,2"
    draws: Annotated[int, typer.Option("--count", help="Draws per level on digits.")] = 400
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Edm(Study):
    """Training and distillation on the grid of practice.  Example: cmtool theory edm --N 18,36,72."""

    counts: Annotated[str, typer.Option("--N", help="Grid points, separated by commas."), parse_ints] = (
        "10,18,36,72,144,288"
    )
    data: Data = GMM_E
    std: Annotated[float, typer.Option("--s", help="Width of the Gaussian data.")] = 0.5


@dataclass(frozen=True, kw_only=True)
class Gap(Study):
    """Where training and distillation differ: losses, minimizers, pairs.  Example: cmtool theory gap."""

    std: Annotated[float, typer.Option("--s", help="Width of the Gaussian data.")] = 0.5
    majority: Annotated[float, typer.Option("--majority", help="Weight of the heavier Dirac, above 0.5.")] = 0.7
    counts: Annotated[str, typer.Option("--N", help="Grid points of the minimizers."), parse_ints] = "18,80,320"
    huber: Annotated[str, typer.Option("--huber", help="Constants c of the pseudo-Huber loss."), parse_floats] = (
        "0.00054,0.03,0.3"
    )


@dataclass(frozen=True, kw_only=True)
class Samplers(Study):
    """W1 per evaluation of ODE, SDE, CT, CD; trained models.  Example: cmtool theory samplers --nfe 4,8,16."""

    data: Data = GMM_A
    budgets: Annotated[str, typer.Option("--nfe", help="Evaluations or levels: powers of two."), parse_ints] = (
        "4,8,16,32,64"
    )
    count: Annotated[int, typer.Option("--T", help="Levels of the trained networks.")] = 10
    seeds: Annotated[int, typer.Option("--seeds", help="Trained networks of each kind.")] = 3
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps per level.")] = 300
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Chain(Study):
    """Perfect training on any points, by simulation.  Example: cmtool theory chain --data points.csv."""

    data: Annotated[str | None, typer.Option("--data", help="Points: .npy, .npz, .csv, .txt; default a ring.")] = None
    counts: Levels = "16,64"
    count: Annotated[int, typer.Option("--count", help="Points compared.")] = 600
    walks: Annotated[int, typer.Option("--walks", help="Chains per point.")] = 100
    schedule: Schedule = "li"
    seed: Seed = 0


# Their laws may be other than the text says (weights that are scaled), which is worth a line.
NOTICED = (Classes, Typical, Edm, Samplers)


def study_command(kind: type[Study]) -> Callable[..., None]:
    """Return the command that runs one study, prints its table and exponents, and writes its files."""

    def run(options: Study) -> None:
        prepare()
        from cmtool.theory.figures import write
        from cmtool.theory.laws import parse_law
        from cmtool.theory.study import document, find

        out, settings = Output(options.json_mode, options.quiet), options.settings()
        found = find(kind.__name__.lower())(**settings)
        notice = parse_law(settings["data"]).notice if kind in NOTICED else None
        if notice:
            out.say(f"Note: {notice}.")
        paths = write(found, options.out)
        show(out, found)
        out.say(f"Wrote {', '.join(path.name for path in paths)} in {options.out}/")
        out.json(document(found) | {"files": [str(path) for path in paths]})

    run.__doc__, run.__annotations__ = kind.__doc__, {"options": kind}
    typed: Any = command(run)
    order = sorted(typed.__signature__.parameters.values(), key=lambda parameter: parameter.name in COMMON)
    typed.__signature__ = typed.__signature__.replace(parameters=order)
    return typed


for _kind in (Scaling, Classes, Schedules, Typical, Edm, Gap, Samplers, Chain):
    app.command(name=_kind.__name__.lower())(study_command(_kind))


# --- all of them, and what else there is ---------------------------------------------------------------------------


@app.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="Closed forms only.")] = False,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare with the known answers K01 to K28; exit code 1 when one fails.  Example: cmtool theory check."""
    prepare()
    from dataclasses import asdict

    from cmtool.theory.checks import run_checks
    from cmtool.theory.report import checks_table

    out = Output(json_mode, quiet)
    found = run_checks(quick)
    failed = [item for item in found if not item.passed]
    draw(out, checks_table(found))
    ids = len({item.id for item in found})
    out.say(f"{len(found) - len(failed)} of {len(found)} comparisons ({ids} known answers) agree.")
    out.json({"passed": not failed, "checks": [asdict(item) | {"passed": item.passed} for item in found]})
    if failed:
        raise typer.Exit(1)


def _run_all(out: Output, folder: Path | None) -> list[study.Study]:
    """Run every study on two processes; write the files of each when there is a folder."""
    from cmtool.theory.figures import write
    from cmtool.theory.study import STUDIES, in_order, run_all

    studies = []
    with out.progress(len(STUDIES), "theory") as update:
        for found in run_all():
            studies.append(found)
            if folder is not None:
                write(found, folder)
            update(1, note=found.name)
    return in_order(studies)


@app.command(name="all")
def run_everything(out: OutDir = FOLDER, json_mode: Json = False, quiet: Quiet = False) -> None:
    """Every experiment with its defaults, in under a minute.  Example: cmtool theory all --out theory/."""
    prepare()
    from cmtool.theory.study import document

    output = Output(json_mode, quiet)
    studies = _run_all(output, out)
    rows = [[one.name, fit.name, fit.exponent, fit.error, fit.theorem] for one in studies for fit in one.fits]
    output.table(
        "Exponents measured, beside the theorem's", ["study", "law", "measured", "std. error", "theorem"], rows
    )
    for one in studies:
        output.say(f"{one.name}: {one.findings[0]}")
    output.say(f"Wrote tables, figures and JSON of {len(studies)} studies.")
    output.result(str(out))
    output.json({"folder": str(out), "studies": [document(one) for one in studies]})


@app.command()
def report(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """One page with all figures and findings.  Example: cmtool theory report --out report.html."""
    prepare()
    from cmtool.files.atomic import atomic_text
    from cmtool.theory.checks import run_checks
    from cmtool.theory.report import build_page, headlines

    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UsageError(f"cannot write a page to {out}", "give a file in a folder that exists: --out report.html")
    output = Output(json_mode, quiet)
    studies, checks = _run_all(output, None), run_checks()
    atomic_text(out, build_page(studies, checks))
    for line in headlines(studies):
        output.say(f"* {line}")
    output.result(str(out))
    output.json(
        {"page": str(out), "findings": headlines(studies), "checks_passed": all(item.passed for item in checks)}
    )


@app.command()
def plan(
    dim: Annotated[int, typer.Option("--dim", help="Dimension d of the data.")],
    eps: Annotated[float, typer.Option("--eps", help="The W1 to reach.")],
    lipschitz: Annotated[float, typer.Option("--lipschitz", help="L_f for the bound, 1 or more.")] = 1.0,
    json_mode: Json = False,
    quiet: Quiet = False,
) -> None:
    """How many levels are enough.  Example: cmtool theory plan --dim 2 --eps 0.05."""
    prepare()
    from dataclasses import asdict

    from cmtool.theory.scaling import make_plan

    out = Output(json_mode, quiet)
    found = make_plan(dim, eps, lipschitz)
    measured = "measured: smallest T with W2 <= eps" if found.mixture_measured else "extrapolated beyond T = 2048"
    rows: list[list[object]] = [
        [
            "bound with C1 = 1, no eps terms",
            f"{found.bound:.3g}",
            "sufficient if C1 were 1; the theorem does not say C1",
        ],
        ["N(0, I), exact", found.gaussian or "above 2^24", "smallest T with exact W2 <= eps"],
        ["two modes on one axis, N(0, .4^2) elsewhere", found.mixture, measured],
    ]
    out.table(
        f"Levels T for W1 <= {eps:g} in d = {dim}, perfect training, the theorem's schedule", ["by", "T", "how"], rows
    )
    out.say("Measured laws hold for these data alone; images have other flow maps, and training adds eps and eps_F.")
    out.json(asdict(found))
