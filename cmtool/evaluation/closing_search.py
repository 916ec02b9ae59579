"""What training asks of evaluation: metrics at intervals, and the best sampling times at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from cmtool.config.schema import EvalConfig
from cmtool.data.dataset import Dataset
from cmtool.diffusion.grid import karras_grid
from cmtool.errors import UserError
from cmtool.evaluation.judge import Judge, check_size
from cmtool.evaluation.models import TimesScore, judge_model
from cmtool.evaluation.pretrained import has_imagenet
from cmtool.evaluation.references import held_out_reference, resolve_reference
from cmtool.evaluation.samples import image_shape
from cmtool.models import Model
from cmtool.samplers.plan import SEED_BLOCK, plan_sampling
from cmtool.samplers.time_search import Memo, Times, greedy_search

# Evaluation during training, and searches, use seeds of their own, far from those of `cmtool sample --seed N`.
SEARCH_SEED, FRESH_SEED = 1001 * SEED_BLOCK, 1002 * SEED_BLOCK
SHORT_COUNT, SHORT_GRID, SHORT_STEPS = 1500, 18, (2, 3, 4)
# A run on a user's own images spends at most 1 / SHARE of its training time on judging, and as much on its search,
# which compares about this many CANDIDATES.
SHARE, CANDIDATES = 5, 45
LEAST_COUNT, OWN_COUNT = 200, 250


@dataclass(frozen=True)
class RunJudge:
    """Judges the model of a run again and again: `judge(model)` returns its metrics, from the same seeds every time.

    `make` sets up the judge when it is first needed: the run's `own` held-out images are read only then.
    `slow`: its features take longer than the samples do. `quick`: they are those of the small network that comes along.
    """

    make: Callable[[], Judge]
    count: int
    metrics: tuple[str, ...]
    own: bool = False
    slow: bool = False
    quick: bool = False

    @classmethod
    def of(cls, config: EvalConfig, model: Model, data: Dataset | None = None) -> RunJudge:
        """Set up from the [eval] table of a preset, for models like this one.

        Args:
            config: names the reference; if it names none, the held-out images of `data` are it.
            model: one of those that will be judged.
            data: what the run is trained on.

        Raises:
            UserError: there is no reference, or it or its features are not here.
        """
        device, shape = str(model.device), image_shape(model.header)
        if config.reference is not None:
            known = resolve_reference(config.reference, shape)
            make = partial(Judge.of, known, shape, config.features, device=device)
            slow = (config.features or known.features) == "imagenet" and has_imagenet()
            judge = cls(make, config.count, config.metrics or ("fid", "pr"), slow=slow)
            check_size(shape, known)
            if not slow:
                judge.judge  # noqa: B018 (what is wrong with the reference is said before training)
            return judge
        if data is None or data.held_out is None:
            raise UserError("the preset names no reference to compare with.", "set eval.reference, e.g. to digits")
        reference = held_out_reference(data, data.info.path or data.info.source)
        make = partial(Judge.of, reference, shape, config.features, device=device)
        metrics = config.metrics or ("fid", "pr", "copies")
        quick = (config.features or reference.features) == "small"
        return cls(make, min(config.count, reference.count), metrics, own=True, slow=True, quick=quick)

    @cached_property
    def judge(self) -> Judge:
        """The judge, set up on first use."""
        return self.make()

    def __call__(self, model: Model, steps: int | None = None, count: int | None = None) -> dict[str, float]:
        """Return the metrics that apply, by key, of one-step samples (of a teacher's usual sampler).

        `steps` requests more evaluations per image, `count` another number of samples than the preset's.
        """
        plan = plan_sampling(model.header, steps=steps)
        seeds = range(SEARCH_SEED, SEARCH_SEED + (count or self.count))
        return judge_model(self.judge, model, plan, seeds, self.metrics).known

    def protocol(self) -> dict[str, Any]:
        """Return what has to be stated with the figures."""
        return self.judge.protocol(self.metrics)

    def is_worth(self, model: Model, images_seen: int) -> bool:
        """Whether to judge a finished model although nobody asked: if it takes at most a fifth of the training time."""
        return self.own and SHARE * self.count * plan_sampling(model.header).nfe <= images_seen

    def search_count(self, images_seen: int) -> int:
        """Return how many samples each candidate of a closing search takes; 0: there is no search.

        Small networks can be evaluated dozens of times. Held-out images are searched with any features, and others with
        `imagenet`, if the search is short compared with the training; with Inception there is none.
        """
        if not self.slow:
            small = self.judge.network.domain or self.judge.network.name in ("points", "small")
            return SHORT_COUNT if small else 0
        count = min(OWN_COUNT, images_seen // (SHARE * CANDIDATES))
        return count if count >= LEAST_COUNT else 0


def descending_grid(model: Model, points: int) -> tuple[float, ...]:
    """Return the Karras grid of a model's range from sigma_max down to sigma_min."""
    return tuple(reversed(karras_grid(points, model.sigma_min, model.sigma_max, model.rho)))


class _Late(Exception):
    """The time is up."""


def _score(model: Model, judge: Judge, seeds: range, late: Callable[[], bool]) -> Memo:
    """Return the distance of times on these seeds; it raises `_Late` instead of scoring another candidate."""
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
            # If one more step only hurts, the search puts it next to sigma_min, and no level is left below.
            if time.monotonic() - began > seconds or number < 2 or chain[-1] == levels[-2]:
                continue
            chain = greedy_search(memo, number, levels, chain).times
            options = [chain, *([tuple(times[str(number)])] if str(number) in times else [])]
            best = min(options, key=fresh)
            times[str(number)], figures[str(number)] = list(best), fresh(best)
    return {"times": times, "figures": {key: round(value, 4) for key, value in figures.items()}}
