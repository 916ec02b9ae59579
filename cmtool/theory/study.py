"""What an experiment returns: tables, exponents with their standard errors, curves, findings in plain language."""

from __future__ import annotations

import csv
import importlib
import io
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cmtool.errors import UserError, unknown


@dataclass(frozen=True)
class Fit:
    """y ~ factor x^exponent over `points` points; `error` is the exponent's standard error from the residuals.

    The points here are exact, so `error` measures curvature, not noise: how far the law is from a pure power.
    `theorem` is what the proof gives for the same exponent, None where it says nothing.
    """

    name: str
    exponent: float
    error: float
    factor: float
    points: int
    theorem: float | None = None


def power_law(name: str, x: ArrayLike, y: ArrayLike, theorem: float | None = None) -> Fit:
    """Least squares of log y on log x.

    Raises:
        UserError: with fewer than two different x, or values that have no logarithm.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(np.unique(x)) < 2 or (x <= 0).any() or (y <= 0).any():
        raise UserError(
            f"{name}: an exponent needs positive values at two or more different places, not at {x.tolist()}"
        )
    log_x, log_y = np.log(x), np.log(y)
    center = log_x - log_x.mean()
    slope = float(center @ log_y / (center @ center))
    residual = log_y - log_y.mean() - slope * center
    error = float(np.sqrt(residual @ residual / (len(x) - 2) / (center @ center))) if len(x) > 2 else float("nan")
    return Fit(name, slope, error, float(np.exp(log_y.mean() - slope * log_x.mean())), len(x), theorem)


def local_slopes(x: ArrayLike, y: ArrayLike) -> list[float]:
    """Slopes between neighbors on log-log axes, one fewer than there are points."""
    return [float(value) for value in np.diff(np.log(np.asarray(y, float))) / np.diff(np.log(np.asarray(x, float)))]


def log_ratio(counts: ArrayLike) -> np.ndarray:
    """T / log T: against it the theorem's schedule shows a clean exponent, its step being c1 log T / T."""
    counts = np.asarray(counts, float)
    return counts / np.log(counts)


@dataclass(frozen=True)
class Table:
    """Rows of cells (numbers, text, booleans, None) under named columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Curve:
    """One line of a panel. `kind` is "measured" (points and line), "law" (dashed reference) or "bound" (dotted)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "measured"


@dataclass(frozen=True)
class Panel:
    """One set of axes; `log_x` and `log_y` choose the scales."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = True
    log_y: bool = True


@dataclass(frozen=True)
class Study:
    """One experiment: `tables[0]` is the table that the command prints, the others go to files and to the report."""

    name: str
    title: str
    question: str
    tables: Sequence[Table]
    fits: Sequence[Fit] = ()
    panels: Sequence[Panel] = ()
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def plain(value: Any) -> Any:
    """A value in JSON's terms: numpy scalars become numbers, and what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def document(study: Study) -> dict[str, Any]:
    """The study as one JSON document."""
    return dict(plain(asdict(study)))


def slug(text: str) -> str:
    """A title as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")


def table_csv(table: Table) -> str:
    """The table as CSV with full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([[plain(cell) for cell in row] for row in table.rows])
    return text.getvalue()


def fits_table(fits: Sequence[Fit]) -> Table:
    """Measured exponents with their standard errors, next to the theorem's."""
    rows = []
    for fit in fits:
        # Two points leave no residual, so the exponent has no error.
        rows.append([fit.name, fit.exponent, None if fit.points < 3 else fit.error, fit.theorem, fit.points])
    return Table("Exponents", ["law", "measured", "std. error", "theorem", "points"], rows)


# --- the studies ------------------------------------------------------------------------------------------------------


# Each command and the module whose `run` is its study.
STUDIES = {
    "scaling": "scaling",
    "classes": "classes",
    "schedules": "schedules",
    "typical": "typical",
    "edm": "edm",
    "gap": "gap",
    "samplers": "solvers",
    "chain": "chain",
}
# The longest first, so that the other process can take all the short ones meanwhile.
ORDER = ("samplers", *[name for name in STUDIES if name != "samplers"])


def find(name: str) -> Callable[..., Study]:
    """The function of one study; every argument of it has a default.

    Raises:
        UserError: for an unknown name.
    """
    if name not in STUDIES:
        raise UserError(unknown("theory command", name, STUDIES))
    function: Callable[..., Study] = importlib.import_module(f"cmtool.theory.{STUDIES[name]}").run
    return function


def run_default(name: str) -> Study:
    """One study as `theory all` runs it; a plain function, so that another process can be given it."""
    return find(name)()


def run_all(jobs: int = 2) -> Iterator[Study]:
    """Every study with its defaults, as each is finished; `jobs` processes, 1 runs them here."""
    if jobs < 2 or (os.cpu_count() or 1) < 2:
        yield from (run_default(name) for name in ORDER)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = [pool.submit(run_default, name) for name in ORDER]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_order(studies: list[Study]) -> list[Study]:
    """Studies in the order of the commands, whichever was finished first."""
    return sorted(studies, key=lambda study: list(STUDIES).index(study.name))
