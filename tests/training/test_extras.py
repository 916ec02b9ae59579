"""Around a run: its name, a finished run that goes on, trackers and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmtool.checkpoint import load_tensors, read_header
from cmtool.config.load import resolve
from cmtool.schedules.curriculum import lr_factor
from cmtool.training.extend import plateau_end

TINY = ["network.channels=8", "network.channel_mult=[1]", "network.head_channels=8", "network.attention=[]",
        "train.log_every=5", "train.warmup=0"]  # fmt: skip
SETS = [word for value in TINY for word in ("--set", value)]


@pytest.fixture
def train(cmtool, monkeypatch):
    import cmtool.api.train as training

    monkeypatch.setattr(training, "judges", lambda trainer, talk: (None, None))

    def typed(*words, sets=SETS):
        return cmtool("train-ct", *words, *sets)

    return typed


def test_the_plateau_ends_where_the_rate_begins_to_fall():
    train = resolve("digits", recipe="ict").config.train
    end = plateau_end(train)
    assert end == 0.3 * train.steps
    assert lr_factor(train, end) == 1.0 > lr_factor(train, end + 1)
    assert plateau_end(train.model_copy(update={"decay": "none"})) is None
    assert plateau_end(train.model_copy(update={"decay_start": 0.0})) is None


def test_an_inverse_root_falls_from_where_it_says():
    """Halved at four times the steps after which it begins to fall (EDM2; ECT and sCM on ImageNet)."""
    train = resolve("digits", recipe="ict").config.train.model_copy(
        update={"steps": 100_000, "decay": "inverse_sqrt", "decay_start": 0.02, "warmup": 0.0}
    )
    assert [lr_factor(train, step) for step in (0, 1999, 2000, 8000, 50_000)] == pytest.approx([1, 1, 1, 0.5, 0.2])


def test_a_finished_run_goes_on_from_before_its_decay(train):
    assert train("--recipe", "ict", "--batch-size", 8, "--steps", 20).code == 0
    old = Path("runs/digits-ict")
    state, header = load_tensors(old / "before-decay.safetensors")
    assert header["step"] == 6
    said = train("--extend", old, "--steps", 40, sets=[])
    assert said.code == 0, said.err
    assert "goes on from step 6 to 40" in said.err
    new = Path("runs/digits-ict-40")
    assert read_header(new / "model.safetensors")["step"] == 40
    copied, _ = load_tensors(new / "checkpoints" / "step-0000006" / "state.safetensors")
    assert all(torch.equal(copied[name], state[name]) for name in state)
    steps = [json.loads(line)["step"] for line in (new / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[0] == 5 and steps[-1] == 40
    assert "finished" in train("--extend", old, "--steps", 40, sets=[]).err


def test_a_constant_rate_goes_on_from_the_end(train):
    assert train("--recipe", "ict", "--batch-size", 8, "--steps", 10, "--set", "train.decay=none").code == 0
    said = train("--extend", "runs/digits-ict", "--steps", 15, "--name", "longer", sets=[])
    assert said.code == 0 and "from step 10 to 15" in said.err
    assert read_header("runs/longer/model.safetensors")["step"] == 15


def test_mistakes_in_going_on(train, cmtool):
    assert train("--recipe", "ict", "--batch-size", 8, "--steps", 4).code == 0
    old = "runs/digits-ict"
    cases = [
        (["--extend", old], "--extend needs --steps"),
        (["--extend", old, "--steps", 4], "no longer than the 4 steps"),
        (["--extend", old, "--steps", 9, "--seed", 3], "--seed: --extend goes on with the settings"),
        (["--extend", "nowhere", "--steps", 9], "no run folder"),
        (["--extend", old, "--steps", 9, "--fresh"], "--fresh starts over and --extend goes on"),
    ]
    for words, sentence in cases:
        said = train(*words, sets=[])
        assert said.code in (1, 2) and sentence in " ".join(said.err.split()), said.err
    assert "train-ct --extend" in cmtool("train-cd", "--extend", old, "--steps", 9).err
    Path(old, "before-decay.safetensors").unlink()
    assert "keeps no training state" in train("--extend", old, "--steps", 9, sets=[]).err
    assert not list(Path("runs").glob("*9*"))


def test_a_run_goes_by_its_name(train):
    said = train("--recipe", "ict", "--batch-size", 8, "--steps", 2, "--name", "mine")
    assert said.out.strip() == "runs/mine/model.safetensors"
    assert train("--name", "mine", "--out", "x").code == 2
    assert train("--name", "../elsewhere").code == 2


def test_tensorboard_gets_numbers_figures_and_pictures(train):
    pytest.importorskip("tensorboard", reason="needs the extra track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--recipe", "ict", "--batch-size", 8, "--steps", 10, "--track", "tensorboard").code == 0
    events = EventAccumulator("runs/digits-ict/tensorboard").Reload()
    rows = [json.loads(line) for line in Path("runs/digits-ict/metrics.jsonl").read_text().splitlines()]
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert "schedule/num_scales" in events.Tags()["scalars"]
    assert events.Images("samples")[0].step == 10


@pytest.mark.slow
def test_wandb_writes_offline(train, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra track")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert train("--recipe", "ict", "--batch-size", 8, "--steps", 10, "--track", "wandb").code == 0
    files = list(Path("runs/digits-ict/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and b"train/loss" in files[0].read_bytes()


def test_nothing_is_tracked_unasked_and_unknown_trackers_are_refused(train):
    assert train("--recipe", "ict", "--batch-size", 8, "--steps", 2).code == 0
    assert not list(Path("runs").rglob("*tfevents*")) and not Path("runs/digits-ict/wandb").exists()
    said = train("--track", "tensorbord", "--name", "other")
    assert said.code == 2 and "Did you mean tensorboard?" in said.err
    assert not Path("runs/other").exists()


def test_a_missing_tracker_is_said_before_training(train, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    said = train("--track", "wandb", "--name", "other")
    assert said.code == 1 and "cmtool-consistency[track]" in said.err
