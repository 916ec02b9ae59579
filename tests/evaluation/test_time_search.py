"""The search for sampling times: a published trace, its last brackets, and the joint search."""

import pytest

from cmtool.errors import UsageError
from cmtool.samplers.time_search import Memo, greedy_search, joint_search, search_times, ternary_search

# FID of CIFAR-10 consistency distillation by index of the second time, from the authors' notebook.
PUBLISHED = {5: 3.6492, 11: 2.9280, 9: 3.3185, 13: 3.2767, 14: 3.4601, 10: 3.0507, 12: 3.0490}


def test_published_trace():
    asked = []

    def score(index):
        asked.append(index)
        return PUBLISHED[index]

    assert ternary_search(score, 0, 17) == 11
    assert list(dict.fromkeys(asked)) == [5, 11, 9, 13, 14, 10, 12]


@pytest.mark.parametrize("right", range(2, 42))
def test_finds_every_valley_on_every_grid(right):
    for best in range(1, right):
        assert ternary_search(lambda i, best=best: abs(i - best) + 0.01 * i, 0, right) == best


def test_no_room_is_refused():
    with pytest.raises(UsageError, match="no point left"):
        ternary_search(lambda i: 0.0, 3, 4)


def test_greedy_fixes_the_first_times_and_never_asks_twice():
    levels, asked = tuple(float(x) for x in range(20, -1, -1)), []

    def score(times):
        asked.append(times)
        return sum((t - goal) ** 2 for t, goal in zip(times[1:], (13, 6), strict=False)) + (0 if len(times) == 3 else 1)

    result = greedy_search(Memo(score), 3, levels)
    assert result.times == (20, 13, 6)
    assert len(asked) == len(set(asked)) == len(result.trace)
    assert all(times[0] == 20 for times in asked)


def test_joint_finds_what_greedy_cannot():
    levels = tuple(float(x) for x in range(40, -1, -1))

    def score(times):
        # Alone the second time is best at 20, with a third at 10 it is best at 30.
        if len(times) < 3:
            return abs(times[-1] - 20) if len(times) == 2 else 100.0
        return abs(times[1] - 30) + abs(times[2] - 10)

    memo = Memo(score)
    greedy = greedy_search(memo, 3, levels)
    assert greedy.times[1] == 20
    joint = joint_search(memo, greedy.times, levels)
    assert joint.times == (40, 30, 10)
    assert joint.value == 0


def test_fresh_seeds_decide():
    levels = tuple(float(x) for x in range(20, -1, -1))

    def score(times):
        return 100.0 if len(times) == 1 else abs(times[1] - 5)

    def fresh(times):
        return abs(times[1] - 12)

    assert search_times(score, 2, levels).times == (20, 5)
    chosen = search_times(score, 2, levels, fresh=fresh, candidates=[(20.0, 11.0), (20.0, 11.0, 3.0)])
    assert chosen.times == (20, 11)
    assert chosen.method == "given"
    assert chosen.value == 1


def test_one_step_needs_no_search_and_too_coarse_a_grid_is_refused():
    assert search_times(lambda times: 1.0, 1, (80.0, 1.0, 0.1)).times == (80.0,)
    with pytest.raises(UsageError):
        greedy_search(Memo(lambda times: 1.0), 4, (80.0, 1.0, 0.1))
    with pytest.raises(UsageError, match="at least 1"):
        greedy_search(Memo(lambda times: 1.0), 0, (80.0, 1.0))
