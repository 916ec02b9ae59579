"""A third network that is trained: its steps, its state, and the models that its runs may start from."""

import os
import signal

import pytest
import torch

from cmtool.checkpoint import load_tensors, read_header, save_model
from cmtool.errors import CheckpointError, ConfigError
from cmtool.machine.stopping import stoppable
from cmtool.models import load
from cmtool.training.inherit import adopt, check_needs, check_teacher
from cmtool.training.run_folder import RunFolder
from tests.training.tiny import advance, config_of, run, same, session_of, teacher_file, trainer_of, with_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where teachers and starts are written once."""
    return tmp_path_factory.mktemp("sources")


def steps_of(learner):
    return {int(entries["step"]) for entries in learner.optimizer.state.values()}


def test_the_fake_network_takes_more_steps_than_the_model(folder):
    trainer = trainer_of(with_source("dmd2", folder, "recipe.score.fake_steps=3", "recipe.score.fake_lr=2.0"))
    fake, teacher = trainer.state.fake, trainer.nets.teacher
    assert all(torch.equal(a, b) for a, b in zip(fake.parameters(), teacher.parameters(), strict=True))
    before = [p.clone() for p in teacher.parameters()]
    advance(trainer, 2)
    assert (steps_of(trainer.state.learner), steps_of(fake)) == ({2}, {6})
    rates = [learner.optimizer.param_groups[0]["lr"] for learner in trainer.state.learners]
    assert rates[1] == 2 * rates[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert trainer.report().images_seen == 16


@pytest.mark.parametrize("recipe", ["dmd2", "polish"])
def test_micro_batches_give_both_networks_the_gradients_of_the_whole(folder, recipe):
    """Also with several levels: an image's level depends on its place in the batch."""
    found = []
    for sets in ((), ("train.micro_batch=3",)):
        config = with_source(recipe, folder, "train.precision=fp64", "recipe.score.levels=[80.0,1.0]", *sets)
        trainer = trainer_of(config.model_copy(update={"train": config.train.model_copy(update={"optimizer": "sgd"})}))
        advance(trainer, 1)
        found.append([p.grad for learner in trainer.state.learners for p in learner.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_fake_network_of_several_levels_starts_as_the_teacher(folder):
    trainer = trainer_of(with_source("sid", folder, "recipe.score.levels=[80.0,1.0]"))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    fake, teacher = trainer.state.fake.model, trainer.nets.teacher
    for level in (1.0, 80.0):
        assert torch.allclose(fake(x, t, None, torch.full((3,), level)), teacher(x, t), atol=1e-6)


def test_the_forecast_counts_the_third_network(folder):
    plain, scored = (trainer_of(with_source(recipe, folder)) for recipe in ("cd", "sid"))
    weights = sum(p.numel() * 4 for p in plain.state.parameters())
    copies = plain.state.target is not plain.state.student
    assert scored.needs.checkpoint == plain.needs.checkpoint - copies * weights + 3 * weights
    advance(scored, 1)
    kept = sum(tensor.nbytes for tensor in scored.state.tensors().values() if tensor.dim())
    assert scored.needs.checkpoint == pytest.approx(kept, rel=0.01)
    assert scored.needs.memory - scored.needs.checkpoint == 2 * weights


def test_averages_follow_the_model_and_not_the_fake_network(folder):
    trainer = trainer_of(with_source("sid", folder, 'train.ema={kind="none"}'))
    advance(trainer, 2)
    student, average = trainer.state.student.network.state_dict(), trainer.state.ema.network.state_dict()
    assert same(student, average)
    assert not same(student, trainer.state.fake.model.network.state_dict())


def test_a_signal_after_the_fake_network_has_moved_waits_for_the_end_of_the_step(folder, tmp_path):
    """Half a step must not be kept: the same run without the signal has the same weights."""
    config = with_source("dmd2", folder, "recipe.score.fake_steps=3", "train.checkpoint_every=10", steps=3)
    for turn in (0, 1):
        session, _ = session_of(config, tmp_path / str(turn))
        follow, calls = session.trainer.objective.follow, []

        def signaled(nets, x0, label, rows, follow=follow, calls=calls, turn=turn):
            calls.append(rows)
            if rows.step == 1 and len(calls) == 2 + turn + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return follow(nets, x0, label, rows)

        object.__setattr__(session.trainer.objective, "follow", signaled)
        with stoppable() as stop:
            assert run(session, stop).step == 1 + turn
        assert run(session_of(config, tmp_path / str(turn))[0]).step == 3
    ends = [RunFolder(tmp_path / str(turn)).model.read_bytes() for turn in (0, 1)]
    assert ends[0] == ends[1]


# --- where runs start ------------------------------------------------------------------------------------------------


def test_a_run_from_a_teacher_starts_at_a_moderate_level_and_one_from_a_consistency_model_at_its_own(folder):
    teacher = read_header(teacher_file(folder / "t.safetensors"))
    start = read_header(teacher_file(folder / "c.safetensors", recipe="icd"))
    from_teacher, from_model = (adopt(config_of("sid"), header) for header in (teacher, start))
    assert from_teacher.recipe.score.levels == (2.5,) and from_teacher.process.sigma_max == 2.5
    assert from_model.recipe.score.levels == (80.0,) and from_model.process.sigma_max == 80.0
    given = adopt(config_of("sid", "recipe.score.levels=[20.0, 1.0]"), teacher)
    assert given.recipe.score.levels == (20.0, 1.0) and given.process.sigma_max == 20.0
    assert from_teacher.sample.times == {} and from_model.sample.times == {"2": (80.0, 0.8)}
    assert given.sample.times == {"2": (20.0, 1.0)}
    with pytest.raises(ConfigError, match="leaves the noise levels"):
        adopt(config_of("sid", "recipe.score.levels=[100.0]"), teacher)


def changed(path, **tables):
    """Write a copy of a model whose header says something else."""
    tensors, header = load_tensors(path)
    other = path.with_name(f"{path.stem}-{'-'.join(tables)}.safetensors")
    merged = {k: header.get(k, {}) | v if isinstance(v, dict) else v for k, v in tables.items()}
    save_model(other, tensors, header | merged)
    return other


def test_a_teacher_of_another_process_or_resolution_is_refused(folder):
    teacher = teacher_file(folder / "t.safetensors")
    start = read_header(teacher_file(folder / "c.safetensors", recipe="icd"))
    config = config_of("sid")
    check_teacher(config, read_header(teacher), start)
    for tables, words in (
        ({"process": {"sigma_max": 40.0}}, "another process: its sigma_max is 40"),
        ({"process": {"sigma_data": 1.0}}, "another process: its sigma_data is 1"),
        ({"data": {"resolution": 16}}, "the teacher has resolution 16"),
        ({"data": {"num_classes": 10}}, "the teacher has 10 classes"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_teacher(config, read_header(changed(teacher, **tables)), start)


def test_polish_needs_a_model_of_several_steps(folder):
    start = teacher_file(folder / "c.safetensors", recipe="icd")
    adopt(config_of("polish"), read_header(start))
    with pytest.raises(CheckpointError, match="goes on from a consistency model"):
        adopt(config_of("polish"), read_header(teacher_file(folder / "t.safetensors")))
    one = {"recipe_name": "kd", "recipe": {"times": {"kind": "largest"}, "score": {"kind": "none", "keep": 0.0}}}
    scored = {"recipe_name": "sid", "recipe": {"times": {"kind": "lognormal"}, "score": {"kind": "sid", "keep": 0.0}}}
    for tables in (one, scored, {"network": {"two_time": True}}):
        with pytest.raises(CheckpointError, match="keeps a model's several steps") as caught:
            adopt(config_of("polish"), read_header(changed(start, **tables)))
        assert "recipe.score.keep=0" in caught.value.hint
    kept = {"recipe_name": "polish", "recipe": {"score": {"kind": "sid", "keep": 1.0}}}
    adopt(config_of("polish"), read_header(changed(start, **kept)))
    adopt(config_of("polish", "recipe.score.keep=0.0"), read_header(changed(start, **one)))


def test_polish_asks_for_both_models(folder):
    with pytest.raises(ConfigError, match="needs a teacher"):
        check_needs(config_of("polish"))
    with pytest.raises(ConfigError, match="starts from a trained consistency model"):
        check_needs(config_of("polish", teacher="t"))
    check_needs(config_of("polish", teacher="t", init="c"))
    check_needs(config_of("sid", teacher="t", init="c"))
    with pytest.raises(ConfigError, match="takes no --init"):
        check_needs(config_of("cd", teacher="t", init="c"))


def test_a_polished_model_keeps_its_range_and_its_weights_come_from_the_start(folder, tmp_path):
    config = with_source("polish", folder, steps=2)
    trainer = trainer_of(adopt(config, read_header(config.init)))
    start = load(config.init)
    assert same(trainer.state.student.network.state_dict(), start.network.state_dict())
    advance(trainer, 2)
    trainer.state.export(tmp_path / "polished.safetensors")
    assert load(tmp_path / "polished.safetensors").sigma_max == 80.0


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (("network.dropout=0.1",), "network.dropout would make them differ"),
        (("train.precision=bf16",), "half precision rounds away"),
        (("recipe.direction.kind=sample",), "compares with a teacher"),
        (("recipe.score.levels=[1.0,2.0]",), "strictly decreasing"),
        (("recipe.score.reach=[0.8,0.2]",), "two increasing shares"),
    ],
)
def test_settings_that_score_distillation_refuses(sets, words):
    with pytest.raises(ConfigError, match=words):
        config_of("sid", *sets)
