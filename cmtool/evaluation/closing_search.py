"""What training asks of evaluation: metrics at intervals, and the best sampling times at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cmtool.config.schema import EvalConfig
from cmtool.diffusion.grid import karras_grid
from cmtool.errors import UserError
from cmtool.evaluation.judge import Judge
from cmtool.evaluation.models import TimesScore, judge_model
from cmtool.evaluation.samples import image_shape
from cmtool.models import Model
from cmtool.samplers.plan import SEED_BLOCK, plan_sampling
from cmtool.samplers.time_search import Memo, Times, greedy_search

# Evaluation during training and searches have seeds of their own, far from those of `cmtool sample --seed N`.
SEARCH_SEED, FRESH_SEED = 1001 * SEED_BLOCK, 1002 * SEED_BLOCK
SHORT_COUNT, SHORT_GRID, SHORT_STEPS = 1500, 18, (2, 3, 4)


@dataclass(frozen=True)
class RunJudge:
    """Judges the model of a run again and again: `judge(model)` returns its metrics, from the same seeds every time."""

    judge: Judge
    count: int
    metrics: tuple[str, ...]

    @classmethod
    def of(cls, config: EvalConfig, model: Model) -> RunJudge:
        """Set up from the [eval] table of a preset, for models like this one.

        Raises:
            UserError: the preset names no reference, or its reference or features are not here.
        """
        if config.reference is None:
            raise UserError("the preset names no reference to compare with.", "set eval.reference, e.g. to digits")
        judge = Judge.of(config.reference, image_shape(model.header), config.features, device=str(model.device))
        return cls(judge, config.count, config.metrics or ("fid", "pr"))

    def __call__(self, model: Model, steps: int | None = None, count: int | None = None) -> dict[str, float]:
        """Return the metrics that apply, by key, of one-step samples (of a teacher's usual sampler).

        `steps` requests more evaluations per image, `count` another number of samples than the preset's.
        """
        plan = plan_sampling(model.header, steps=steps)
        seeds = range(SEARCH_SEED, SEARCH_SEED + (count or self.count))
        return judge_model(self.judge, model, plan, seeds, self.metrics).known

    @property
    def is_cheap(self) -> bool:
        """Whether a search can end a run: small networks can be asked dozens of times, Inception cannot."""
        return self.judge.network.domain or self.judge.network.name == "points"


def descending_grid(model: Model, points: int) -> tuple[float, ...]:
    """Return the Karras grid of a model's range from sigma_max down to sigma_min."""
    return tuple(reversed(karras_grid(points, model.sigma_min, model.sigma_max, model.rho)))


class _Late(Exception):
    """The time is up."""


def _score(model: Model, judge: Judge, seeds: range, late: Callable[[], bool]) -> Memo:
    """Return the distance of times on these seeds; it raises `_Late` instead of looking at another candidate."""
    score = TimesScore(model, judge, seeds)

    def in_time(times: Times) -> float:
        if late():
            raise _Late
        return score(times)

    return Memo(in_time)


def short_search(
    model: Model,
    judge: Judge,
    steps: Sequence[int] = SHORT_STEPS,
    count: int = SHORT_COUNT,
    points: int = SHORT_GRID,
    seconds: float = 60.0,
    late: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Find times for a few steps by one greedy search, and judge them against those in the header on fresh seeds.

    Args:
        model: a trained consistency model.
        judge: what to compare with.
        steps: numbers of evaluations to find times for.
        count: samples for each candidate.
        points: points of the grid.
        seconds: after this long no new number of steps is begun.
        late: asked before every candidate; once it says yes, the search ends with what it has.

    Returns:
        {"times": {"1": [...], "2": [...], ...}, "figures": {"2": distance, ...}} for the model's header.
    """
    began = time.monotonic()
    memo = _score(model, judge, range(SEARCH_SEED, SEARCH_SEED + count), late)
    # The final comparison has twice the samples: a distance of a thousand varies more than good times differ.
    fresh = _score(model, judge, range(FRESH_SEED, FRESH_SEED + 2 * count), late)
    levels = descending_grid(model, points)
    chain: Times = (levels[0],)
    times = dict(model.header.get("times") or {}) | {"1": [levels[0]]}
    figures: dict[str, float] = {}
    with contextlib.suppress(_Late):
        figures["1"] = fresh(chain)
        for number in sorted(steps):
            # Where a further step only hurts, the search puts it next to sigma_min, and no level is left below.
            if time.monotonic() - began > seconds or number < 2 or chain[-1] == levels[-2]:
                continue
            chain = greedy_search(memo, number, levels, chain).times
            options = [chain, *([tuple(times[str(number)])] if str(number) in times else [])]
            best = min(options, key=fresh)
            times[str(number)], figures[str(number)] = list(best), fresh(best)
    return {"times": times, "figures": {key: round(value, 4) for key, value in figures.items()}}
