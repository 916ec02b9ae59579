"""From a recipe's settings to an objective: every method is this one expression with other parts."""

from __future__ import annotations

import math

from cmtool.config.schema import RunConfig
from cmtool.diffusion.process import VarianceExploding
from cmtool.diffusion.solvers import SOLVERS
from cmtool.losses.coupling import build_coupling
from cmtool.losses.direction import Reference, build_direction
from cmtool.losses.distance import build_distance
from cmtool.losses.objective import Objective
from cmtool.losses.target import build_target
from cmtool.losses.weighting import build_weighting
from cmtool.models import Model


def has_dropout(config: RunConfig) -> bool:
    """Whether the network drops anything out, so that passes must share a mask."""
    dropout = config.network.dropout
    return any(rate > 0 for rate in dropout) if isinstance(dropout, tuple) else dropout > 0


def build_objective(
    config: RunConfig, *, teacher: Model | None = None, reference: Reference | None = None
) -> Objective:
    """Put the parts of `config.recipe` together.

    `teacher` and `reference` are needed where the direction asks for them.

    Raises:
        ConfigError: if a part needs something that is not there.
    """
    recipe, settings = config.recipe, config.process
    values = math.prod((config.data.channels, config.data.resolution, config.data.resolution))
    return Objective(
        process=VarianceExploding(settings.sigma_min, settings.sigma_max, settings.sigma_data),
        settings=settings,
        times=recipe.times,
        gap=recipe.gap,
        coupling=build_coupling(recipe.coupling),
        direction=build_direction(recipe.direction, teacher, reference),
        solver=SOLVERS[recipe.direction.solver],
        target=build_target(recipe.target),
        distance=build_distance(recipe.distance, values),
        weighting=build_weighting(recipe.weighting, settings),
        dropout=has_dropout(config),
    )
