"""Sequential models really trained on a mixture in the plane: population, eps and the optimizer's learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmtool.theory import chain, population
from cmtool.theory.distances import assignment_w1
from cmtool.theory.laws import GMM_A, product
from cmtool.theory.levels import Levels, li
from cmtool.theory.line import LineMixture
from cmtool.theory.study import Curve, Panel, Table
from cmtool.theory.trained import RATES, Budget, Member, Trained, train_sequentially

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CoupledErrors:
    """E||f(X_T) - Phi(X_T)|| from X_T ~ p_T: `runs` (E,), `population` by method, `error` its standard error.

    This coupled distance is what the proof bounds, an upper bound of W1, and needs no transport solver.
    """

    runs: Array
    population: dict[str, float]
    error: dict[str, float]


def coupled_errors(law: LineMixture, levels: Levels, trained: Trained, seed: int, count: int = 4000) -> CoupledErrors:
    """Coupled errors on two independent copies of `law`; the reference map and the populations are exact per axis."""
    rng = np.random.default_rng(seed)
    x = chain.marginal(product(law, 2), levels, -1, count, rng)
    reference = law.flow(x, population.at(levels, -1), population.at(levels, 0))
    best = {"ct": population.train(law, levels, 1001, 10)[-1], "cd": population.distill(law, levels)}
    runs = np.linalg.norm(trained(x) - reference, axis=2)
    means, errors = {}, {}
    for method, f in best.items():
        exact = np.linalg.norm(f(x) - reference, axis=1)
        means[method] = float(exact.mean())
        rows = [i for i, member in enumerate(trained.members) if member.method == method]
        if rows:
            # Both parts of the doubt: the test points, common to all, and the seeds of the runs.
            inside = runs[rows].mean(axis=0).std(ddof=1) / np.sqrt(count)
            between = runs[rows].mean(axis=1).std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0.0
            errors[method] = float(np.hypot(inside, between))
    return CoupledErrors(runs.mean(axis=1), means, errors)


def gap_in_errors(runs: CoupledErrors, trained: Trained) -> float:
    """How many standard errors CT is worse than CD, from runs paired by seed under the restarted rate.

    The error adds those of both methods (seeds and test points) as if independent; they share both, so it is an
    upper bound.
    """
    pairs: dict[int, dict[str, float]] = {}
    for member, value in zip(trained.members, runs.runs, strict=True):
        if member.rate == "restarted":
            pairs.setdefault(member.seed, {})[member.method] = float(value)
    gaps = [pair["ct"] - pair["cd"] for pair in pairs.values() if len(pair) == 2]
    return float(np.mean(gaps) / np.hypot(runs.error["ct"], runs.error["cd"]))


def sampled_w1(law: LineMixture, levels: Levels, outputs: Array, rng: np.random.Generator) -> tuple[float, float]:
    """W1 by optimal assignment of 1000 outputs (1000, 2) to draws of X_1, and the floor of two clouds of X_1."""
    plane = product(law, 2)
    clouds = [chain.marginal(plane, levels, 0, len(outputs), rng) for _ in range(3)]
    return assignment_w1(outputs, clouds[0]), assignment_w1(clouds[1], clouds[2])


def members_for(seeds: int) -> list[Member]:
    """CT under every learning-rate rule and CD under the restarted one, each with `seeds` seeds."""
    rules = [("ct", rate) for rate in RATES] + [("cd", "restarted")]
    return [Member(method, rate, seed) for method, rate in rules for seed in range(seeds)]


@dataclass(frozen=True)
class TrainingResult:
    """Rows of the table, and the numbers that decide: CT eps / population, slack in standard errors, CT - CD."""

    table: Table
    panel: Panel
    eps_share: float
    excess_errors: float
    ct_over_cd_errors: float
    best_rate: str


def run_training(count: int = 10, seeds: int = 3, steps: int = 300, law: LineMixture = GMM_A) -> TrainingResult:
    """Train CT and CD in the plane (two copies of `law`), and compare with the exact population of the same levels."""
    levels, members = li(count), members_for(seeds)
    trained = train_sequentially(product(law, 2), levels, members, Budget(steps=steps))
    found = coupled_errors(law, levels, trained, seed=0)
    rows, eps_by = [], {}
    for method, rate in dict.fromkeys((member.method, member.rate) for member in members):
        picks = [i for i, member in enumerate(members) if (member.method, member.rate) == (method, rate)]
        values, eps = found.runs[picks], trained.eps[picks]
        base, doubt = found.population[method], found.error[method]
        excess = (float(values.mean()) - base - float(eps.mean())) / doubt
        part = "population" if base >= eps.mean() else "eps + eps_F"
        rows.append(
            [method, rate, float(values.mean()), doubt, base, float(eps.mean()), base + float(eps.mean()), excess, part]
        )
        eps_by[method, rate] = (float(eps.mean()) / base, excess)
    columns = ["method", "rate", "error", "std. error", "population", "eps + eps_F", "sum", "excess (s.e.)", "largest"]
    table = Table(
        f"Networks trained level by level, plane, T = {count}, {steps} steps per level, {seeds} seeds", columns, rows
    )
    share, excess = eps_by["ct", "restarted"]
    rate = min(RATES, key=lambda name: eps_by["ct", name][0])
    return TrainingResult(table, _panel(trained, members), share, excess, gap_in_errors(found, trained), rate)


def _panel(trained: Trained, members: list[Member]) -> Panel:
    levels = list(range(2, len(trained.stage_errors) + 2))
    curves = []
    for method, rate in dict.fromkeys((member.method, member.rate) for member in members):
        picks = [i for i, member in enumerate(members) if (member.method, member.rate) == (method, rate)]
        curves.append(
            Curve(f"{method.upper()}, {rate}", levels, [float(v) for v in trained.stage_errors[:, picks].mean(1)])
        )
    return Panel("Error of each trained level", "level t", "$E\\|f_t - f_t^*\\|$", curves, log_x=False)
