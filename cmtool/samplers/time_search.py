"""Where to evaluate: the search for the noise levels of multistep sampling (Song et al. 2023, Section 3).

Everything here works on a score of times (lower is better) and does not depend on models. The paper's search is greedy:
it keeps the earlier times and finds the next by ternary search over the indices of a grid, assuming that the score has
a single valley. The joint search starts there and moves all times together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cmtool.errors import UsageError

Times = tuple[float, ...]
Score = Callable[[Times], float]
Report = Callable[[Times, float], None]


@dataclass(frozen=True)
class SearchResult:
    """The times found, their score, how they were found, and every (times, score) evaluated, in order."""

    times: Times
    value: float
    method: str
    trace: tuple[tuple[Times, float], ...] = ()


@dataclass
class Memo:
    """A score that is evaluated once for each set of times; `trace` keeps the evaluations in order."""

    score: Score
    report: Report = lambda times, value: None
    known: dict[Times, float] = field(default_factory=dict)

    def __call__(self, times: Times) -> float:
        """Return the score of `times`, evaluating it the first time only."""
        if times not in self.known:
            self.known[times] = self.score(times)
            self.report(times, self.known[times])
        return self.known[times]

    @property
    def trace(self) -> tuple[tuple[Times, float], ...]:
        """Everything evaluated so far."""
        return tuple(self.known.items())


def ternary_search(score: Callable[[int], float], left: int, right: int) -> int:
    """Return the index strictly between `left` and `right` with the lowest score, if the score has a single valley.

    A bracket of three or more is cut to two thirds by comparing its inner points. What remains is compared point by
    point, including the ends of the bracket unless they are the ones it started with.

    Raises:
        UsageError: if there is no index between the two.
    """
    if right - left < 2:
        raise UsageError("the grid has no point left between the times already chosen.", "use a finer grid: --grid 40")
    low, high = left, right
    while high - low >= 3:
        third = (high - low) / 3
        first, second = int(low + third), int(high - third)
        if score(first) < score(second):
            high = second
        else:
            low = first
    return min((index for index in range(low, high + 1) if left < index < right), key=score)


def greedy_search(score: Memo, steps: int, levels: Sequence[float], start: Times | None = None) -> SearchResult:
    """Find `steps` times one after another, each below the last, by ternary search on a descending grid.

    Args:
        score: lower is better.
        steps: number of times; the first is levels[0] and is not searched.
        levels: descending grid, sigma_max first and sigma_min last.
        start: times already chosen, from the grid.

    Raises:
        UsageError: for fewer than one step, or a grid too coarse for that many.
    """
    if steps < 1:
        raise UsageError(f"--steps {steps} is no evaluation; use at least 1.")
    times = start or (levels[0],)
    while len(times) < steps:
        fixed = times
        left = levels.index(fixed[-1])
        best = ternary_search(lambda i, fixed=fixed: score((*fixed, levels[i])), left, len(levels) - 1)  # type: ignore[misc]
        times = (*times, levels[best])
    return SearchResult(times, score(times), "greedy", score.trace)


def joint_search(score: Memo, start: Times, levels: Sequence[float]) -> SearchResult:
    """Improve `start` by moving one time after another along the grid, halving the steps when nothing helps.

    The first time stays where it is. Times off the grid are first moved to its nearest point. The result never scores
    worse than `start`.
    """
    places = [min(range(len(levels)), key=lambda i, t=time: abs(levels[i] - t)) for time in start]  # type: ignore[misc]
    best, value = start, score(start)
    stride = max(1, len(levels) // 8)
    while stride:
        moved = False
        for position in range(1, len(places)):
            for shift in (-stride, stride):
                trial = [*places[:position], places[position] + shift, *places[position + 1 :]]
                times = _times(trial, levels)
                if times is not None and score(times) < value:
                    places, best, value, moved = trial, times, score(times), True
        stride = stride if moved else stride // 2
    return SearchResult(best, value, "joint", score.trace)


def _times(places: Sequence[int], levels: Sequence[float]) -> Times | None:
    """Return the levels at these places, None where they do not descend or touch the clean end."""
    inside = all(0 <= place < len(levels) - 1 for place in places)
    descending = all(a < b for a, b in pairwise(places))
    return tuple(levels[place] for place in places) if inside and descending else None


def search_times(
    score: Score,
    steps: int,
    levels: Sequence[float],
    *,
    joint: bool = True,
    fresh: Score | None = None,
    candidates: Sequence[Times] = (),
    report: Report = lambda times, value: None,
) -> SearchResult:
    """Search greedily, then jointly from that answer; the winner is chosen on `fresh` seeds.

    Args:
        score: lower is better, with seeds of its own.
        steps: number of evaluations.
        levels: descending grid from sigma_max to sigma_min.
        joint: False stops after the greedy search.
        fresh: the same score with seeds that the search has not seen. It decides between the candidates, because a
            search on one set of seeds also fits their accidents. None: `score` decides.
        candidates: further times to be judged with those found (published or present ones).
        report: told every evaluation.
    """
    memo = Memo(score, report)
    found = [greedy_search(memo, steps, levels)]
    if joint and steps > 1:
        found.append(joint_search(memo, found[0].times, levels))
    found += [SearchResult(tuple(times), memo(tuple(times)), "given") for times in candidates if len(times) == steps]
    judge = Memo(fresh) if fresh is not None else memo
    best = min(found, key=lambda result: judge(result.times))
    return SearchResult(best.times, judge(best.times), best.method, memo.trace)
