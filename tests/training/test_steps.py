"""Steps of training: the same seed gives the same bits, however a run is cut up."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from cmtool.errors import DivergenceError, UserError
from cmtool.machine.stopping import Stop
from cmtool.training.batches import batch_indices
from cmtool.training.run_folder import RunFolder
from cmtool.training.session import Session
from tests.training.tiny import (
    Heard,
    advance,
    change_loss,
    config_of,
    reports,
    run,
    same,
    train,
    trainer_of,
    with_source,
)

TWO_AVERAGES = ('train.extra_emas=[{kind="exponential",decay=0.9}]', 'train.ema={kind="power",std=0.10}')


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}


@pytest.mark.parametrize("recipe", ["edm", "ict-pm", "ct"])
def test_the_same_seed_gives_the_same_bits(recipe):
    def run(seed=0):
        trainer = trainer_of(config_of(recipe, steps=3, **{"train.seed": seed}))
        advance(trainer, 3)
        return weights(trainer)

    first = run()
    assert same(first, run())
    assert not same(first, run(seed=1))


def test_another_seed_starts_from_other_weights():
    first, second = (weights(trainer_of(config_of("edm", **{"train.seed": seed}))) for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_torchs_own_generator_has_no_say():
    config = config_of("ict", "network.dropout=0.2", steps=2)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer = trainer_of(config)
        torch.manual_seed(seed + 10)
        advance(trainer, 2)
        results.append(weights(trainer))
    assert same(*results)


@pytest.mark.parametrize(
    ("recipe", "sets"),
    [
        ("edm", (*TWO_AVERAGES, "train.optimizer=adamw")),
        ("ict-pm", TWO_AVERAGES),
        ("cd", (*TWO_AVERAGES, "recipe.target.ema=0.95")),
        ("ct", ("train.optimizer=lion", "network.dropout=0.3")),
        ("ect", ("train.optimizer=adam", "train.grad_clip=0.5")),
        ("sid", (*TWO_AVERAGES, "recipe.score.fake_steps=2", "recipe.score.levels=[20.0,1.0]")),
        ("imm", ("train.micro_batch=4",)),
        ("ict", ("train.optimizer=sgd", "train.precision=fp64")),
        ("soflow", ("train.optimizer=adam", "network.dropout=0.3")),
        ("aflow", ("train.optimizer=adam", "recipe.legs.ends=0.6")),
        ("ict", ("network.kind=dit", "network.depth=2")),
        ("ict", ("network.kind=dit", "network.depth=1", "network.width=32", "train.optimizer=muon")),
        ("edm", ("network.channels=32", "train.optimizer=muon")),
    ],
)
def test_twenty_steps_are_ten_and_ten_to_the_bit(tmp_path, recipe, sets):
    """The second half runs in a new trainer from the checkpoint alone, after a kill in the middle of step 14."""
    config = with_source(recipe, tmp_path, *sets, "train.checkpoint_every=10", "train.sample_every=1000", steps=20)
    train(config, tmp_path / "whole")

    class Killed(BaseException):
        """Not an Exception: nothing may catch it and tidy up."""

    trainer = trainer_of(config)
    (tmp_path / "cut").mkdir()
    advance = trainer.state.advance_averages

    def dies(decay):
        if trainer.state.step == 14:
            raise Killed
        advance(decay)

    trainer.state.advance_averages = dies
    with pytest.raises(Killed):
        run(Session(trainer, RunFolder(tmp_path / "cut"), Heard()))
    assert [step for step, _ in RunFolder(tmp_path / "cut").checkpoints()] == [10]
    train(config, tmp_path / "cut")
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert whole.model.read_bytes() == cut.model.read_bytes()
    assert whole.checkpoint(20).read_bytes() == cut.checkpoint(20).read_bytes()
    rows = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in run.rows()] for run in (whole, cut)]
    assert str(rows[0]) == str(rows[1]) and len(rows[0]) == 2


@pytest.mark.parametrize("recipe", ["edm", "ict-pm", "ect"])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_are_the_whole_batch(tmp_path, recipe, micro):
    """Noise, times and images are the very same numbers; the gradient is, up to rounding (float64: 1e-10)."""
    seen = []

    def gradient(*sets):
        trainer = trainer_of(
            with_source(recipe, tmp_path, "train.precision=fp64", "train.optimizer=sgd", *sets, steps=4)
        )
        rows, rule = [], trainer.objective.target

        def spy(nets, points):
            rows.append((points.x0, points.z, points.t, points.r))
            return rule(nets, points)

        trainer.objective = replace(trainer.objective, target=spy)
        trainer.step()
        seen.append([torch.cat(column) for column in zip(*rows, strict=True)])
        return {name: p.grad for name, p in trainer.state.student.named_parameters()}

    whole, parts = gradient(), gradient(f"train.micro_batch={micro}")
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_every_image_is_seen_once_in_an_epoch():
    config = config_of("edm", steps=16)
    trainer = trainer_of(config)
    seen = torch.cat([batch_indices(0, step, 8, 64) for step in range(8)])
    assert sorted(seen.tolist()) == list(range(64))
    images = trainer.batches.take(0, 0, 8)[0]
    expected = trainer.dataset.batch(batch_indices(0, 0, 8, 64))[0]
    assert torch.equal(images, expected)


def test_flips_are_half_of_the_images_and_follow_the_row():
    trainer = trainer_of(config_of("edm", "data.flip=true", batch=32))
    plain = trainer_of(config_of("edm", batch=32))
    flipped, straight = trainer.batches.take(0, 0, 32)[0], plain.batches.take(0, 0, 32)[0]
    turned = [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(flipped, straight, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, straight, strict=True)]
    assert all(t or k for t, k in zip(turned, kept, strict=True)) and 6 < sum(turned) < 26
    assert torch.equal(trainer.batches.take(0, 10, 7)[0], flipped[10:17])


def test_labels_and_their_dropout():
    sets = ("data.labels=true", "train.label_dropout=0.3")
    trainer = trainer_of(config_of("edm", *sets, batch=64))
    labels = trainer.batches.take(0, 0, 64)[1]
    plain = trainer_of(config_of("edm", "data.labels=true", batch=64)).batches.take(0, 0, 64)[1]
    dropped = labels == -1
    assert 8 < int(dropped.sum()) < 32 and torch.equal(labels[~dropped], plain[~dropped])
    assert torch.equal(trainer.batches.take(0, 30, 20)[1], labels[30:50])


def test_a_target_with_a_decay_follows_slowly(tmp_path):
    trainer = trainer_of(with_source("cd", tmp_path, "recipe.target.ema=0.95", steps=4))
    before = weights(trainer)
    trainer.step()
    after = weights(trainer)
    name = next(n for n in before if n.startswith("student.") and not torch.equal(before[n], after[n]))
    key = name.removeprefix("student.")
    expected = 0.95 * before[f"target.{key}"] + 0.05 * after[name]
    torch.testing.assert_close(after[f"target.{key}"], expected, rtol=1e-6, atol=1e-7)
    assert trainer.state.target is not trainer.state.student


def test_reports_sum_up_the_steps_since_the_last():
    trainer = trainer_of(config_of("ict", "train.log_every=4", steps=10))
    found = list(reports(trainer))
    assert [report.step for report in found] == [4, 8, 10]
    assert [report.images_seen for report in found] == [32, 64, 80]
    assert all(report.images_per_s > 0 and report.loss > 0 for report in found)
    assert all(set(report.bands) <= {"<0.02", "<0.1", "<0.5", "<2", "<10", ">=10"} for report in found)


def test_a_student_takes_over_its_teachers_weights(tmp_path):
    from cmtool.models import load

    config = with_source("cd", tmp_path)
    theirs = load(config.teacher).network.state_dict()
    assert same(trainer_of(config).state.student.network.state_dict(), theirs)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stop_before_the_averages(where, bad):
    trainer = trainer_of(config_of("edm", steps=8))
    advance(trainer, 2)
    before = weights(trainer)
    if where == "loss":
        change_loss(trainer, lambda loss: _times(loss, bad))
    else:
        trainer.state.parameters()[3].register_hook(lambda grad: torch.full_like(grad, bad))
    with pytest.raises(DivergenceError, match="not finite at step 2"):
        trainer.step()
    assert same(before, weights(trainer)), "weights, averages and moments must be those of the last good step"


def _times(loss, factor):
    return replace(loss, weighted=loss.weighted * factor)


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path):
    config = config_of("edm", "train.checkpoint_every=4", "train.sample_every=1000", steps=12)
    trainer = trainer_of(config)
    (tmp_path / "run").mkdir()
    change_loss(trainer, lambda loss: _times(loss, float("nan") if trainer.state.step == 6 else 1.0))
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="step 6"):
        run(Session(trainer, folder, Heard()))
    assert [step for step, _ in folder.checkpoints()] == [4] and not folder.finished()
    train(config, tmp_path / "run")
    train(config, tmp_path / "whole")
    assert folder.model.read_bytes() == RunFolder(tmp_path / "whole").model.read_bytes()


def test_a_run_pauses_where_something_is_due_and_at_its_end():
    trainer = trainer_of(config_of("edm", steps=10))
    found = [(trainer.state.step, due.steps, due.stopped) for due in trainer.run(intervals=[4, 0, 3])]
    assert found == [(3, 3, False), (4, 1, False), (6, 2, False), (8, 2, False), (9, 1, False), (10, 1, False)]
    assert list(trainer.run()) == []


def test_a_run_that_is_told_to_stop_pauses_once_more():
    trainer, stop = trainer_of(config_of("edm", steps=10)), Stop()
    found = []
    for due in trainer.run(stop, [4]):
        found.append((trainer.state.step, due.steps, due.stopped))
        stop.signal = 15
    assert found == [(4, 4, False), (4, 0, True)]


def test_a_bad_step_ends_a_run_that_nobody_rolls_back():
    trainer = trainer_of(config_of("edm", steps=10))
    change_loss(trainer, lambda loss: _times(loss, float("nan") if trainer.state.step == 6 else 1.0))
    found = []
    with pytest.raises(DivergenceError, match="not finite at step 6"):
        for due in trainer.run(intervals=[4]):
            found.append((trainer.state.step, due.steps, due.error is not None))
    assert found == [(4, 4, False), (6, 2, True)]


def test_time_spent_in_pauses_does_not_count_for_the_speed():
    trainer, taken = trainer_of(config_of("edm", steps=4)), []
    plain = trainer.step

    def timed():
        began = time.perf_counter()
        plain()
        taken.append(time.perf_counter() - began)

    trainer.step = timed
    for _ in trainer.run(intervals=[1]):
        if trainer.state.step < 4:
            time.sleep(0.3)
    assert 4 * 8 / trainer.report().images_per_s < sum(taken) + 0.6, "the pauses took 0.9 s"
