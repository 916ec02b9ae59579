"""One and two processes take the same steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmtool.checkpoint import load_tensors
from cmtool.cli.app import run
from cmtool.data.load import load_dataset
from cmtool.errors import ConfigError
from cmtool.machine.world import World
from cmtool.models import load
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling
from cmtool.training.run_folder import RunFolder
from cmtool.training.setup import check_rows, prepare
from tests.training.tiny import config_of, teacher_file

TINY = ["--preset", "digits", "--batch-size", "10", "--precision", "fp64", "--quiet"]
TINY += ["--set", "network.channels=8", "--set", "train.log_every=2", "--device", "cpu"]
# Unjudged: the search for sampling times at the end would take longer than the training.
TINY += ["--set", "eval.reference="]


def test_rows_cover_the_batch_once():
    for total in (1, 7, 64):
        for size in (1, 2, 3, 5):
            parts = [World(rank, size).rows(total) for rank in range(size)]
            covered = [row for start, count in parts for row in range(start, start + count)]
            assert covered == list(range(total))
            assert max(count for _, count in parts) - min(count for _, count in parts) <= 1


@pytest.mark.parametrize(
    ("recipe", "batch", "micro", "size", "words"),
    [
        ("ict", 1, None, 2, "leaves some of the 2 processes without an image"),
        ("ict-ot", 3, None, 2, "at least 2 images in every forward pass: 3 over 2 processes"),
        ("ict-ot", 10, 4, 2, "leave one alone"),
    ],
)
def test_rows_that_leave_a_process_waiting_are_refused(recipe, batch, micro, size, words):
    """One process would go without a loss, or fail alone, and the others wait for it for ever."""
    config = config_of(recipe, batch=batch, **({"train.micro_batch": micro} if micro else {}))
    with pytest.raises(ConfigError, match=words) as refused:
        check_rows(config, World(0, size))
    assert "--batch-size" in str(refused.value.hint)
    check_rows(config_of(recipe, batch=8, **({"train.micro_batch": micro} if micro else {})), World(0, size))


def test_a_recipe_that_depends_on_the_number_of_processes_says_so():
    for recipe, sets, wanted in (
        ("ict-ot", (), True),
        ("ict-pm", ('recipe.direction.pool="batch"',), True),
        ("ict-pm", (), False),
        ("ict", ('recipe.direction.pool="batch"',), False),
    ):
        config = config_of(recipe, *sets)
        notes = prepare(config, load_dataset(config.data), torch.device("cpu"), World(0, 2)).notes
        assert any("another number of processes trains otherwise" in note for note in notes) == wanted


def launch(folder: Path, processes: int, steps: int, extra: tuple[str, ...] = (), command: str = "train-ct") -> None:
    words = [command, *TINY, "--steps", str(steps), "--out", str(folder), *extra]
    if processes == 1:
        assert run(words) == 0  # in this process, which has imported torch already
        return
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    done = subprocess.run([*start, "cmtool", *words], capture_output=True, text=True, timeout=900, cwd=folder.parent)
    assert done.returncode == 0, done.stderr


def test_two_processes_agree_with_one(tmp_path):
    launch(tmp_path / "one", 1, 4)
    launch(tmp_path / "two", 2, 4)
    one, _ = load_tensors(tmp_path / "one" / "model.safetensors")
    two, _ = load_tensors(tmp_path / "two" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-7)
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [2, 4]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["bands"] == pytest.approx(b["bands"], rel=1e-9)


@pytest.mark.slow
def test_a_fake_network_is_trained_alike_by_two_processes(tmp_path):
    """20 steps of score distillation: the student's weights and, in the checkpoint, the fake network's."""
    extra = ("--recipe", "sid", "--teacher", str(teacher_file(tmp_path / "teacher.safetensors")))
    extra += ("--set", "recipe.score.fake_steps=2")
    states = []
    for processes in (1, 2):
        launch(tmp_path / str(processes), processes, 20, extra, "train-cd")
        states.append(load_tensors(RunFolder(tmp_path / str(processes)).checkpoint(20))[0])
    assert any(name.startswith("fake.") for name in states[0])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--recipe", "soflow"),
        ("--recipe", "shortcut"),
        ("--set", "train.optimizer=muon", "--set", "network.channels=32"),
    ],
    ids=["soflow", "shortcut", "muon"],
)
def test_two_legs_and_muon_agree_too(words, tmp_path):
    weights = []
    for processes in (1, 2):
        launch(tmp_path / str(processes), processes, 20, words)
        weights.append(load_tensors(tmp_path / str(processes) / "model.safetensors")[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_samples_of_two_processes_in_float32_are_those_of_one(tmp_path):
    """Weights drift by rounding where the true gradient is zero; what the models make does not."""
    made = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch(folder, processes, 20, ("--precision", "fp32", "--set", "train.lr=1e-2", "--set", "train.warmup=0"))
        model = load(folder / "model.safetensors")
        made += [batch.x0 for batch in generate(model, plan_sampling(model.header), range(16))]
    assert float(made[0].std()) > 0.05
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=2e-2)


@pytest.mark.slow
def test_a_recipe_with_a_forward_derivative_agrees_too(tmp_path):
    """Its derivative bypasses a wrapped network's hooks: gradients are summed by hand."""
    launch(tmp_path / "first", 1, 2)
    sets = ("--recipe", "ct-inf", "--init", str(tmp_path / "first"))
    weights = []
    for processes in (1, 2):
        launch(tmp_path / str(processes), processes, 6, sets)
        weights.append(load_tensors(tmp_path / str(processes) / "model.safetensors")[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_groups_of_samples_agree_too(tmp_path):
    weights = []
    for processes in (1, 2):
        launch(tmp_path / str(processes), processes, 20, ("--recipe", "imm", "--batch-size", "16"))
        weights.append(load_tensors(tmp_path / str(processes) / "model.safetensors")[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path):
    launch(tmp_path / "whole", 1, 8)
    launch(tmp_path / "part", 2, 8, ("--max-time", "0.01s"))
    launch(tmp_path / "part", 1, 8)
    whole, _ = load_tensors(tmp_path / "whole" / "model.safetensors")
    part, _ = load_tensors(tmp_path / "part" / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(part[name], tensor, rtol=0, atol=1e-7)
