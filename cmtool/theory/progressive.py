"""Progressive distillation, exactly: its target is a *function* of x, so perfect rounds lose nothing.

Each round fits one student step to two teacher steps. With perfect fits the one-step student after log2 N rounds is
the N-step DDIM sampler itself, so W1_PD(N) = W1_CD(N) for any data, and 1 - prod cos(dtheta) for Gaussian data.
Imperfect fits: N - 1 of them enter (N/2 + N/4 + ... + 1), so independent relative errors of sd tau give the gain a
relative sd of tau sqrt(N - 1), where sequential training has tau sqrt(N) from its N levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import UserError
from cmtool.theory.levels import Levels
from cmtool.theory.line import LineMixture
from cmtool.theory.population import Map, Spline, at, ddim_step, level_grid

Array = NDArray[np.float64]


def teacher_steps(law: LineMixture, levels: Levels) -> list[Map]:
    """The T - 1 DDIM steps, the noisy end first."""
    return [_one_step(law, levels, index) for index in range(levels.count - 1, 0, -1)]


def _one_step(law: LineMixture, levels: Levels, index: int) -> Map:
    return lambda x: ddim_step(law, x, at(levels, index - 1), at(levels, index))


def halve(law: LineMixture, levels: Levels, steps: list[Map], starts: list[int], size: int) -> list[Map]:
    """One round: each pair of steps becomes one spline, fitted on the grid of the level the pair starts from."""
    students: list[Map] = []
    for first, second, start in zip(steps[::2], steps[1::2], starts[::2], strict=True):
        x = level_grid(law, *at(levels, start), size)
        students.append(Spline(x, second(first(x))))
    return students


def distill_progressively(law: LineMixture, levels: Levels, size: int = 4001) -> Map:
    """The one-step student after all rounds.

    Raises:
        UserError: when the number of steps, T - 1, is no power of two.
    """
    count = levels.count - 1
    if count < 1 or count & (count - 1):
        raise UserError(
            f"progressive distillation halves its steps; {count} steps (T = {levels.count}) cannot be halved"
            " down to one",
            "use T = 2^k + 1: 17, 33, 65",
        )
    steps, starts = teacher_steps(law, levels), list(range(count, 0, -1))
    while len(steps) > 1:
        steps, starts = halve(law, levels, steps, starts, size), starts[::2]
    return steps[0]


def relative_sd(fits: int, tau: float) -> float:
    """Relative sd of the gain after `fits` independent relative errors of sd tau, exact: sqrt((1 + tau^2)^fits - 1)."""
    return float(np.sqrt(np.expm1(fits * np.log1p(tau**2))))
