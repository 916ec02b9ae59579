"""Compiling and prefetching change speed alone; what cannot be compiled runs as it is."""

import pytest
import torch

from cmtool.errors import ConfigError
from cmtool.training import compiling
from cmtool.training.batches import Ahead, Batches
from cmtool.training.compiling import compile_all, compile_network, leave_plain
from cmtool.training.sharding import units
from tests.training.tiny import FLAGS, config_of, teacher_file, trainer_of, with_source

ADM = ("network.kind=adm", "network.channels=8", "network.channel_mult=[1]", "network.num_blocks=3")
ADM += ("network.group_channels=4", "network.attention=[]")
MLP = ("network.kind=mlp", "network.num_blocks=1")


def broken(graph, inputs):
    raise RuntimeError("no C++ compiler\nfound")


def test_a_compiled_network_answers_the_same_and_keeps_its_names():
    plain, compiled = (trainer_of(config_of("ict", *MLP, steps=2)) for _ in range(2))
    names = list(compiled.state.student.network.state_dict())
    assert compile_network(compiled.state.student, 8, backend="eager") is None
    assert all(block._compiled_call_impl for block in units(compiled.state.student.network))
    assert list(compiled.state.student.network.state_dict()) == names
    assert all(parameter.grad is None for parameter in compiled.state.parameters())
    for _ in range(2):
        plain.step()
        compiled.step()
    for a, b in zip(plain.state.parameters(), compiled.state.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_of_one_kind_are_compiled_once(checkpointing):
    """Eight residual blocks of three kinds; the answer and its gradients are the plain network's."""
    sets = (*ADM, f"network.checkpointing={str(checkpointing).lower()}")
    plain, compiled = (trainer_of(config_of("ict", *sets, steps=2)) for _ in range(2))
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    assert compile_network(compiled.state.student, 8, backend=counting) is None
    blocks = list(units(compiled.state.student.network))
    assert 0 < len(graphs) < len(blocks)
    for _ in range(2):
        plain.step()
        compiled.step()
    for a, b in zip(plain.state.parameters(), compiled.state.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_transformer_is_compiled_block_by_block():
    config = config_of("ict", "network.kind=dit", "network.depth=3", steps=2)
    plain, compiled = (trainer_of(config) for _ in range(2))
    network = compiled.state.student.network
    assert compile_network(compiled.state.student, 8, backend="eager") is None
    assert [block._compiled_call_impl is None for block in (network, *network.blocks)] == [True, False, False, False]
    for _ in range(2):
        plain.step()
        compiled.step()
    for a, b in zip(plain.state.parameters(), compiled.state.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    leave_plain(network)
    assert all(block._compiled_call_impl is None for block in network.blocks)


def test_a_failing_compiler_leaves_the_network_as_it_was():
    trainer = trainer_of(config_of("ict", *MLP, steps=1))
    reason = compile_network(trainer.state.student, 8, backend=broken)
    assert "no C++ compiler" in reason
    assert "\n" not in reason
    trainer.step()
    assert trainer.state.step == 1


def test_compiling_is_asked_for_and_its_failure_said(monkeypatch):
    assert compile_all(config_of("ict"), trainer_of(config_of("ict")).state, (), 8) == []
    monkeypatch.setattr(compiling, "compile_network", lambda model, batch: "RuntimeError: no compiler")
    trainer = trainer_of(config_of("ict", "train.compile=true", steps=1))
    assert "run as they are (RuntimeError: no compiler)" in trainer.notes[-1]
    trainer.step()


def test_what_was_compiled_before_the_failure_runs_as_it_is_too(monkeypatch):
    """Two networks, the second fails: the message says that none is compiled, and none is."""
    trainer, calls = trainer_of(config_of("ct", *MLP, "recipe.target.ema=0.9", steps=1)), []

    def second_fails(model, batch):
        calls.append(model)
        for block in units(model.network):
            block.compile(backend="eager")
        return "RuntimeError: no memory" if len(calls) == 2 else None

    monkeypatch.setattr(compiling, "compile_network", second_fails)
    said = compile_all(config_of("ct", *MLP, "train.compile=true", steps=1), trainer.state, (), 8)
    assert len(calls) == 2
    assert "no memory" in said[0]
    assert not any(block._compiled_call_impl for model in calls for block in units(model.network))


@pytest.mark.slow
def test_blocks_are_compiled_by_inductor_on_a_cpu():
    plain, compiled = (trainer_of(config_of("ict", *ADM, steps=2)) for _ in range(2))
    assert compile_network(compiled.state.student, 8) is None
    for _ in range(2):
        plain.step()
        compiled.step()
    for a, b in zip(plain.state.parameters(), compiled.state.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_kernels_of_our_own_need_a_gpu():
    trainer = trainer_of(config_of("ict", "train.fused_norm=true", steps=1))
    assert any("train.fused_norm needs a GPU" in note for note in trainer.notes)
    trainer.step()


def test_recipes_with_a_forward_derivative_refuse_to_be_compiled(tmp_path):
    source = str(teacher_file(tmp_path / "t.safetensors"))
    with pytest.raises(ConfigError, match="forward-mode derivative"):
        with_source("sct", tmp_path, "train.compile=true", init=source)


def test_the_next_step_is_made_ahead_and_what_is_not_asked_for_is_dropped():
    made = []

    def make(step, start, count):
        made.append((step, start, count))
        return made[-1]

    ahead = Ahead(make)
    for step in (5, 6, 7, 2, 3):
        for start in (0, 4):
            assert ahead.take(step, start, 4) == (step, start, 4)
    ahead._pool.shutdown()
    assert made[:2] in ([(5, 0, 4), (6, 0, 4)], [(5, 0, 4), (5, 4, 4)])
    assert made.count((6, 0, 4)) == 1
    assert len(made) <= 14


@pytest.mark.parametrize("recipe", ["ict", "edm"])
def test_images_made_ahead_are_those_of_their_step(recipe):
    plain, early = (trainer_of(config_of(recipe, steps=3)) for _ in range(2))
    early.batches = Batches(early.config, early.dataset, early.device, early.dtype, ahead=True)
    for _ in range(3):
        plain.step()
        early.step()
    for a, b in zip(plain.state.parameters(), early.state.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_says_its_precision_and_a_wrong_micro_batch_is_refused(cmtool):
    # Unjudged: no search for sampling times at the end.
    words = ["train-ct", "--steps", 2, "--batch-size", 8, *FLAGS, "--set", "eval.reference=", "--out", "run"]
    refused = cmtool(*words, "--micro-batch", "some")
    assert refused.code == 2
    assert "--micro-batch 'some' must be a number of images from 1 up, or auto." in refused.err
    done = cmtool(*words, "--micro-batch", "auto")
    assert done.code == 0, done.err
    assert "precision fp32" in done.err


def guided_by_weak(folder):
    """Settings of autoguidance in distillation."""
    weak = teacher_file(folder / "weak.safetensors", seed=6)
    return "recipe.direction.guidance=2.0", f'recipe.direction.weak="{weak}"'


@pytest.mark.parametrize("recipe", ["sid", "cd"])
def test_fake_and_weak_networks_are_compiled_too(recipe, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(compiling, "compile_network", lambda model, batch: compiled.append(model))
    sets = guided_by_weak(tmp_path) if recipe == "cd" else ()
    trainer = trainer_of(with_source(recipe, tmp_path, "train.compile=true", *sets))
    nets = trainer.nets
    own = {nets.student, nets.target, nets.teacher, nets.fake} - {None}
    assert own < set(compiled) if recipe == "cd" else own == set(compiled)  # beside them the weak model
    assert len(compiled) == len(set(compiled)) == {"sid": 3, "cd": 4}[recipe]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sid", "dmd2", "cd"])
def test_steps_of_compiled_fake_and_weak_networks_are_the_plain_ones(recipe, tmp_path, monkeypatch):
    eager = compiling.compile_network
    monkeypatch.setattr(compiling, "compile_network", lambda model, batch: eager(model, batch, backend="eager"))
    sets = guided_by_weak(tmp_path) if recipe == "cd" else ()
    plain = trainer_of(with_source(recipe, tmp_path, *sets, steps=2))
    trainer = trainer_of(with_source(recipe, tmp_path, "train.compile=true", *sets, steps=2))
    assert any("compiled by blocks" in note for note in trainer.notes)
    for _ in range(2):
        plain.step()
        trainer.step()
    for a, b in zip(plain.state.parameters(), trainer.state.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
