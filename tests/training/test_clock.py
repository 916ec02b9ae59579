"""Runs of a given time: how steps follow the clock, schedules the steps, and a resumed run the decisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmtool.checkpoint import read_header
from cmtool.config.load import resolve
from cmtool.errors import ConfigError
from cmtool.machine.stopping import Stop
from cmtool.schedules.curriculum import rate_at
from cmtool.training.clock import Clock, Course, Timekeeper, timekeeper_of
from cmtool.training.run_folder import RunFolder
from cmtool.training.session import Session
from tests.training.tiny import Heard, config_of, run, trainer_of


@pytest.mark.parametrize(("quick", "closing"), [(False, 48.0), (True, 12.0)])
def test_time_is_kept_free_for_the_search_and_the_judgment_by_what_they_take(quick, closing):
    """A step a second: of 300 s the search and the judgment get 16 %, with the small network a quarter of that."""
    hand = Hand()
    config = config_of("ict", **{"train.time": 300.0})
    keeper = timekeeper_of(config, Clock(0.0, hand), None, searches=True, judged=True, quick=quick)
    ends = []
    for step in range(1, 100):
        hand.seconds += 1
        ends.append(keeper.look(step, 1000))
    last = [end for end in ends if end is not None][-1]
    assert last == pytest.approx(300 - closing, abs=12)


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def test_a_course_without_decisions_is_the_plain_count():
    for steps in (1, 7, 3500, 99_991):
        course = Course(steps)
        assert course.end == steps
        assert [course.at(k) for k in range(min(steps, 200))] == list(range(min(steps, 200)))
        assert course.at(steps - 1) == steps - 1


def test_a_course_spans_all_schedules_whatever_was_decided():
    """Known answers: half way at the old pace, then twice as fast or half as fast; it never goes back."""
    course = Course(100, [(50, 75)])
    assert [course.at(k) for k in (49, 50, 51, 74)] == [49, 50, 52, 98]
    course = Course(100, [(50, 150)])
    assert [course.at(k) for k in (50, 52, 54, 149)] == [50, 51, 52, 99]
    course = Course(1000, [(10, 400), (200, 5000), (300, 310), (310, 400)])
    places = [course.at(k) for k in range(400)]
    assert places == sorted(places) and places[0] == 0 and places[309] > 900 and places[-1] == 999


def simulate(seconds_of_step, until=600.0, steps=100, pause=0.0, every=1, closing_steps=0.0):
    """Walk through a run whose steps take `seconds_of_step(spent)`; return the seconds at its end and its course."""
    hand, step = Hand(), 0
    course, keeper = Course(steps), Timekeeper(Clock(0.0, hand), until, closing_steps=closing_steps)
    while step < course.end:
        hand.seconds += seconds_of_step(hand.seconds)
        step += 1
        if pause and step % 50 == 0:
            hand.seconds += pause
            keeper.paused(pause)
        if step % every == 0 or step == course.end:
            end = keeper.look(step, course.end)
            if end is not None:
                course.decide(step, end)
    return hand.seconds, course


@pytest.mark.parametrize("steps", [20, 600, 20_000])
def test_a_run_ends_in_time_however_wrong_the_planned_steps_were(steps):
    spent, course = simulate(lambda now: 1.0, steps=steps)
    assert spent == pytest.approx(600, rel=0.03)
    assert len(course.decisions) < 40


def test_a_run_slowed_down_half_way_ends_in_time():
    for factor in (2.0, 4.0):
        spent, _ = simulate(lambda now, factor=factor: 0.1 if now < 300 else 0.1 * factor, steps=6000, every=10)
        assert spent == pytest.approx(600, rel=0.05)
    spent, _ = simulate(lambda now: 0.1 if now < 300 else 0.05, steps=6000, every=10)
    assert spent == pytest.approx(600, rel=0.05)


def test_a_slow_first_step_does_not_end_the_run():
    spent, course = simulate(lambda now: 0.1 if now else 200.0, steps=6000)
    assert spent == pytest.approx(600, rel=0.02) and course.end == pytest.approx(4000, rel=0.02)


def test_pauses_and_what_follows_the_last_step_are_allowed_for():
    spent, _ = simulate(lambda now: 0.2, steps=3000, pause=5.0, closing_steps=100)
    assert spent == pytest.approx(600 - 20, rel=0.05)


def test_time_spent_before_counts_once():
    """A stage counts what the stages before it had spent, so the largest number is that of all."""
    hand = Hand()
    clock = Clock(0.0, hand)
    hand.seconds = 5.0
    assert clock.spent == 5
    clock.go_on(100.0)
    clock.go_on(300.0)
    clock.go_on(300.0)
    assert clock.spent == 305


STEP_SECONDS = 0.4
SETS = ("train.time=60", "train.log_every=5", "train.checkpoint_every=1000", "train.sample_every=1000",
        "train.decay=linear", "train.warmup=0.1")  # fmt: skip


def clocked(path: Path, speed, until=12.0, steps=20):
    """Return a session whose steps take `speed(spent)` seconds of a clock that nothing else moves."""
    config = config_of("ict", *SETS, steps=steps, batch=2)
    path.mkdir(parents=True, exist_ok=True)
    hand = Hand()
    trainer = trainer_of(config)
    plain = trainer.step

    def step():
        hand.seconds += speed(session.timekeeper.clock.spent)
        plain()

    trainer.step = step
    session = Session(trainer, RunFolder(path), Heard(), timekeeper=Timekeeper(Clock(0.0, hand), until))
    return session, hand


def test_a_resumed_run_ends_with_the_bytes_of_one_whose_clock_decided_the_same(tmp_path):
    """Slower half way, killed and resumed on a faster machine; then once more in one go with the decisions of both."""
    session, _ = clocked(tmp_path / "cut", lambda spent: STEP_SECONDS if spent < 7 else 3 * STEP_SECONDS)
    stop = Stop()
    session.listener.report = lambda report: setattr(stop, "signal", 15 if report.step >= 18 else 0)
    assert run(session, stop).model is None
    spent = read_header(session.folder.checkpoint(session.state.step))["clock"]["spent"]
    assert 8 < spent < 12
    again, _ = clocked(tmp_path / "cut", lambda spent: STEP_SECONDS / 2)
    assert run(again).model is not None
    assert again.timekeeper.clock.spent == pytest.approx(12, rel=0.05)
    decided = read_header(again.folder.model)["decisions"]
    assert len(decided) >= 4 and decided == [list(pair) for pair in again.state.course.decisions]
    log = (tmp_path / "cut" / "run.log").read_text()
    assert "to be done in time" in log and "stopped by signal 15" in log

    whole, _ = clocked(tmp_path / "whole", lambda spent: 1.0)
    script = dict(decided)
    whole.timekeeper.look = lambda step, end: script.get(step)
    run(whole)
    assert whole.folder.model.read_bytes() == again.folder.model.read_bytes()
    # The rate has come down whatever the number of steps.
    config = whole.config
    assert rate_at(config, whole.state.course.at(whole.state.step - 1)) < 0.15 * config.train.lr


def test_a_plain_run_keeps_nothing_of_a_clock(tmp_path):
    config = config_of("ict", "train.checkpoint_every=2", steps=4)
    session = Session(trainer_of(config), RunFolder(tmp_path), Heard())
    run(session)
    assert "clock" not in read_header(session.folder.checkpoint(4))
    assert "decisions" not in read_header(session.folder.model)


def test_a_recipe_of_fixed_stages_takes_no_time():
    with pytest.raises(ConfigError, match="starts over at fixed steps"):
        resolve("digits", recipe="pd", flags={"train.time": 60.0})
