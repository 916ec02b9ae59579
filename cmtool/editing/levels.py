"""Noise levels for editing: the published grids and the tuned ones, from a model's header; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cmtool.config.judgments import preset_of_data
from cmtool.config.schema import EditConfig, EditLevels
from cmtool.editing.tasks import TASKS
from cmtool.errors import UserError
from cmtool.samplers.plan import check_request
from cmtool.samplers.times import geometric_times, header_range, solver_times, times_from_indices, validate_times

FINER = 0.55
# The data on which the levels that settings begin with were found; for any other they are a guess.
USUAL_FROM = "digits"


@dataclass(frozen=True)
class EditPlan:
    """The noise levels of an edit, and what was found with them.

    Attributes:
        times: of the evaluations, strictly decreasing.
        source: in words, where they come from.
        guidance: over-relaxation of the known part; the paper's algorithm has none.
        fresh: share of new noise between the evaluations; 1 is the paper's.
        candidates: edits of which the most consistent is a variation.
        class_times: the levels at which the class is searched. They may end above `times`: low levels meet the known
            part with any class, so that evaluations spent there tell no class from another.
    """

    times: tuple[float, ...]
    source: str
    guidance: float = 0.0
    fresh: float = 1.0
    candidates: int = 1
    class_times: tuple[float, ...] = ()

    @property
    def nfe(self) -> int:
        """Network evaluations of a variation."""
        return len(self.times) * self.candidates


def edit_settings(header: Mapping[str, Any]) -> EditConfig:
    """Return the editing levels of a model: its header's, else those of the shipped preset of its data, else the usual.

    Raises:
        UserError: the header's are unusable.
    """
    written = header.get("edit")
    if written is None:
        return _of_preset(header)
    try:
        given = EditConfig.model_validate(written)
    except ValidationError as error:
        raise UserError(f"the model's levels for editing are unusable: {error.errors()[0]['msg']}.") from None
    # A model of before there was an edit, or before its levels were found for such pictures, knows none of its own.
    later, usual = _of_preset(header), EditConfig()
    unknown = (n for n in EditConfig.model_fields if n not in written or getattr(given, n) == getattr(usual, n))
    return given.model_copy(update={name: getattr(later, name) for name in unknown})


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


def published_times(
    task: str, settings: EditConfig, sigma_min: float, sigma_max: float, rho: float
) -> tuple[float, ...]:
    """The paper's levels for a task: the whole Karras grid but its last point, or those of stroke editing.

    Song et al. 2023, Appendix D: 40 points for LSUN Bedroom-256; stroke editing at indices 16 and 20 of them.
    """
    if TASKS[task].levels == "list":
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
    sigma: float | None = None,
) -> EditPlan:
    """Decide the noise levels of an edit.

    At most one of `steps`, `times` ("paper": the published grid) and `indices` with `of` is given; with none, the
    levels are the tuned ones. An edit that removes noise takes `sigma`, the noise's own level, and none of them.

    Raises:
        UserError: for contradictory or unusable requests.
    """
    sigma_min, sigma_max, rho = header_range(header)
    if TASKS[task].levels == "noise":
        return _of_noise(sigma or 0.0, sigma_min, sigma_max)
    check_request(steps, None if times is None else (0.0,), indices, of)
    settings = edit_settings(header)
    if isinstance(times, str) and times != "paper":
        raise UserError(f"--times '{times}' is neither a list of noise levels nor 'paper'.")
    if times is not None:
        published = times == "paper"
        levels = published_times(task, settings, sigma_min, sigma_max, rho) if published else _numbers(times)
        return _plan(validate_times(levels, sigma_min, sigma_max), "the paper's" if published else "as given")
    if indices is not None and of is not None:
        return _plan(times_from_indices(indices, of, sigma_min, sigma_max, rho), f"indices of a grid of {of}")
    if TASKS[task].levels == "list":
        return _list(settings, steps, sigma_min, sigma_max)
    return _tuned(header, settings, task, steps, sigma_min, sigma_max)


def _numbers(times: Sequence[float] | str) -> tuple[float, ...]:
    return tuple(float(level) for level in times)


def _plan(times: tuple[float, ...], source: str) -> EditPlan:
    return EditPlan(times, source, class_times=times)


def _of_noise(sigma: float, sigma_min: float, sigma_max: float) -> EditPlan:
    if not sigma_min <= sigma <= sigma_max:
        raise UserError(
            f"--sigma {sigma:g} is outside the model's range [{sigma_min:g}, {sigma_max:g}].",
            "it is the noise's standard deviation on the scale of [-1, 1]: 0.3 is 38 of 255 levels",
        )
    return _plan((sigma,), "the noise's own level")


def _tuned(
    header: Mapping[str, Any],
    settings: EditConfig,
    task: str,
    steps: int | None,
    sigma_min: float,
    sigma_max: float,
) -> EditPlan:
    """The levels of the settings, and the help that was found with them."""
    name = TASKS[task].setting
    tuned: EditLevels = getattr(settings, name)
    times = tuned_times(tuned, steps or tuned.steps, sigma_min, sigma_max)
    found = tuned != getattr(EditConfig(), name) or (header.get("data") or {}).get("source", USUAL_FROM) == USUAL_FROM
    last = tuned.class_last
    search = times if last is None or not times[-1] < last < times[0] else geometric_times(len(times), times[0], last)
    source = f"tuned for {name}" if found else f"usual for {name}, not tuned"
    return EditPlan(times, source, tuned.guidance, tuned.fresh, tuned.candidates, search)


def _list(settings: EditConfig, steps: int | None, sigma_min: float, sigma_max: float) -> EditPlan:
    """The settings' list of levels, or `steps` levels from the first with the ratio of the first two."""
    levels = settings.stroke
    source = "the paper's" if levels == settings.paper_stroke else "tuned for stroke"
    if steps is None:
        return _plan(validate_times(levels, sigma_min, sigma_max), source)
    ratio = levels[1] / levels[0] if len(levels) > 1 else 0.5
    made = tuple(levels[0] * ratio**index for index in range(steps))
    return _plan(validate_times(made, sigma_min, sigma_max), f"the ratio of {source}")
