"""`cmtool plan` and planned training as they are typed; the machine's speed is given, not measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from cmtool.api.plan import Speeds
from cmtool.api.train import train
from cmtool.checkpoint import read_header
from cmtool.training.report import Listener
from cmtool.training.run_folder import RunFolder, clear_plan


@pytest.fixture
def here(workdir, monkeypatch):
    """A folder with 60 pictures of 8 x 8 in faces.npz and 12 in few.npz, on a machine of known speed."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez("faces.npz", arr_0=pixels)
    np.savez("few.npz", arr_0=pixels[:12])
    speeds = Speeds({("tiny", 8): 1200.0, ("small", 8): 600.0, ("small", 16): 400.0}, threads=torch.get_num_threads())
    monkeypatch.setattr("cmtool.api.plan_run.measure_speeds", lambda *given: speeds)
    return workdir


def test_another_machine_is_told_what_stays(here, cmtool):
    line = ("train-ct", "--data", "faces.npz", "--steps", 50, "--max-time", "0.01s")
    assert cmtool(*line).code == 0
    plan = Path("runs/faces/plan.toml")
    plan.write_text(plan.read_text().replace('device = "cpu"', 'device = "cuda (H200)"'))
    second = cmtool(*line)
    assert "made on another machine (cuda (H200), threads: " in second.err and "the pace of this one" in second.err


def files():
    return sorted(str(path) for path in Path("runs").rglob("*") if path.is_file())


def test_a_dry_run_says_five_lines_and_prints_a_preset(here, cmtool):
    typed = cmtool("train-ct", "--data", "faces.npz", "--time", "10m", "--dry-run")
    assert typed.code == 0, typed.err
    assert [line.split(":")[0] for line in typed.err.splitlines()] == ["pictures", "size", "recipe", "machine", "done"]
    tables = tomllib.loads(typed.out)
    assert tables["data"]["path"] == "faces.npz"
    assert [s["recipe"] for s in tables["plan"]["stages"]] == ["edm", "icd"]
    assert not files()
    Path("my.toml").write_text(typed.out)
    again = cmtool("train-cd", "--preset", "my.toml", "--recipe", "icd", "--teacher", "x", "-n")
    assert again.code == 1 and "x" in again.err  # the preset is taken, the teacher is not there
    edm = cmtool("train-edm", "--preset", "my.toml", "-n")
    assert tomllib.loads(edm.out)["train"]["time"] == 300.0
    shown = cmtool("presets", "my.toml")
    assert shown.code == 0 and tomllib.loads(shown.out)["plan"]["stages"] == tables["plan"]["stages"]
    document = json.loads(cmtool("train-ct", "--data", "faces.npz", "--dry-run", "--json").out)
    assert document["plan"]["plan"]["time"] == 1800 and len(document["said"]) == 5


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        ("--data few.npz", "has 12 pictures to train on", 1),
        ("--data nowhere", "there is no data at nowhere", 1),
        ("--data toy2d", "holds points", 1),
        ("--data faces.npz --time 6s", "are too short for anything", 1),
        ("--data faces.npz --time soon", "'soon' is no time span", 2),
        ("--data faces.npz --time 0s", "is no time span", 2),
        ("--data faces.npz --set train.lr=fast", "--set train.lr", 1),
        ("--data faces.npz --set lr=1", "names no setting", 1),
        ("--data faces.npz --resolution 12", "a plan knows 8, 16", 2),
        ("--data faces.npz --init demo/digits", "a plan makes its own start", 2),
        ("--data faces.npz --recipe nope", "unknown recipe 'nope'", 1),
        ("--preset digits --recipe pd --time 5m --teacher demo/digits", "starts over at fixed steps", 1),
    ],
)
def test_what_is_refused_before_anything_is_written(here, cmtool, words, said, code):
    command = "train-cd" if "pd" in words.split() else "train-ct"
    typed = cmtool(command, *words.split())
    assert (typed.code, said in typed.err, "Traceback" in typed.err) == (code, True, False), typed.err
    assert not files()


@pytest.mark.parametrize(("span", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400)])
def test_units_of_time(here, cmtool, span, seconds):
    typed = cmtool("train-ct", "--data", "faces.npz", "--time", span, "-n")
    assert tomllib.loads(typed.out)["plan"]["time"] == seconds


def test_data_is_never_digits_and_digits_stay_what_they_are(here, cmtool):
    assert tomllib.loads(cmtool("train-ct", "-n").out)["preset"] == "digits"
    named = tomllib.loads(cmtool("train-ct", "--preset", "digits", "--data", "faces.npz", "-n").out)
    assert named["preset"] == "digits" and named["data"]["path"] == "faces.npz"
    planned = tomllib.loads(cmtool("train-edm", "--data", "faces.npz", "-n").out)
    assert planned["data"]["channels"] == 3 and planned["about"]["title"] == "a plan for faces.npz"
    both = cmtool("train-ct", "--steps", 7, "--time", "5m", "-n")
    assert "the steps count, and --time is left out" in both.err
    assert "time" not in tomllib.loads(both.out)["train"]
    assert tomllib.loads(cmtool("train-ct", "--time", "5m", "-n").out)["train"]["time"] == 300


def test_few_pictures_train_if_told_to(here, cmtool):
    typed = cmtool("train-ct", "--data", "few.npz", "--anyway", "-n")
    assert typed.code == 0 and "12 in few.npz" in typed.err


def test_the_table(here, cmtool):
    typed = cmtool("plan", "--data", "faces.npz")
    assert typed.code == 0, typed.err
    assert all(len(line) <= 80 for line in typed.out.splitlines())
    assert "8 px" in typed.out and "30 min" in typed.out and "*" in typed.out
    found = json.loads(cmtool("plan", "--data", "faces.npz", "--times", "1m,1h", "--json").out)
    assert [row["seconds"] for row in found["rows"] if row["chosen"]] == [60, 3600]
    assert cmtool("plan", "--data", "few.npz").code == 1


