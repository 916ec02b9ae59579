"""A signal ends the step it arrives in, at once, and that step alone is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from cmtool.machine.stopping import stoppable
from cmtool.schedules.curriculum import span_at
from cmtool.training import pace
from cmtool.training.run_folder import RunFolder
from cmtool.training.state import restore_newest
from tests.training.tiny import change_loss, config_of, run, same, session_of, teacher_file, train, trainer_of

SLEEP = 20.0


class SlowBackward(torch.autograd.Function):
    """The identity, whose gradient takes its time."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SLEEP)
        return gradient


def slow_forward(loss):
    time.sleep(SLEEP)
    return loss


def slow_backward(loss):
    return type(loss)(SlowBackward.apply(loss.weighted), loss.distance, loss.t)


def slows(session, at, change):
    """Let the passes of the step `at` take `SLEEP` seconds each; that step is signalled a moment after it begins."""
    trainer = session.trainer

    def slow(loss):
        if trainer.state.step != at:
            return loss
        if trainer.share_of_step == 0:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return change(loss)

    change_loss(trainer, slow)


@pytest.mark.parametrize("recipe", ["ict", "ct"])
@pytest.mark.parametrize("change", [slow_forward, slow_backward])
@pytest.mark.parametrize("micro", [8, 2])
def test_a_signal_inside_a_step_leaves_at_once_and_loses_that_step_alone(tmp_path, recipe, change, micro):
    config = config_of(recipe, "train.log_every=2", steps=6, **{"train.micro_batch": micro})
    session, _ = session_of(config, tmp_path / "cut")
    slows(session, 3, change)
    began = time.monotonic()
    with stoppable() as stop:
        outcome = run(session, stop)
    assert time.monotonic() - began < SLEEP / 2
    assert (outcome.model, outcome.step, outcome.signal) == (None, 3, signal.SIGTERM)
    usual = trainer_of(config)
    for _ in range(3):
        usual.step()
    kept = trainer_of(config).state
    assert restore_newest(RunFolder(tmp_path / "cut"), kept) == (3, {})
    assert same(kept.tensors(), usual.state.tensors())
    assert run(session_of(config, tmp_path / "cut")[0]).step == 6
    train(config, tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    reports = [[{**row, "images_per_s": 0} for row in RunFolder(tmp_path / name).rows()] for name in ("cut", "whole")]
    assert [row["step"] for row in reports[0]] == [row["step"] for row in reports[1]]


def test_a_step_that_begins_a_stage_keeps_the_moments_of_the_one_before(tmp_path):
    """With train.restart = "stage" the optimizer forgets at such a step: not before the step is sure to be done."""
    halving = ('train.restart="stage"', "recipe.curriculum.s0=4", "recipe.curriculum.s1=1")
    config = config_of("pd", *halving, steps=6, teacher=str(teacher_file(tmp_path / "teacher.safetensors")))
    trainer = trainer_of(config)
    first = next(step for step in range(1, 6) if span_at(config, step)[0] == step)
    session, _ = session_of(config, tmp_path / "cut")
    slows(session, first, slow_forward)
    with stoppable() as stop:
        assert run(session, stop).step == first
    while trainer.state.step < first:
        trainer.step()
    kept = trainer_of(config).state
    restore_newest(RunFolder(tmp_path / "cut"), kept)
    assert same(kept.tensors(), trainer.state.tensors())


def test_a_signal_inside_the_first_step_leaves_a_run_that_starts_again(tmp_path):
    config = config_of("edm", steps=3)
    session, _ = session_of(config, tmp_path / "cut")
    slows(session, 0, slow_forward)
    with stoppable() as stop:
        assert run(session, stop).step == 0
    assert run(session_of(config, tmp_path / "cut")[0]).step == 3
    train(config, tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_the_update_of_the_weights_is_never_cut(tmp_path):
    config = config_of("edm", steps=6)
    session, _ = session_of(config, tmp_path / "cut")
    plain = session.state.optimizer.step

    def slow_update(*_):
        if session.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        plain()

    session.state.optimizer.step = slow_update
    with stoppable() as stop:
        assert run(session, stop).step == 3
    assert run(session_of(config, tmp_path / "cut")[0]).step == 6
    train(config, tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_backward_pass_of_many_weights_hears_a_signal_before_it_ends(tmp_path, monkeypatch):
    """torch runs a backward pass without Python; on networks where it takes long it looks in at every weight."""
    monkeypatch.setattr(pace, "LARGE", 0.0)
    monkeypatch.setattr(pace, "SLOW", 1e9)
    session, _ = session_of(config_of("edm", steps=4), tmp_path / "run")
    heard = []
    parameters = session.state.parameters()
    assert len(parameters) > 20
    parameters[-1].register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM) if session.state.step else None)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda weight: heard.append(session.state.step))
    with stoppable() as stop:
        assert run(session, stop).step == 1
    assert heard.count(1) < len(parameters) / 2


SLOW_RANK = """
import os, sys, time
from cmtool.losses.objective import Objective
plain = Objective.loss
def slow(self, nets, draw):
    if draw.rows.step == 3:
        os.write(2, f"slow {os.getpid()}\\n".encode())  # in one piece, whatever the other process says
        time.sleep(60)
    return plain(self, nets, draw)
Objective.loss = slow
from cmtool.cli.app import main
main()
"""


def test_two_processes_leave_a_step_together(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW_RANK)
    words = ["train-ct", "--preset", "digits", "--batch-size", "10", "--set", "network.channels=8", "--device", "cpu"]
    words += ["--set", "eval.reference=", "--steps", "9", "--out", str(tmp_path / "run")]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.Popen([*start, *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    ranks = []
    for line in process.stderr:
        if line.startswith("slow"):
            ranks.append(int(line.split()[1]))
        if len(ranks) == 2:
            break
    assert len(ranks) == 2
    began = time.monotonic()
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    process.communicate(timeout=50)
    assert time.monotonic() - began < 30
    assert [step for step, _ in RunFolder(tmp_path / "run").checkpoints()] == [3]
    assert "stopped by signal 15 at step 3" in (tmp_path / "run" / "run.log").read_text()


def test_no_hook_is_put_on_small_networks(tmp_path):
    """Their steps are short, and a call for every weight would be felt."""
    session, _ = session_of(config_of("edm", steps=2), tmp_path / "run")
    run(session)
    weights = [module for module in session.state.student.modules() if isinstance(module, nn.Module)]
    assert weights and not any(p._post_accumulate_grad_hooks for p in session.state.parameters())
