"""Noise schedules: how much each loses, and what no schedule can avoid."""

from __future__ import annotations

import numpy as np

from cmtool.theory import gaussian, population
from cmtool.theory.laws import GMM_A
from cmtool.theory.levels import SCHEDULES, Levels, build_levels, li
from cmtool.theory.study import Curve, Fit, Panel, Study, Table, power_law


def _levels(count: int, c0: float, c1: float) -> dict[str, Levels]:
    named = {f"li c0={c0:g} c1={c1:g}": li(count, c0, c1)}
    if 2 * c1 * np.log(count) < count:
        named[f"li c0={2 * c0:g} c1={2 * c1:g}"] = li(count, 2 * c0, 2 * c1)
    return named | {name: build_levels(name, count) for name in SCHEDULES if name != "li"}


def _floor(levels: Levels) -> float:
    """The least eta(1) over the angle that this schedule covers: one that starts late or stops early has less to do."""
    angles = levels.angles(1.0)
    return gaussian.smallest_shrinkage(levels.count - 1, float(angles[-1] - angles[0]))


def _row(name: str, levels: Levels, stds: list[float]) -> list[object]:
    f = population.train(GMM_A, levels, 1001, 8)[-1]
    return [
        name,
        *[gaussian.shrinkage(levels, std) for std in stds],
        _floor(levels),
        population.errors(GMM_A, levels, f)[0],
        population.errors(GMM_A, levels, population.distill(GMM_A, levels))[0],
        float(levels.signal[-1]),
        float(levels.noise[0]),
    ]


def _decay(counts: list[int], c0: float, c1: float) -> tuple[list[Fit], list[Curve]]:
    """Exponent of eta(1) in T, schedule by schedule, and the floor below all of them."""
    etas: dict[str, list[float]] = {}
    for count in counts:
        for name, levels in _levels(count, c0, c1).items():
            etas.setdefault(name, []).append(gaussian.shrinkage(levels, 1.0))
    fits = [
        power_law(f"eta in T, {name}", counts[-len(eta) :], eta, -1.0) for name, eta in etas.items() if len(eta) > 2
    ]
    curves = [Curve(name, counts[-len(eta) :], eta) for name, eta in etas.items()]
    floor = [gaussian.smallest_shrinkage(count - 1) for count in counts]
    return fits, [*curves, Curve("floor over a quarter turn", counts, floor, "bound")]


def _constants(stds: list[float]) -> Table:
    rows = [
        [std, gaussian.li_constant(std), (2**20) * gaussian.shrinkage(li(2**20), std) / (4 * np.log(2**20))]
        for std in stds
    ]
    return Table("T eta / (c1 log T) on the theorem's schedule", ["s", "limit I(s)", "at T = 2^20"], rows)


def _doubling(named: dict[str, Levels]) -> list[str]:
    """What twice the constants cost on the theorem's schedule; nothing where T is too small for them."""
    eta = [gaussian.shrinkage(levels, 1.0) for name, levels in named.items() if name.startswith("li ")]
    if len(eta) < 2:
        return []
    return [
        f"Doubling c0 and c1 multiplies the loss by {eta[1] / eta[0]:.2f}: large constants, as the proof likes them, "
        "cost accuracy."
    ]


def run(
    count: int = 100,
    stds: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0),
    c0: float = 2.0,
    c1: float = 4.0,
    counts: tuple[int, ...] = (32, 64, 128, 256, 512),
) -> Study:
    """The exact loss eta(s) of every schedule at one T, its decay in T, and the bias and mismatch at the two ends."""
    std_list = list(stds)
    named = _levels(count, c0, c1)
    built = list(named.values())
    rows = [_row(name, levels, std_list) for name, levels in named.items()]
    columns = [
        "schedule",
        *[f"eta(s={std:g})" for std in std_list],
        "floor(s=1)",
        "CT W1 (GMM-A)",
        "CD W1",
        "prior a_T",
        "b_1",
    ]
    fits, curves = _decay(sorted(set(counts)), c0, c1)
    excess = {
        str(row[0]): gaussian.shrinkage(level, 1.0) / _floor(level) for row, level in zip(rows, built, strict=True)
    }
    best = min(excess, key=lambda name: excess[name])
    findings = [
        "No schedule beats 1 - cos(Theta/(T-1))^(T-1), Theta the angle it covers: 1/T is unavoidable even for N(0, "
        f"1). At T = {count}, {best} is at {excess[best]:.4f} times its floor, the theorem's at "
        f"{next(iter(excess.values())):.2f}.",
        *_doubling(named),
        "The targets are X_1, not X_0 (b_1), and the start is N(0, I), not p_T (a_T): both ends carry an error of "
        "their own.",
    ]
    panel = Panel("What training loses, N(0, 1)", "levels T", "eta = 1 - prod cos", curves)
    return Study(
        "schedules",
        "Schedules: what the noise schedule costs",
        "Does the schedule change the law or the constant?",
        [Table(f"Shrinkage eta and W1 by schedule, T = {count}", columns, rows), _constants(std_list)],
        fits,
        [panel],
        findings,
        ["All values are closed forms or spline recursions."],
        {"T": count, "s": std_list, "c0": c0, "c1": c1},
    )
