"""Signals and the time limit: when they are heeded, what is left at once, and that nothing that is owed gets lost."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from cmtool.checkpoint import read_header
from cmtool.errors import Terminated
from cmtool.machine import stopping
from cmtool.machine.stopping import Stop, stoppable
from cmtool.training.posthoc import FOLDER
from cmtool.training.run_folder import RunFolder
from cmtool.training.session import Session
from tests.conftest import heeded_signals
from tests.training.tiny import config_of, run, session_of, train


@pytest.fixture(autouse=True)
def heeded():
    with heeded_signals():
        yield


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


# --- the handlers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_one_wish_may_arrive_twice(number):
    before = signal.getsignal(number)
    with stoppable() as stop:
        assert not stop.now
        send(number)
        send(signal.SIGTERM)  # `timeout` and batch systems signal a process and then its group
        assert stop.now and stop.signal == number and not stop.out_of_time
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "raises"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_second_wish_ends_at_once(monkeypatch, number, raises):
    monkeypatch.setattr(stopping, "_SAME_WISH", 0.0)
    with stoppable():
        send()
        with pytest.raises(raises):
            send(number)


def test_what_the_caller_ignores_stays_ignored():
    """nohup ignores SIGHUP, a shell without job control SIGINT for what it starts in the background."""
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)]
    try:
        with stoppable() as stop:
            send(signal.SIGINT)
            send(signal.SIGHUP)
            assert not stop.now
            send(signal.SIGTERM)
            assert stop.now
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def test_outside_the_main_thread_only_the_time_limit_works():
    seen = []

    def body():
        with stoppable(0.0) as stop:
            seen.append(stop.now)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]


def test_work_that_loses_nothing_is_left_at_once():
    with stoppable() as stop:
        began = time.monotonic()

        def work():
            send()
            time.sleep(30)

        assert stop.unless_stopped(work) is None and stop.signal == signal.SIGTERM
        assert stop.unless_stopped(lambda: 1) is None
        assert time.monotonic() - began < 5


def test_undisturbed_work_answers_and_its_errors_pass():
    with stoppable() as stop:
        assert stop.unless_stopped(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            stop.unless_stopped(lambda: 1 // 0)
        send()  # outside such work a signal only asks
        assert stop.signal == signal.SIGTERM


# --- a run ---------------------------------------------------------------------------------------------------------


def closed(path, closing, stop=None, steps=4):
    """Run a session with this closing in the folder `path`."""
    session, heard = session_of(config_of("ict-pm", steps=steps), path)
    session.closing = closing
    if stop is not None:
        return run(session, stop), heard
    with stoppable() as real:
        return run(session, real), heard


def finds(model, late):
    return {"times": {"1": [80.0], "2": [80.0, 1.5]}}


def test_a_signal_in_the_closing_search_saves_and_the_next_run_ends_the_same(tmp_path):
    def interrupted(model, late):
        send()
        time.sleep(30)
        raise AssertionError("it went on for ten seconds and more")

    outcome, _ = closed(tmp_path / "cut", interrupted)
    assert (outcome.model, outcome.step, outcome.signal) == (None, 4, signal.SIGTERM)
    assert not RunFolder(tmp_path / "cut").finished()
    assert closed(tmp_path / "cut", finds)[0].model is not None
    closed(tmp_path / "whole", finds)
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_the_time_limit_cuts_the_closing_search_short_and_the_run_ends(tmp_path):
    asked = []

    def slow(model, late):
        stop.deadline = time.monotonic()
        asked.append(late())
        return finds(model, late)

    stop = Stop(deadline=time.monotonic() + 600)
    outcome, heard = closed(tmp_path / "run", slow, stop)
    assert asked == [True] and outcome.model is not None
    assert any("cut the search" in warning for warning in heard.warnings)


def test_stopped_before_its_first_step_a_run_does_nothing_twice(tmp_path):
    config = config_of("edm", "train.eval_every=4", "train.checkpoint_every=4", "train.sample_every=4", steps=9)
    for turn in range(3):
        session, heard = session_of(config, tmp_path / "run")
        session.judge = lambda model: {"fid": 5.0}
        stop = Stop(deadline=0.0 if turn != 1 else None)
        if turn == 1:
            heard.evaluated = lambda step, figures, stop=stop: setattr(stop, "signal", signal.SIGTERM)
        assert run(session, stop).step == (0, 4, 4)[turn]
        assert (tmp_path / "run/samples").exists() == (turn > 0)
    assert [row["step"] for row in session.folder.rows() if "eval" in row] == [4]


@pytest.mark.parametrize("steps", [4, 9])
def test_a_signal_while_samples_are_drawn_leaves_at_once_and_they_are_drawn_later(tmp_path, monkeypatch, steps):
    """In the middle of a run and at its end."""
    config = config_of("edm", "train.sample_every=4", "train.checkpoint_every=4", steps=steps)

    def hangs(*arguments):
        send()
        time.sleep(30)

    session, _ = session_of(config, tmp_path / "cut")
    with monkeypatch.context() as patched, stoppable() as stop:
        patched.setattr("cmtool.training.session.write_preview", hangs)
        outcome = run(session, stop)
    assert outcome.signal == signal.SIGTERM and outcome.step == 4 and outcome.model is None
    assert train(config, tmp_path / "cut").model is not None
    train(config, tmp_path / "whole")
    for name in ("samples/step-0000004.png", "model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_while_the_model_is_judged_leaves_at_once_and_it_is_judged_later(tmp_path):
    config = config_of("edm", "train.eval_every=4", "train.checkpoint_every=4", steps=9)

    def hangs(model):
        send()
        time.sleep(30)

    session, _ = session_of(config, tmp_path / "run")
    session.judge = hangs
    with stoppable() as stop:
        assert run(session, stop).step == 4
    again, _ = session_of(config, tmp_path / "run")
    again.judge = lambda model: {"fid": 5.0}
    run(again, Stop())
    assert [row["step"] for row in again.folder.rows() if "eval" in row] == [4, 8]


# --- a kill between two writes of one step -------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL."""


