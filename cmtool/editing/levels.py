"""Noise levels for editing: the published grids and the tuned ones, from a model's header; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cmtool.config.judgments import preset_of_data
from cmtool.config.schema import EditConfig, EditLevels
from cmtool.errors import UserError
from cmtool.samplers.plan import SamplePlan, check_request
from cmtool.samplers.times import geometric_times, header_range, solver_times, times_from_indices, validate_times

FINER = 0.55
# Those with geometric levels; stroke editing has a list, the paper's unless tuned, and denoising that of the noise.
TUNED = ("inpaint", "colorize", "superres")
TASKS = (*TUNED, "stroke", "denoise")
# How the source of levels begins that come from a model's settings, and not from the user or the paper.
OF_SETTINGS = ("tuned", "usual")
# The data on which the levels that settings begin with were found; for any other they are a guess.
USUAL_FROM = "digits"


def edit_settings(header: Mapping[str, Any]) -> EditConfig:
    """Return the editing levels of a model: its header's, else those of the shipped preset of its data, else the usual.

    Raises:
        UserError: the header's are unusable.
    """
    written = header.get("edit")
    if written is None:
        return _of_preset(header)
    try:
        return EditConfig.model_validate(written)
    except ValidationError as error:
        raise UserError(f"the model's levels for editing are unusable: {error.errors()[0]['msg']}.") from None


def _of_preset(header: Mapping[str, Any]) -> EditConfig:
    """Levels of the shipped preset of a model's data, for models that were written without any; never fails."""
    try:
        return EditConfig.model_validate((preset_of_data(header) or {}).get("edit", {}))
    except ValidationError:
        return EditConfig()


def tuned_times(levels: EditLevels, steps: int, sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """The tuned levels of a task for `steps` evaluations, inside the model's range and strictly decreasing."""
    first = min(levels.first, sigma_max)
    last = min(max(levels.last * (levels.steps / steps) ** FINER, 1.01 * sigma_min), 0.9 * first)
    return geometric_times(steps, first, last)


def usual_help(header: Mapping[str, Any], task: str, plan: SamplePlan) -> tuple[float, int]:
    """Return (over-relaxation, candidates) that belong to a plan's tuned levels; the paper's algorithm has none."""
    if task not in TUNED or not plan.source.startswith(OF_SETTINGS):
        return 0.0, 1
    levels: EditLevels = getattr(edit_settings(header), task)
    return levels.guidance, levels.candidates


def class_times(header: Mapping[str, Any], task: str, plan: SamplePlan) -> tuple[float, ...]:
    """Return the levels at which the class of an edit is searched: the plan's own, unless tuned ones end lower.

    At low levels the known part is met with any class, so that evaluations spent there tell no class from another.
    """
    if task not in TUNED or not plan.source.startswith(OF_SETTINGS):
        return plan.times
    wanted = getattr(edit_settings(header), task).class_last
    if wanted is None or not plan.times[-1] < wanted < plan.times[0]:
        return plan.times
    return geometric_times(len(plan.times), plan.times[0], wanted)


def published_times(
    task: str, settings: EditConfig, sigma_min: float, sigma_max: float, rho: float
) -> tuple[float, ...]:
    """The paper's levels for a task: the whole Karras grid but its last point, or those of stroke editing.

    Song et al. 2023, Appendix D: 40 points for LSUN Bedroom-256; stroke editing at indices 16 and 20 of them.
    """
    if task == "stroke":
        return settings.paper_stroke
    return solver_times(settings.paper_points, sigma_min, sigma_max, rho)[:-1]


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
    settings = edit_settings(header)
    if times == "paper":
        levels = published_times(task, settings, sigma_min, sigma_max, rho)
        return SamplePlan("multistep", validate_times(levels, sigma_min, sigma_max), "the paper's")
    if isinstance(times, str):
        raise UserError(f"--times '{times}' is neither a list of noise levels nor 'paper'.")
    if times is not None:
        return SamplePlan("multistep", validate_times(times, sigma_min, sigma_max), "as given")
    if indices is not None and of is not None:
        chosen = times_from_indices(indices, of, sigma_min, sigma_max, rho)
        return SamplePlan("multistep", chosen, f"indices of a grid of {of}")
    if task == "stroke":
        return _stroke(settings, steps, sigma_min, sigma_max)
    tuned: EditLevels = getattr(settings, task)
    chosen = tuned_times(tuned, steps or tuned.steps, sigma_min, sigma_max)
    found = tuned != getattr(EditConfig(), task) or (header.get("data") or {}).get("source", USUAL_FROM) == USUAL_FROM
    return SamplePlan("multistep", chosen, f"tuned for {task}" if found else f"usual for {task}, not tuned")


def _stroke(settings: EditConfig, steps: int | None, sigma_min: float, sigma_max: float) -> SamplePlan:
    """The settings' levels, or `steps` levels from the first with the ratio of the first two."""
    levels = settings.stroke
    source = "the paper's" if levels == settings.paper_stroke else "tuned for stroke"
    if steps is None:
        return SamplePlan("multistep", validate_times(levels, sigma_min, sigma_max), source)
    ratio = levels[1] / levels[0] if len(levels) > 1 else 0.5
    made = tuple(levels[0] * ratio**index for index in range(steps))
    return SamplePlan("multistep", validate_times(made, sigma_min, sigma_max), f"the ratio of {source}")
