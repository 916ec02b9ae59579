"""From the settings of a recipe to its objective: every method is one composition with different parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cmtool.config.parts import DirectionPart, DistancePart, TargetPart
from cmtool.config.schema import RunConfig
from cmtool.diffusion.process import VarianceExploding
from cmtool.diffusion.solvers import build_solver
from cmtool.errors import ConfigError
from cmtool.losses.coupling import Pairs, build_coupling
from cmtool.losses.direction import Reference, build_direction, build_guidances
from cmtool.losses.distance import BUILDERS, Distance, in_details
from cmtool.losses.legs import build_middle, build_two_leg
from cmtool.losses.moments import moments
from cmtool.losses.objective import Objective, TargetRule
from cmtool.losses.perceptual import build_lpips
from cmtool.losses.score import ScoreObjective, build_rule
from cmtool.losses.tangent import build_average, build_limit, build_trig
from cmtool.losses.target import data, leap, pair
from cmtool.losses.weighting import build_weighting
from cmtool.models import Model
from cmtool.schedules.times import LevelDensity

RULES: dict[str, Callable[[TargetPart], TargetRule]] = {
    "pair": lambda part: pair,
    "data": lambda part: data,
    "leap": lambda part: leap,
    "tangent": build_limit,
    "trig_tangent": build_trig,
    "average_velocity": build_average,
    "two_leg": build_two_leg,
    "moments": lambda part: moments,
}
DISTANCES: dict[str, Callable[[DistancePart, int], Distance]] = {
    **BUILDERS,
    "lpips": lambda part, values: build_lpips(part),
}


def build_target(part: TargetPart) -> TargetRule:
    """Return the target rule that `part` names."""
    return RULES[part.rule](part)


def build_distance(part: DistancePart, values: int) -> Distance:
    """Return the distance that `part` names, for images of `values` = C * H * W numbers."""
    distance = DISTANCES[part.kind](part, values)
    return in_details(distance, part.details) if part.details else distance


def has_dropout(config: RunConfig) -> bool:
    """Whether the network drops anything out, so that passes must share a mask."""
    dropout = config.network.dropout
    return any(rate > 0 for rate in dropout) if isinstance(dropout, tuple) else dropout > 0


def direction_of(config: RunConfig) -> DirectionPart:
    """Return the direction of a run; the mean over all images with one condition is the image that has it."""
    part = config.recipe.direction
    own = config.data.condition is not None and part.kind == "posterior_mean"
    return part.model_copy(update={"kind": "sample"}) if own else part


@dataclass(frozen=True)
class Supplies:
    """What some parts need besides settings: a teacher, a weak model beside it, images, pairs, a measured law."""

    teacher: Model | None = None
    reference: Reference | None = None
    pairs: Pairs | None = None
    density: LevelDensity | None = None
    weak: Model | None = None


def build_objective(
    config: RunConfig,
    *,
    teacher: Model | None = None,
    reference: Reference | None = None,
    supplies: Supplies | None = None,
) -> Objective:
    """Put the parts of `config.recipe` together.

    A part that needs a teacher or reference images takes them from the arguments of that name, or from `supplies`.

    Raises:
        ConfigError: if a part needs something that is not there.
    """
    recipe, settings = config.recipe, config.process
    given = supplies or Supplies(teacher, reference)
    values = math.prod((config.data.channels, config.data.resolution, config.data.resolution))
    compose = _with_score(config, given.teacher) if recipe.score.kind != "none" else Objective
    return compose(
        process=VarianceExploding(settings.sigma_min, settings.sigma_max, settings.sigma_data),
        settings=settings,
        times=recipe.times,
        gap=recipe.gap,
        middle=build_middle(recipe, settings),
        guidances=build_guidances(config),
        coupling=build_coupling(recipe.coupling, given.pairs),
        direction=build_direction(direction_of(config), given.teacher, given.reference, given.weak, recipe.augment),
        solver=build_solver(recipe.direction.solver, recipe.direction.substeps, settings.rho),
        target=build_target(recipe.target),
        distance=build_distance(recipe.distance, values),
        weighting=build_weighting(recipe.weighting, settings, recipe.times),
        dropout=has_dropout(config),
        mix=recipe.coupling,
        density=given.density,
    )


def _with_score(config: RunConfig, teacher: Model | None) -> Callable[..., ScoreObjective]:
    """Return what composes an objective of score distillation."""
    if teacher is None:
        raise ConfigError("score distillation needs a teacher.", "add --teacher MODEL")
    score = config.recipe.score
    levels = score.levels or (config.process.sigma_max,)
    return partial(ScoreObjective, part=score, rule=build_rule(score), levels=levels, teacher_process=teacher.process)
