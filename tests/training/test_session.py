"""A run from its folder to its model: intervals, stopping, going on, warnings, roll-back."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from cmtool.checkpoint import read_header
from cmtool.errors import DivergenceError, UserError
from cmtool.machine.stopping import Stop, parse_span
from cmtool.models import load
from cmtool.training import forecast as forecasts
from cmtool.training import report as reports
from cmtool.training.forecast import check_disk, forecast
from cmtool.training.report import band_means
from cmtool.training.run_folder import RunFolder
from cmtool.training.session import Session
from cmtool.training.setup import collapsed, spread
from tests.training.tiny import Heard, change_loss, config_of, run, session_of, train, trainer_of

EVERY = ("train.log_every=2", "train.checkpoint_every=4", "train.sample_every=3")


def test_a_run_leaves_what_the_design_says(tmp_path):
    session, heard = session_of(config_of("ict", *EVERY, "train.extra_emas=[{decay=0.5}]", steps=7), tmp_path / "run")
    outcome = run(session, Stop(), ["cmtool", "train-ct"])
    folder = session.folder
    assert outcome.model == folder.model and outcome.step == 7
    names = sorted(str(file.relative_to(folder.path)) for file in folder.path.rglob("*") if file.is_file())
    assert names == [
        "checkpoints/step-0000004/state.safetensors",
        "checkpoints/step-0000007/state.safetensors",
        "ema-0.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "run.log",
        "samples/step-0000003.png",
        "samples/step-0000006.png",
        "samples/step-0000007.png",
    ]
    assert [row["step"] for row in folder.rows()] == [2, 4, 6, 7] == [report.step for report in heard.reports]
    assert all(row["grad_norm"] > 0 for row in folder.rows())
    header = read_header(folder.model)
    assert (header["step"], header["kind"], header["recipe_name"]) == (7, "consistency", "ict")
    assert header["machine"] == {"device": "cpu", "precision": "fp32", "threads": 1, "deterministic": False}
    model = load(folder.path)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = session.state.ema(x, torch.full((2,), 5.0))
    torch.testing.assert_close(model(x, torch.full((2,), 5.0)), expected, rtol=0, atol=0)


def test_run_log_is_enough_to_run_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_EXAMPLE", "1")
    session, _ = session_of(config_of("edm", steps=2), tmp_path / "run")
    run(session, Stop(), ["cmtool", "train-edm", "--out", "a b"])
    lines = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert all(line[:20].endswith("Z") and line[10] == "T" for line in lines), "UTC, whatever the time zone"
    said = json.loads(lines[0].partition("{")[1] + lines[0].partition("{")[2])
    assert said["command"] == ["cmtool", "train-edm", "--out", "a b"]
    assert said["environment"]["CMTOOL_EXAMPLE"] == "1"
    assert {"cmtool", "torch", "python", "numpy"} <= said["versions"].keys()
    assert said["device"] == "cpu" and said["threads"] == 1 and said["seed"] == 0
    assert said["data"] == session.trainer.dataset.fingerprint
    assert lines[-1].endswith("finished at step 2")


def test_what_a_trainer_remarks_stands_in_the_log_once(tmp_path):
    session, _ = session_of(config_of("edm", "train.log_every=2", steps=4), tmp_path / "run")
    session.trainer.remarks.append("step 0: 8 images at once do not fit memory; 4 now")
    run(session, Stop())
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("Z step 0: 8 images at once do not fit memory; 4 now\n") == 1


def test_checkpoints_kept(tmp_path):
    config = config_of("edm", "train.checkpoint_every=2", "train.keep_every=6", steps=13)
    train(config, tmp_path / "run")
    assert [step for step, _ in RunFolder(tmp_path / "run").checkpoints()] == [13, 12, 6]


def test_stopping_saves_and_going_on_gives_the_same_bits(tmp_path):
    config = config_of("ict-pm", *EVERY, steps=9)
    session, heard = session_of(config, tmp_path / "cut")
    stop = Stop()
    heard.report = lambda report: setattr(stop, "signal", 15 if report.step == 4 else 0)
    outcome = run(session, stop)
    assert (outcome.model, outcome.step, outcome.signal) == (None, 4, 15)
    again, heard = session_of(config, tmp_path / "cut")
    assert run(again, Stop()).step == 9 and heard.start == 4
    train(config, tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    log = (tmp_path / "cut" / "run.log").read_text()
    assert "stopped by signal 15 at step 4" in log and "start at step 4 of 9" in log


def test_the_time_limit_stops_between_two_steps(tmp_path):
    session, _ = session_of(config_of("edm", steps=100_000), tmp_path / "run")
    outcome = run(session, Stop(deadline=time.monotonic() + 0.5))
    assert outcome.out_of_time and outcome.model is None and 0 < outcome.step < 100_000
    assert [step for step, _ in session.folder.checkpoints()] == [outcome.step]
    assert "the time limit" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    config = config_of("edm", *EVERY, steps=9)
    whole = tmp_path / "whole"
    train(config, whole)
    path = tmp_path / "run"
    session, heard = session_of(config, path)
    stop = Stop()
    heard.report = lambda report: setattr(stop, "signal", 2 if report.step == 8 else 0)
    run(session, stop)
    file = session.folder.checkpoint(8)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[damage])
    again, heard = session_of(config, path)
    run(again, Stop())
    assert heard.start == 4 and len(heard.warnings) == 1
    assert str(file) in heard.warnings[0] and "older checkpoint is used" in heard.warnings[0]
    # Step 8 comes by again: its checkpoint must be written anew, not taken for the one that was damaged.
    assert again.folder.checkpoint(8).read_bytes() == RunFolder(whole).checkpoint(8).read_bytes()
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_killed_just_after_its_checkpoint_makes_up_for_grid_and_evaluation(tmp_path):
    config = config_of("edm", "train.checkpoint_every=4", "train.sample_every=4", "train.eval_every=4", steps=6)

    class Killed(BaseException):
        pass

    first, _heard = session_of(config, tmp_path / "run")
    first.sample = lambda: (_ for _ in ()).throw(Killed())
    with pytest.raises(Killed):
        run(first, Stop())
    assert not (tmp_path / "run" / "samples").exists()
    second = Session(trainer_of(config), first.folder, Heard(), judge=lambda model: {"fid": 3.0})
    run(second, Stop())
    assert (tmp_path / "run/samples/step-0000004.png").is_file()
    assert [row["step"] for row in first.folder.rows() if "eval" in row] == [4]
    assert read_header(first.folder.best)["figures"] == {"fid": 3.0}


def breaks(session, steps, kind="nan"):
    """Let the loss be NaN at the given steps while the run has not rolled back (or always: kind "always")."""
    trainer = session.trainer

    def broken(loss):
        bad = trainer.state.step in steps and (kind == "always" or trainer.state.retries == 0)
        return replace(loss, weighted=loss.weighted * (float("nan") if bad else 1.0))

    change_loss(trainer, broken)


def test_roll_back_goes_on_from_the_last_checkpoint_with_other_noise(tmp_path):
    config = config_of("edm", *EVERY, "train.bad_step=rollback", steps=9)
    session, heard = session_of(config, tmp_path / "run")
    breaks(session, {6})
    outcome = run(session, Stop())
    assert outcome.step == 9 and len(heard.warnings) == 1
    assert "step 6" in heard.warnings[0] and "Rolled back to step 4 (1 of 3" in heard.warnings[0]
    assert [row["step"] for row in session.folder.rows()] == [2, 4, 6, 8, 9]
    train(config, tmp_path / "plain")
    state = read_header(session.folder.checkpoint(9))
    assert state["retries"] == 1 and read_header(RunFolder(tmp_path / "plain").checkpoint(9))["retries"] == 0
    assert (tmp_path / "run/model.safetensors").read_bytes() != (tmp_path / "plain/model.safetensors").read_bytes()


def test_a_run_killed_after_rolling_back_ends_with_the_same_bits(tmp_path):
    config = config_of("edm", *EVERY, "train.bad_step=rollback", steps=9)
    whole, _ = session_of(config, tmp_path / "whole")
    breaks(whole, {6})
    run(whole, Stop())
    cut, heard = session_of(config, tmp_path / "cut")
    breaks(cut, {6})
    stop = Stop()
    heard.warn = lambda message: setattr(stop, "deadline", 0.0)
    assert run(cut, stop).step == 4
    again, _ = session_of(config, tmp_path / "cut")
    breaks(again, {6})
    run(again, Stop())
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_roll_back_before_the_first_checkpoint_starts_over(tmp_path):
    session, heard = session_of(config_of("edm", *EVERY, "train.bad_step=rollback", steps=5), tmp_path / "run")
    breaks(session, {1})
    assert run(session, Stop()).step == 5
    assert "Rolled back to step 0" in heard.warnings[0]


def test_roll_back_gives_up(tmp_path):
    session, heard = session_of(config_of("edm", *EVERY, "train.bad_step=rollback", steps=9), tmp_path / "run")
    breaks(session, {6}, "always")
    with pytest.raises(DivergenceError, match="step 6"):
        run(session, Stop())
    assert len(heard.warnings) == 3 and not session.folder.finished()
    assert [step for step, _ in session.folder.checkpoints()] == [4, 0]


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path):
    session, _ = session_of(config_of("edm", *EVERY, steps=9), tmp_path / "run")
    advance = session.state.advance_averages

    def poisons(decay):
        advance(decay)
        if session.state.step == 7:
            with torch.no_grad():
                session.state.ema.network.state_dict()["out.2.bias"].fill_(float("inf"))

    session.state.advance_averages = poisons
    with pytest.raises(UserError, match="weight is not finite at step 8"):
        run(session, Stop())
    assert [step for step, _ in session.folder.checkpoints()] == [4]


def test_weights_that_are_not_finite_are_not_saved_when_a_signal_ends_the_run(tmp_path):
    session, _ = session_of(config_of("edm", *EVERY, steps=9), tmp_path / "run")
    advance, stop = session.state.advance_averages, Stop()

    def poisons(decay):
        advance(decay)
        if session.state.step == 1:
            with torch.no_grad():
                session.state.ema.network.state_dict()["out.2.bias"].fill_(float("inf"))
            stop.signal = 15

    session.state.advance_averages = poisons
    with pytest.raises(UserError, match="weight is not finite at step 2; no checkpoint had been written yet"):
        run(session, stop)
    assert not session.folder.checkpoints()


def test_collapse_is_warned_of(tmp_path, monkeypatch):
    config = config_of("ct", "train.sample_every=200", "train.checkpoint_every=1000", steps=201)
    session, heard = session_of(config, tmp_path / "run")
    monkeypatch.setattr(reports, "preview", lambda model, count: torch.zeros(count, 1, 8, 8))
    session.state.step = 200
    session.sample()
    assert "collapse" in heard.warnings[0] and "step 200" in heard.warnings[0]
    heard.warnings.clear()
    real = session.trainer.dataset.batch(torch.arange(64))[0]
    monkeypatch.setattr(reports, "preview", lambda model, count: real)
    session.sample()
    assert not heard.warnings


@pytest.mark.slow
@pytest.mark.parametrize(("s1", "collapses"), [(150, True), (20, False)])
def test_the_2023_schedule_collapses_at_a_short_budget_and_is_caught(tmp_path, s1, collapses):
    """Really trained: with s1 = 150 the samples' spread is .02 (real images .45) at a loss of 3e-5."""
    sets = (f"recipe.curriculum.s1={s1}", "train.lr=2e-3", "train.sample_every=400", "train.checkpoint_every=1000")
    session, heard = session_of(config_of("ct", *sets, "data.size=512", steps=800, batch=32), tmp_path / "run")
    run(session, Stop())
    assert [("collapse" in text, text[:8]) for text in heard.warnings] == (
        [(True, "step 400"), (True, "step 800")] if collapses else []
    )
    assert heard.reports[-1].loss < 1e-3