QUICK = ("--set", "network.channels=8", "--set", "network.head_channels=8", "--set", "train.log_every=5")


def test_a_planned_run_ends_in_time_and_goes_on_where_it_was_stopped(here, cmtool):
    """Eight seconds, stopped in the teacher, in one run folder."""
    line = ("train-ct", "--data", "faces.npz", "--time", "8s", "--anyway", *QUICK)
    began = time.monotonic()
    first = cmtool(*line, "--max-time", "1s")
    assert first.code == 0 and "time limit reached" in first.err and "stage 1 of 2: edm" in first.err
    assert Path("runs/faces/plan.toml").is_file() and not Path("runs/faces/model.safetensors").exists()
    second = cmtool(*line)
    assert second.out == "runs/faces/model.safetensors\n", second.err
    assert "going by the plan in runs/faces/plan.toml" in second.err
    assert "another machine" not in second.err
    assert Path("runs/faces/teacher/model.safetensors").is_file()
    assert time.monotonic() - began == pytest.approx(8, abs=3.5)
    header = read_header("runs/faces/model.safetensors")
    # On a busy machine the first step may be the last one, and then there is nothing to decide.
    assert header["kind"] == "consistency" and header["step"] == header.get("decisions", [[0, 1]])[-1][1]
    assert cmtool(*line).out == second.out
    other = cmtool("train-ct", "--data", "faces.npz", "--time", "8s", "--resolution", "8")
    assert other.code == 1 and "holds a plan for something else" in other.err
    text = Path("runs/faces/plan.toml").read_text()
    Path("runs/faces/plan.toml").write_text(text.replace("stages = [", "stags = ["))
    broken = cmtool(*line)
    assert broken.code == 1 and "plan.toml" in broken.err and "--fresh" in broken.err
    clear_plan(Path("runs/faces"))
    assert not files() and not Path("runs/faces/teacher").exists()


class StopsIn(Listener):
    """Asks each stage in which it has not been before to stop at its second report, as a scheduler would."""

    def __init__(self):
        self.stages, self.reports = [], 0

    def started(self, step, steps, needs):
        self.reports = 0

    def report(self, report):
        self.reports += 1
        stage = len(self.stages)
        if self.reports == 2 and stage < 3:
            self.stages.append(report.step)
            signal.raise_signal(signal.SIGTERM)


def test_three_stages_stopped_in_each_end_with_the_same_bytes(here, monkeypatch):
    """A named recipe takes all that it starts from; steps are named, so that no clock decides."""
    sets = {"network.channels": 8, "network.head_channels": 8, "train.log_every": 1, "train.sample_every": 10**6}
    ask = {"data": "../faces.npz", "recipe": "polish", "steps": 3, "batch_size": 4, "settings": sets, "out": "run"}
    models = {}
    for name in ("whole", "cut"):
        folder = here / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        listener = StopsIn() if name == "cut" else None
        ends = [train(**ask, listener=listener)]
        while not ends[-1].finished:
            ends.append(train(**ask, listener=listener))
        assert len(ends) == (4 if name == "cut" else 1)
        models[name] = [Path("run", stage, "model.safetensors").read_bytes() for stage in ("teacher", "student", "")]
    assert models["whole"] == models["cut"]
    settings = tomllib.loads(Path("run/config.toml").read_text())
    assert (settings["recipe_name"], Path(settings["teacher"]), Path(settings["init"])) == (
        "polish", Path("run/teacher/model.safetensors"), Path("run/student/model.safetensors"),
    )  # fmt: skip
    header = read_header("run/model.safetensors")
    assert header["kind"] == "consistency" and header["step"] == 3
    # The middle stage is not the last one: nothing is searched or judged.
    assert "figures" not in read_header("run/student/model.safetensors")


def test_a_polished_plan_is_done_in_time(here, cmtool):
    line = ("train-ct", "--data", "faces.npz", "--recipe", "polish", "--time", "7s", "--anyway", *QUICK)
    shown = cmtool(*line, "-n")
    Path("my.toml").write_text(shown.out)
    assert "then student icd" in shown.err and "then polish" in shown.err
    began = time.monotonic()
    typed = cmtool("train-ct", "--preset", "my.toml")
    assert typed.out == "runs/my/model.safetensors\n", typed.err
    assert "stage 2 of 3: icd, in runs/my/student" in typed.err and "stage 3 of 3: polish, in runs/my" in typed.err
    assert time.monotonic() - began == pytest.approx(7, abs=3.5)
    assert read_header("runs/my/model.safetensors")["recipe_name"] == "polish"


@pytest.mark.slow
def test_two_processes_go_through_the_stages_together(here):
    """The second one finds the models that the first one writes; both stop, go on and end with one run folder."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cmtool"]
    line = ["train-ct", "--data", "faces.npz", "--recipe", "polish", "--time", "20s", "--anyway", *QUICK]
    first = subprocess.run([*start, *line, "--max-time", "10s"], capture_output=True, text=True, timeout=120)
    assert first.returncode == 0 and "time limit reached" in first.stderr, first.stderr
    second = subprocess.run([*start, *line], capture_output=True, text=True, timeout=120)
    assert second.returncode == 0 and second.stdout == "runs/faces/model.safetensors\n", second.stderr
    assert read_header("runs/faces/model.safetensors")["recipe_name"] == "polish"
    logs = [Path("runs/faces", stage, "run.log").read_text() for stage in ("teacher", "student", "")]
    assert all("finished at step" in log for log in logs)
    assert 10 < RunFolder(Path("runs/faces")).spent() < 40  # both start twice, here on one core
