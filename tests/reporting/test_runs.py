"""`cmtool runs` and the reading of run folders: finished, unfinished, damaged, none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmtool.errors import DataError
from cmtool.reporting.runs import differences, find_run_folders, read_run, read_runs
from tests.reporting.run_makers import write_evaluation, write_run


def test_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path, steps=100))
    assert (run.name, run.step, run.finished) == ("digits-ict", 100, True)
    assert run.loss == 0.01
    assert run.seconds == pytest.approx(64.0)  # 6400 images at 100 a second
    assert run.figures() == {"fid": 10.0, "precision": 0.5}


def test_the_newest_one_step_evaluation_is_the_figure(tmp_path):
    folder = write_run(tmp_path)
    write_evaluation(folder, 1, 20.0)
    write_evaluation(folder, 1, 12.5)
    write_evaluation(folder, 2, 3.0)
    assert read_run(folder).figures() == {"fid": 12.5, "precision": 0.25}


def test_half_written_rows_and_damaged_models_do_not_stop_reading(tmp_path):
    folder = write_run(tmp_path)
    (folder / "evaluations.jsonl").write_text('{"metrics": {"fid"', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"nothing")
    run = read_run(folder)
    assert not run.finished
    assert run.evaluations == ()
    assert run.step == 100


def test_the_run_touched_last_comes_first(tmp_path):
    old, new = write_run(tmp_path, "old"), write_run(tmp_path, "new")
    for path in old.iterdir():
        os.utime(path, (1, 1))
    (tmp_path / "no-run").mkdir()
    assert find_run_folders(tmp_path) == [new, old]
    assert [run.name for run in read_runs([], tmp_path)[0]] == ["new"]


def test_what_is_no_run_is_said_with_the_nearest_name(tmp_path):
    write_run(tmp_path, "digits-ict")
    with pytest.raises(DataError, match=r"Did you mean .*digits-ict"):
        read_run(tmp_path / "digits-itc")
    with pytest.raises(DataError, match="there is no run under"):
        read_runs([], tmp_path / "empty")


def test_differences_are_settings_then_results(tmp_path):
    a = read_run(write_run(tmp_path, "a", steps=100))
    b = read_run(write_run(tmp_path, "b", steps=50, finished=False, sets=["train.lr=1e-4"]))
    found = {what: (left, right) for what, left, right in differences(a, b)}
    assert found["train.lr"] == (5e-4, 1e-4)
    assert found["train.steps"] == (100, 50)
    assert found["steps done"] == (100, 50)
    assert found["finished"] == (True, False)
    assert found["FD"] == (10.0, 20.0)
    assert differences(a, a) == []


def test_runs_are_listed(cmtool):
    write_run("runs", "first")
    write_run("runs", "second", steps=50, finished=False)
    said = cmtool("runs")
    assert said.code == 0
    assert "first" in said.out and "of 100" not in said.out and "second" in said.out
    document = json.loads(cmtool("runs", "--json").out)
    rows = {Path(row["run"]).name: row for row in document["runs"]}
    assert rows["first"]["finished"] and not rows["second"]["finished"]
    assert rows["first"]["figures"]["fid"] == 10.0


def test_no_runs_is_no_mistake(cmtool):
    said = cmtool("runs")
    assert (said.code, said.out) == (0, "")
    assert "cmtool train-ct" in said.err


def test_runs_diff_takes_names_below_runs(cmtool):
    write_run("runs", "a")
    write_run("runs", "b", sets=["train.lr=1e-4"])
    said = cmtool("runs", "diff", "a", "b")
    assert said.code == 0
    assert "train.lr" in said.out and "0.0001" in said.out
    assert cmtool("runs", "diff", "a", "nothing").code == 1
    rows = json.loads(cmtool("runs", "diff", "a", "b", "--json").out)["differences"]
    assert rows == [["train.lr", 5e-4, 1e-4]]


def test_listing_is_light(workdir):
    write_run("runs", "a")
    code = "import sys; from cmtool.cli.app import run; run(['runs', '--json']); print('torch' in sys.modules, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workdir, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.strip() == "False"
