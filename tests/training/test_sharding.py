"""FSDP2: weights, gradients, averages and moments in pieces take the steps that whole ones take (two gloo processes)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from cmtool.checkpoint import load_tensors
from cmtool.config.load import differing_keys
from cmtool.errors import ConfigError
from cmtool.machine.world import World
from cmtool.models import load
from cmtool.training.optimizers import all_finite
from cmtool.training.setup import fresh_student, prepare
from cmtool.training.sharding import check_derivative, check_shardable, gathers_in_derivatives, local, units, whole
from tests.training.shard_worker import CASES, trainer
from tests.training.test_distributed import launch
from tests.training.tiny import config_of


@pytest.fixture(scope="module")
def found(two_processes):
    """What both processes found, by rank, and the folder they wrote into."""
    return [json.loads((two_processes / f"found-{rank}.json").read_text()) for rank in (0, 1)], two_processes


@pytest.mark.parametrize("name", CASES)
def test_two_sharded_processes_agree_with_one(found, name):
    for told in found[0]:
        assert told[name]["difference"] < 1e-7
        assert told[name]["loss"][0] == pytest.approx(told[name]["loss"][1], rel=1e-9)
        assert told[name]["grad_norm"][0] == pytest.approx(told[name]["grad_norm"][1], rel=1e-9)
        assert told[name]["norms"][0] == pytest.approx(told[name]["norms"][1], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_half(found, name):
    """Weights, target, average and both moments; a few numbers stay whole, and odd rows cannot be halved."""
    told = [rank[name] for rank in found[0]]
    assert all(0.4 < part["held"] / part["whole"] < 0.6 for part in told)
    assert 1 <= sum(part["held"] for part in told) / told[0]["whole"] < 1.05


def test_a_weak_teacher_is_split_beside_the_teacher_and_a_fake_network_too(found):
    """Student, average, target of its own, teacher; and what else a recipe has."""
    split = {name: rank[name]["split"] for rank in found[0] for name in CASES}
    assert (split["ict"], split["cd"], split["weak teacher"], split["fake network"]) == (2, 4, 5, 4)


def test_a_sharded_checkpoint_is_the_one_of_a_single_process(found):
    told, folder = found
    sharded, header = load_tensors(folder / "sharded.safetensors")
    single, other = load_tensors(folder / "whole.safetensors")
    assert sharded.keys() == single.keys() and header["step"] == other["step"] == 20
    for name, tensor in single.items():
        assert sharded[name].shape == tensor.shape
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=1e-7)
    assert load(folder / "model.safetensors").kind == "consistency"
    assert all(rank["ict"]["resumed"] < 1e-7 for rank in told)
    assert [rank["ict"]["copied"] for rank in told] == [rank["ict"]["main"] for rank in told]


def back_to_the_middle(run: Path) -> None:
    """Leave of a run of 6 steps what a kill after step 3 would have left."""
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000003"]


@pytest.mark.slow
def test_sharded_and_whole_runs_go_on_from_each_other(tmp_path):
    """As typed: what two sharded processes began one whole process ends, and the other way round."""
    rhythm, shard = ("--set", "train.checkpoint_every=3"), ("--set", "train.shard=true")
    launch(tmp_path / "one", 1, 6, rhythm)
    shutil.copytree(tmp_path / "one", tmp_path / "back")
    back_to_the_middle(tmp_path / "back")
    launch(tmp_path / "back", 2, 6, (*rhythm, *shard))
    launch(tmp_path / "part", 2, 6, (*rhythm, *shard))
    back_to_the_middle(tmp_path / "part")
    launch(tmp_path / "part", 1, 6, rhythm)
    one, _ = load_tensors(tmp_path / "one" / "model.safetensors")
    for run in ("part", "back"):
        other, _ = load_tensors(tmp_path / run / "model.safetensors")
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-7)
        assert "start at step 3 of 6" in (tmp_path / run / "run.log").read_text()
        assert [path.name for path in (tmp_path / run / "samples").iterdir()] == ["step-0000006.png"]


def test_one_process_has_nothing_to_share():
    run = trainer(config_of("ict", "train.shard=true"))
    assert run.state.sharding is None
    assert any("single process" in note for note in run.notes)
    assert not differing_keys(config_of("ict"), config_of("ict", "train.shard=true"))
    tensor = torch.ones(2)
    assert local(tensor) is tensor and torch.equal(whole(tensor), tensor)


@pytest.mark.parametrize(
    ("recipe", "sets", "said"),
    [
        ("ict", ("train.micro_batch=auto",), "give a number"),
        ("ict", ("train.compile=true",), "exclude each other"),
        ("ict", ("train.optimizer=muon",), "needs it whole"),
        ("tcm", (), "leave train.shard out"),
        ("cd-inf-full", (), "recipe.target.stop_gradient = true or recipe.target.derivative = 'difference'"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_choices(recipe, sets, said):
    with pytest.raises(ConfigError, match=said):
        config_of(recipe, *sets, "train.shard=true")


def test_an_uneven_batch_is_refused_with_batches_that_fit():
    check_shardable(8, World(0, 2))
    with pytest.raises(ConfigError, match="10 over 4 is uneven") as caught:
        check_shardable(10, World(0, 4))
    assert "--batch-size 8 or 12" in (caught.value.hint or "")
    config = config_of("ict", "train.shard=true", batch=3)
    with pytest.raises(ConfigError, match="3 over 2 is uneven"):
        prepare(config, None, torch.device("cpu"), World(0, 2))


def test_forward_mode_where_torch_cannot_gather_is_refused_with_the_setting_that_does_without(monkeypatch):
    config = config_of("cd-inf", "train.shard=true")
    monkeypatch.setattr("cmtool.training.sharding.gathers_in_derivatives", lambda: True)
    check_derivative(config.recipe.target)
    monkeypatch.setattr("cmtool.training.sharding.gathers_in_derivatives", lambda: False)
    with pytest.raises(ConfigError, match=r"from torch 2\.13 on") as caught:
        check_derivative(config.recipe.target)
    assert "recipe.target.derivative=difference" in (caught.value.hint or "")
    check_derivative(config_of("cd-inf", "train.shard=true", "recipe.target.derivative=difference").recipe.target)
    check_derivative(config_of("ict", "train.shard=true").recipe.target)
    assert [gathers_in_derivatives(TorchVersion(name)) for name in ("2.10.0", "2.12.1", "2.13.0+cpu", "2.14.1")] == [
        False,
        False,
        True,
        True,
    ]


def test_blocks_are_gathered_one_by_one():
    """A unit a block, so that no more than one of them is whole at a time; small layers belong to the network."""
    from cmtool.data.load import load_dataset

    for kind in ("adm", "song", "edm2"):
        config = config_of("ict", f"network.kind={kind}")
        network = fresh_student(config, load_dataset(config.data)).network
        parts = list(units(network))
        total = sum(p.numel() for p in network.parameters())
        inside = sum(p.numel() for part in parts for p in part.parameters())
        assert len(parts) >= 2 and inside > 0.6 * total
        assert len({id(p) for part in parts for p in part.parameters()}) == sum(
            1 for x in parts for _ in x.parameters()
        )


def test_a_process_without_rows_has_nothing_that_is_not_finite():
    empty = nn.Linear(1, 1)
    empty.weight, empty.bias = nn.Parameter(torch.empty(0, 1)), nn.Parameter(torch.empty(0))
    assert all_finite([empty])