def test_spread_tells_collapsed_samples_from_real_ones():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(200, 1, 8, 8, generator=g)
    assert spread(real) == pytest.approx(1.0, abs=0.05)
    assert collapsed(0.2 * real, real) and not collapsed(0.5 * real, real)
    same = real[:1].expand(64, -1, -1, -1)
    assert collapsed(same, real)


def test_band_means():
    distance, t = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0.01, 0.05, 0.06, 80.0])
    assert band_means(distance, t) == {"<0.02": 1.0, "<0.1": 4.0, ">=10": 7.0}


def test_forecast_counts_what_is_kept(tmp_path):
    config = config_of("ct", "train.extra_emas=[{decay=0.5}]", "train.checkpoint_every=3", steps=8)
    trainer = trainer_of(config)
    said = forecast(config, trainer.state)
    assert said.parameters == sum(p.numel() for p in trainer.state.student.network.parameters())
    train(config, tmp_path / "run")
    files = [file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors")]
    checkpoint = max(files)
    assert said.checkpoint == pytest.approx(checkpoint, rel=0.15)
    assert sum(files) < said.disk < 3 * sum(files)
    assert f"{said.parameters:,} parameters" in said.lines()[0]


def test_a_disk_that_is_short_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(forecasts.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(UserError, match="5 MB free and the run needs 9 MB"):
        check_disk(tmp_path / "not" / "there", 9_000_000)
    check_disk(tmp_path, 4_000_000)
    folder = RunFolder(tmp_path).checkpoint(5).parent
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"x" * 4_500_000)
    check_disk(tmp_path, 9_000_000)  # half of it is there already


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h55m", 14100), ("90s", 90), ("1d", 86400), ("30", 30), ("1.5h", 5400), (" 2H ", 7200), ("1d2h3m4s", 93784)],
)
def test_time_spans(text, seconds):
    assert parse_span(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "-5m", "5x", "h", "3m2h", "0s", "1e3"])
def test_what_is_no_time_span(text):
    with pytest.raises(UserError, match="no time span"):
        parse_span(text)
