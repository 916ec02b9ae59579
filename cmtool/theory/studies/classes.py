"""Restricted function classes: what a class that is too small adds to the error."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmtool.errors import UserError, unknown
from cmtool.theory import classes, population
from cmtool.theory.laws import parse_law, product
from cmtool.theory.levels import Levels, build_levels, li
from cmtool.theory.line import LineMixture
from cmtool.theory.study import Curve, Panel, Study, Table

GMM = "gmm:0.3,0.7;-1,1;0.4"
COLUMNS = ["size", "W1", "population", "eps_F", "eps", "population + eps_F + eps", "holds"]


def _exact_rows(
    law: LineMixture, levels: Levels, family: str, sizes: list[int], samples: int | None, seed: int
) -> list[list[Any]]:
    base = classes.population_w1(law, levels, population.train(law, levels, 2001)[-1])
    rows: list[list[Any]] = []
    for size in sizes:
        rng = np.random.default_rng(seed)
        found = classes.run_class(law, levels, family, size, samples, rng)
        total = base + found.eps_class + found.eps_fit
        rows.append([size, found.w1, base, found.eps_class, found.eps_fit, total, bool(found.w1 <= total + 1e-9)])
    return rows


def _trained_rows(law: LineMixture, levels: Levels, widths: list[int], steps: int, seed: int) -> list[list[Any]]:
    """Networks of these widths on two copies of the law; eps_F and eps cannot be told apart and stand together."""
    from cmtool.theory.studies.training import coupled_errors
    from cmtool.theory.trained import Budget, Member, train_sequentially

    rows: list[list[Any]] = []
    for width in widths:
        members = [Member("ct", "restarted", seed + index) for index in range(2)]
        trained = train_sequentially(product(law, 2), levels, members, Budget(width=width, steps=steps))
        errors = coupled_errors(law, levels, trained, seed)
        eps = float(trained.eps.mean())
        total = errors.population["ct"] + eps
        rows.append(
            [
                width,
                float(errors.runs.mean()),
                errors.population["ct"],
                None,
                eps,
                total,
                bool(errors.runs.mean() <= total + 2 * errors.error["ct"]),
            ]
        )
    return rows


def _curves(rows: list[list[Any]], floor: float | None) -> list[Curve]:
    sizes = [row[0] for row in rows]
    curves = [
        Curve("measured", sizes, [row[1] for row in rows]),
        Curve("population, all functions", sizes, [row[2] for row in rows], "law"),
        Curve("population + eps_F + eps", sizes, [row[5] for row in rows], "bound"),
    ]
    return curves if floor is None else [*curves, Curve("affine floor", sizes, [floor] * len(rows), "law")]


def _findings(rows: list[list[Any]], floor: float | None) -> list[str]:
    first, last = rows[0], rows[-1]
    found = [
        f"The theorem's sum holds in {sum(row[-1] for row in rows)} of {len(rows)} cases; from size {first[0]} to"
        f" {last[0]} the error moves from {first[1]:.3f} to {last[1]:.3f} (population {first[2]:.3f})."
    ]
    if floor is not None:
        found.append(
            f"An affine class cannot go below {floor:.3f} on this law however large T is: it only sees two moments."
        )
    return found


def run(
    family: str = "relu",
    sizes: tuple[int, ...] = (1, 3, 9),
    data: str = GMM,
    count: int | None = None,
    samples: int | None = None,
    steps: int = 200,
    seed: int = 0,
) -> Study:
    """W1 and eps_F by class size: exact projections (poly, relu), or networks really trained (mlp, on two axes).

    `samples` fits poly and relu on that many pairs per level; `steps` trains each level of an mlp.

    Raises:
        UserError: for an unknown family or sizes that are not positive.
    """
    if family not in classes.FAMILIES:
        raise UserError(unknown("function class", family, classes.FAMILIES))
    if not sizes or min(sizes) < 1 or (samples is not None and samples < 50) or steps < 1:
        raise UserError("sizes and steps must be at least 1, and --n at least 50", "use --size 1,3,9")
    law, size_list = parse_law(data), sorted(set(sizes))
    count = count or (8 if family == "mlp" else 32)
    if family == "mlp":
        if np.ptp(law.stds) > 0 or law.stds[0] == 0:
            raise UserError("trained networks need modes of one positive width", "use --data 'gmm:0.3,0.7;-1,1;0.4'")
        rows = _trained_rows(law, build_levels("angle", count), size_list, steps, seed)
        how = f"networks 2 -> width -> width -> 2, {steps} steps per level; coupled E||f - Phi||, eps holds eps_F too"
    else:
        rows = _exact_rows(law, li(count), family, size_list, samples, seed)
        how = "exact projection onto the class" if samples is None else f"{samples} fresh pairs per level"
    floor = None if family == "mlp" else classes.affine_floor(law)
    return Study(
        "classes",
        "Function classes: what a small class costs",
        "How does the error grow when the class is too small?",
        [Table(f"Class {family}, data {data}, T = {count}: {how}", COLUMNS, rows)],
        (),
        [Panel(f"Class {family}, T = {count}", "size", "W1", _curves(rows, floor), log_y=False)],
        _findings(rows, floor),
        [how],
        {"family": family, "sizes": size_list, "data": data, "T": count, "n": samples, "seed": seed},
    )
