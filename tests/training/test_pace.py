"""How long a run will take is said early and once, and nothing of it changes a result."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from cmtool.config.find import list_presets
from cmtool.config.load import read_preset, resolve
from cmtool.machine.stopping import Stop
from cmtool.training import pace
from tests.training.tiny import FLAGS, change_loss, config_of, run, session_of, trainer_of, with_source

FOLDER64 = resolve("folder64", flags={"data.path": "photos"}).config


class Told:
    """Keeps what a run is expected to take, and at which step of it that was said."""

    def __init__(self, session, heard):
        self.sentences, self.session = [], session
        heard.expects = self

    def __call__(self, sentence):
        self.sentences.append((self.session.state.step, sentence))


def hasten(monkeypatch, by):
    """Let the watching thread wait a fraction of its usual times."""
    for name in ("SOON", "LATER", "LATEST"):
        monkeypatch.setattr(pace, name, getattr(pace, name) / by)


def test_a_run_of_weeks_says_so_and_what_would_be_bearable():
    said = pace.expectation(FOLDER64, 100_000, 30.0, "cpu")
    assert said.startswith("about 35 days to go on this machine at 4.27 images/s. That is too long for a processor")
    assert "Here --set data.resolution=32 --set network.channels=32 --batch-size 32" in said


def test_days_on_a_gpu_and_hours_on_a_processor_come_without_advice():
    assert pace.expectation(FOLDER64, 100_000, 30.0, "cuda") == "about 35 days to go on this machine at 4.27 images/s"
    assert pace.expectation(FOLDER64, 1000, 30.0, "cpu") == "about 8 h 20 min to go on this machine at 4.27 images/s"


def test_a_first_step_that_goes_on_is_a_lower_bound():
    said = pace.expectation(FOLDER64, 100_000, 15.0, "cpu", at_least=True)
    assert said.startswith("more than 17 days to go on this machine: the first step has taken 15 s so far. That is too")


@pytest.mark.parametrize("preset", list_presets())
@pytest.mark.parametrize("seconds", [1.0, 10.0, 300.0])
def test_what_is_advised_is_taken_by_the_preset_and_bearable(preset, seconds):
    for recipe in read_preset(preset).recipes:
        config = resolve(preset, recipe=recipe, flags={"data.path": "photos"}).config
        words, whole = pace.smaller(config, seconds)
        if not words:
            assert config.train.steps * seconds <= pace.BEARABLE or whole == 0.0
            continue
        assert 0 < whole <= pace.BEARABLE
        values = dict(zip(words[::2], words[1::2], strict=True))
        sets = [word for option, word in zip(words[::2], words[1::2], strict=True) if option == "--set"]
        flags = {"train.steps": values.get("--steps"), "train.batch_size": values.get("--batch-size")}
        flags = {name: int(value) for name, value in flags.items() if value} | {"data.path": "photos"}
        taken = resolve(preset, recipe=recipe, sets=sets, flags=flags).config
        assert taken.train.steps >= pace.LEAST_STEPS
        if config.recipe.needs != "nothing":
            assert (taken.network, taken.data) == (config.network, config.data)


@pytest.mark.parametrize("recipe", ["ict", "ict-ot", "ict-pm", "ect", "cd", "edm", "ct"])
def test_timed_passes_change_nothing(recipe, tmp_path, monkeypatch):
    dropout = () if recipe in ("cd", "edm") else ("network.dropout=0.3",)
    config = with_source(recipe, tmp_path, *dropout, **{"train.steps": 3, "train.micro_batch": 4})
    plain = trainer_of(config)
    for _ in range(3):
        plain.step()
    timed = trainer_of(config)
    before = torch.random.get_rng_state()
    pace.let_signals_in(timed)
    assert pace.timed_passes(timed) > 0
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in timed.state.parameters()) and not timed.has_news
    for _ in range(3):
        timed.step()
    mine, theirs = timed.state.tensors(), plain.state.tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_large_step_is_spoken_of_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "LARGE", 0.0)
    monkeypatch.setattr(pace, "timed_passes", lambda trainer: 600.0)
    session, heard = session_of(config_of("edm", steps=1000), tmp_path / "run")
    told = Told(session, heard)
    session.begin(Stop())
    assert [step for step, _ in told.sentences] == [0]
    sentence = told.sentences[0][1]
    assert "about 6.9 days to go" in sentence and "too long" in sentence
    assert sentence in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(
    ("micro", "says"), [(8, "more than"), (2, "about")], ids=["a step of one pass", "a step of four passes"]
)
def test_a_first_step_that_is_slow_is_spoken_of_before_it_ends(tmp_path, monkeypatch, micro, says):
    hasten(monkeypatch, by=15)
    session, heard = session_of(config_of("edm", steps=2, **{"train.micro_batch": micro}), tmp_path / "run")
    told = Told(session, heard)
    change_loss(session.trainer, lambda loss: time.sleep(1.6 * micro / 8) or loss)
    run(session)
    assert [step for step, _ in told.sentences] == [0]
    assert told.sentences[0][1].startswith(says)
    assert told.sentences[0][1] in (tmp_path / "run" / "run.log").read_text()


def test_steps_that_are_slow_but_bearable_are_spoken_of_before_the_first_report(tmp_path, monkeypatch):
    hasten(monkeypatch, by=10)
    session, heard = session_of(config_of("edm", "train.log_every=1000", steps=9), tmp_path / "run")
    told = Told(session, heard)
    change_loss(session.trainer, lambda loss: time.sleep(0.25) or loss)
    run(session)
    ((step, sentence),) = told.sentences
    assert 2 <= step <= 5
    assert sentence.split(" to go ")[0] in {f"about {seconds} s" for seconds in (2, 3)}


def test_a_finished_run_expects_nothing(tmp_path, monkeypatch):
    config = config_of("edm", steps=2)
    session, heard = session_of(config, tmp_path / "run")
    told = Told(session, heard)
    run(session)
    assert told.sentences == []  # it was over before anybody could know
    again, heard = session_of(config, tmp_path / "run")
    told = Told(again, heard)
    run(again)
    time.sleep(0.3)
    assert told.sentences == []


def test_a_pipe_and_the_log_say_how_long_it_will_take(tmp_path):
    words = ["train-ct", "--preset", "digits", *FLAGS, "--batch-size", "8", "--steps", "25", "--device", "cpu"]
    words += ["--set", "eval.reference=", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "cmtool", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "to go on this machine" in line]
    assert len(lines) == 1 and lines[0].startswith("about ")
    assert lines[0] in (tmp_path / "run" / "run.log").read_text()
