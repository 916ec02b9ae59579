"""Noise levels for editing: the published grids and the tuned ones, as data; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmtool.errors import UserError
from cmtool.samplers.plan import SamplePlan, check_request
from cmtool.samplers.times import geometric_times, header_range, solver_times, times_from_indices, validate_times


@dataclass(frozen=True)
class TaskTimes:
    """How a task spends its evaluations: geometric noise levels from `first` to `last` for `steps` evaluations.

    For another number K the last level is last * (steps / K)^.55: more evaluations can go on to finer levels, and the
    first, which must drown what the start got wrong, stays. `guidance` is the over-relaxation found with them.
    """

    steps: int
    first: float
    last: float
    guidance: float


# Levels from benchmarks/editing_times.py (Gaussian images, where the exact posterior is known), then moved to what
# benchmarks/editing_quality.py prefers on held-out digits: a trained model is over-confident at the finest levels, and
# bears less over-relaxation than an exact one.
TUNED: dict[str, TaskTimes] = {
    "inpaint": TaskTimes(20, 1.2, 0.2, 0.8),
    # Colors have many modes: a first level below 20 stays near the gray picture it starts from.
    "colorize": TaskTimes(20, 20.0, 0.15, 0.6),
    "superres": TaskTimes(20, 0.9, 0.2, 0.4),
}
FINER = 0.55
# Song et al. 2023, Appendix D: 40 points of the Karras grid for LSUN Bedroom-256, of which the last is the identity;
# the CIFAR-10 notebook uses the 18 points it was distilled with. Stroke editing: indices 16 and 20 of 40.
PUBLISHED_POINTS = {"cifar10": 18}
PUBLISHED_STROKE = (5.38, 2.24)
TASKS = ("inpaint", "colorize", "superres", "stroke", "denoise")


def tuned_times(task: str, steps: int, sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """The tuned levels of a task for `steps` evaluations, inside the model's range and strictly decreasing."""
    rule = TUNED[task]
    first = min(rule.first, sigma_max)
    last = min(max(rule.last * (rule.steps / steps) ** FINER, 1.01 * sigma_min), 0.9 * first)
    return geometric_times(steps, first, last)


def published_times(task: str, preset: str | None, sigma_min: float, sigma_max: float, rho: float) -> tuple[float, ...]:
    """The paper's levels for a task: the whole Karras grid but its last point, or the two of stroke editing."""
    if task == "stroke":
        return PUBLISHED_STROKE
    return solver_times(PUBLISHED_POINTS.get(preset or "", 40), sigma_min, sigma_max, rho)[:-1]


def plan_edit(
    header: Mapping[str, Any],
    task: str,
    *,
    steps: int | None = None,
    times: Sequence[float] | str | None = None,
    indices: Sequence[int] | None = None,
    of: int | None = None,
) -> SamplePlan:
    """Decide the noise levels of an edit; `times` may be "paper" for the published grid.

    Raises:
        UserError: for contradictory or unusable requests.
    """
    check_request(steps, None if times is None else (0.0,), indices, of)
    sigma_min, sigma_max, rho = header_range(header)
    if times == "paper":
        levels = published_times(task, header.get("preset"), sigma_min, sigma_max, rho)
        return SamplePlan("multistep", validate_times(levels, sigma_min, sigma_max), "the paper's")
    if isinstance(times, str):
        raise UserError(f"--times '{times}' is neither a list of noise levels nor 'paper'.")
    if times is not None:
        return SamplePlan("multistep", validate_times(times, sigma_min, sigma_max), "as given")
    if indices is not None and of is not None:
        chosen = times_from_indices(indices, of, sigma_min, sigma_max, rho)
        return SamplePlan("multistep", chosen, f"indices of a grid of {of}")
    if task == "stroke":
        return _stroke(steps, sigma_min, sigma_max)
    count = steps or TUNED[task].steps
    return SamplePlan("multistep", tuned_times(task, count, sigma_min, sigma_max), f"tuned for {task}")


def _stroke(steps: int | None, sigma_min: float, sigma_max: float) -> SamplePlan:
    """The paper's two levels, or `steps` levels from the first with their ratio."""
    first, second = PUBLISHED_STROKE
    levels = tuple(first * (second / first) ** index for index in range(steps or 2))
    return SamplePlan(
        "multistep", validate_times(levels, sigma_min, sigma_max), "the paper's" if not steps else "the paper's ratio"
    )