def killed_once_in(monkeypatch, owner, name, when):
    """Let a call of `owner.name` be the run's last, done or not: "before" or "after" it."""
    plain = getattr(owner, name)

    def last(*arguments, **options):
        if when == "after":
            plain(*arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, last)


def test_snapshots_owed_at_the_step_of_a_kill_are_written_all_the_same(tmp_path, monkeypatch):
    ema = "train.ema={kind='power',std=0.1}"
    config = config_of("edm", "train.snapshot_every=4", "train.checkpoint_every=4", ema, steps=8)
    train(config, tmp_path / "whole")
    session, _ = session_of(config, tmp_path / "cut")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_once_in(patched, session.state, "save", "after")
        run(session, Stop())
    train(config, tmp_path / "cut")
    made = {place: sorted(file.name for file in (tmp_path / place / FOLDER).iterdir()) for place in ("cut", "whole")}
    assert made["cut"] == made["whole"] == ["step-0000004-0.safetensors", "step-0000008-0.safetensors"]


@pytest.mark.parametrize("where", ["append", "export"])
def test_the_best_model_survives_a_kill_beside_its_figures(tmp_path, monkeypatch, where):
    config = config_of("edm", "train.eval_every=4", "train.checkpoint_every=4", steps=9)
    figures = iter([{"fid": 5.0}, {"fid": 9.0}])

    def judged(path, judge) -> Session:
        session, _ = session_of(config, path)
        session.judge = judge
        return session

    session = judged(tmp_path / "run", lambda model: {"fid": 5.0})
    if where == "append":
        plain = RunFolder.append
        monkeypatch.setattr(RunFolder, "append", lambda self, row: kill() if "eval" in row else plain(self, row))
    else:
        killed_once_in(monkeypatch, session.state, "export", "before")
    with pytest.raises(Killed):
        run(session, Stop())
    monkeypatch.undo()
    again = judged(tmp_path / "run", lambda model: next(figures))
    run(again, Stop())
    assert again.folder.best.is_file()
    assert read_header(again.folder.best)["step"] == 4


def kill():
    raise Killed
