"""What an experiment hands back, and how it goes to disk: tables, exponents, curves, findings in plain language."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmtool.errors import UserError
from cmtool.files.atomic import atomic_bytes
from cmtool.theory.fit import Fit


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
    """A value as JSON knows it: numpy scalars as numbers, what is not finite as null."""
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
    """Measured exponents with their standard errors beside the theorem's."""
    rows = []
    for fit in fits:
        # Two points leave no residual: the exponent stands without an error.
        rows.append([fit.name, fit.exponent, None if fit.points < 3 else fit.error, fit.theorem, fit.points])
    return Table("Exponents", ["law", "measured", "std. error", "theorem", "points"], rows)


def write(study: Study, folder: Path) -> list[Path]:
    """Write NAME.csv (and one CSV per further table), NAME.json, NAME.png and NAME.svg; return their paths.

    Raises:
        UserError: when `folder` cannot be a folder.
    """
    from cmtool.theory.figures import render

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}", "choose another --out") from None
    files = {folder / f"{study.name}.csv": table_csv(study.tables[0]).encode()}
    for table in [*study.tables[1:], *([fits_table(study.fits)] if study.fits else [])]:
        files[folder / f"{study.name}-{slug(table.title)}.csv"] = table_csv(table).encode()
    files[folder / f"{study.name}.json"] = (json.dumps(document(study), indent=2, ensure_ascii=False) + "\n").encode()
    if study.panels:
        files[folder / f"{study.name}.png"] = render(study, "png")
        files[folder / f"{study.name}.svg"] = render(study, "svg")
    for path, data in files.items():
        atomic_bytes(path, data)
    return list(files)
