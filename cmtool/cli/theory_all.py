"""`cmtool theory check | all | report | plan`, and what all `theory` commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli.options import Json, Quiet
from cmtool.cli.output import Output
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.theory.study import Study, Table

OutDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for CSV, JSON, PNG and SVG files.")]
FOLDER = Path("theory")


def prepare() -> None:
    """One thread before numpy and torch load: the arrays are small, and threads only get in each other's way."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def draw(out: Output, table: Table) -> None:
    """Put a table on stdout."""
    out.table(table.title, table.columns, table.rows)


def show(out: Output, study: Study) -> None:
    """Put a study's table and exponents on stdout, its findings on stderr."""
    from cmtool.theory.study import fits_table

    draw(out, study.tables[0])
    if study.fits:
        draw(out, fits_table(study.fits))
    for finding in study.findings:
        out.say(f"* {finding}")
    for note in study.notes:
        out.say(f"  {note}")


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


def _run_all(out: Output, folder: Path | None) -> list[Study]:
    """Run every study on two processes; write the files of each when there is a folder."""
    from cmtool.theory.figures import write
    from cmtool.theory.studies import STUDIES, in_order, run_all

    studies = []
    with out.progress(len(STUDIES), "theory") as update:
        for study in run_all():
            studies.append(study)
            if folder is not None:
                write(study, folder)
            update(1, note=study.name)
    return in_order(studies)


def run_everything(out: OutDir = FOLDER, json_mode: Json = False, quiet: Quiet = False) -> None:
    """Every experiment with its defaults, in under a minute.  Example: cmtool theory all --out theory/."""
    prepare()
    from cmtool.theory.study import document

    output = Output(json_mode, quiet)
    studies = _run_all(output, out)
    rows = [[study.name, fit.name, fit.exponent, fit.error, fit.theorem] for study in studies for fit in study.fits]
    output.table(
        "Exponents measured, beside the theorem's", ["study", "law", "measured", "std. error", "theorem"], rows
    )
    for study in studies:
        output.say(f"{study.name}: {study.findings[0]}")
    output.say(f"Wrote tables, figures and JSON of {len(studies)} studies.")
    output.result(str(out))
    output.json({"folder": str(out), "studies": [document(study) for study in studies]})


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

    from cmtool.theory.plan import make_plan

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


COMMANDS: dict[str, Callable[..., None]] = {"check": check, "all": run_everything, "report": report, "plan": plan}
