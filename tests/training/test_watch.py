"""Warnings of divergence, the float16 loss scale, gradient norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmtool.errors import DivergenceError
from cmtool.training.optimizers import LossScale, all_finite, gradient_norm
from cmtool.training.report import Report, Watch
from tests.training.tiny import advance, config_of, same, trainer_of


def report(step, loss, scales=10):
    return Report(step, 100, loss, loss, {}, scales, 0.0, 1e-3, 1.0, 1.0, step)


def test_a_loss_that_jumps_is_warned_of_once():
    watch = Watch()
    assert not any(watch.report(report(step, 1.0 + 0.5 * (step % 3)), 1.0) for step in range(10))
    (message,) = watch.report(report(10, 40.0), 1.0)
    assert "step 10" in message and "loss at N = 10 is 40" in message
    assert not watch.report(report(11, 40.0), 1.0)
    assert not watch.report(report(12, 1.0), 1.0)
    assert watch.report(report(13, 40.0), 1.0), "it came back to normal in between"


def test_a_loss_that_moves_with_n_is_no_news():
    watch = Watch()
    for step in range(10):
        watch.report(report(step, 1.0), 1.0)
    assert not watch.report(report(10, 30.0, scales=20), 1.0)


def test_a_loss_that_falls_below_zero_is_no_news_and_one_that_jumps_from_there_is():
    """Learned weights (sCM) let it pass zero: ten times a small negative number is no upper limit."""
    watch = Watch()
    falling = [-0.01, -0.012, -0.0187, -0.02, -0.03, -0.1765, -0.9, -2.0, -3.2]
    assert not any(watch.report(report(step, loss), 1.0) for step, loss in enumerate(falling))
    assert watch.report(report(20, 60.0), 1.0)


def test_the_norm_of_the_average_is_watched():
    watch = Watch()
    for step in range(6):
        assert not watch.report(report(step, 1.0), 2.5)
    (message,) = watch.report(report(6, 1.0), 25.0)
    assert "norm of the sampling average" in message


def test_quality_against_its_best():
    watch = Watch()
    assert not watch.quality(1, "fid", 20.0) and not watch.quality(2, "fid", 10.0) and not watch.quality(3, "fid", 19.0)
    (message,) = watch.quality(4, "fid", 21.0)
    assert "fid is 21 after 10" in message
    assert not watch.quality(5, "fid", 300.0) and not watch.quality(6, "fid", 9.0)
    assert watch.quality(7, "fid", 19.0)


def test_the_norm_of_the_average_is_that_of_all_its_weights():
    state = trainer_of(config_of("ict")).state
    with torch.no_grad():
        for parameter in state.ema.parameters():
            parameter.zero_()
        first, *_, last = state.ema.parameters()
        first.flatten()[0], last.flatten()[0] = 5.0, 12.0
    assert state.average_norm() == pytest.approx(13.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_finds_a_single_bad_weight(bad):
    layer = nn.Linear(50, 50)
    with torch.no_grad():
        layer.weight.fill_(3e38)  # its sum of squares overflows, it is finite
    assert all_finite([layer])
    with torch.no_grad():
        layer.weight[17, 3] = bad
    assert not all_finite([nn.Linear(1, 1), layer])


def test_gradient_norm_unscales_then_clips():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(5))]
    weights[0].grad, weights[1].grad = torch.tensor([6.0, 8.0]), torch.tensor([0.0])
    assert float(gradient_norm(weights, 2.0, None)) == 5.0
    assert weights[0].grad.tolist() == [3.0, 4.0]
    assert float(gradient_norm(weights, 1.0, 1.0)) == 5.0
    assert weights[0].grad.tolist() == pytest.approx([0.6, 0.8])


def test_loss_scale_halves_doubles_and_gives_up():
    scale = LossScale(True, patience=3)
    scale.update(False)
    assert scale.state() == [32768.0, 0]
    for _ in range(3):
        scale.update(True)
    assert scale.state() == [65536.0, 0]
    again = LossScale(True)
    again.restore([4.0, 2])
    assert again.state() == [4.0, 2]
    with pytest.raises(DivergenceError, match="overflow float16"):
        for _ in range(100):
            scale.update(False)
    assert LossScale(False).value == 1.0


def test_float16_leaves_out_a_step_whose_gradients_overflow():
    trainer = trainer_of(config_of("edm", "train.precision=fp16", steps=8))
    advance(trainer, 2)
    assert trainer.state.gradients.scale.good == 2, "ordinary steps fit float16"
    before = {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}
    handle = trainer.state.parameters()[0].register_hook(lambda grad: grad * float("inf"))
    trainer.step()
    handle.remove()
    assert same(before, trainer.state.tensors()) and trainer.state.step == 3
    assert trainer.state.gradients.scale.state() == [32768.0, 0]
    trainer.step()
    assert not same(before, trainer.state.tensors())
    assert trainer.report().grad_norm > 0


def test_the_loss_scale_changes_no_update():
    """Scaling by a power of two is exact: the weights are those of an unscaled run, to the bit (small gradients)."""
    results = []
    for value in (1.0, 1024.0):
        trainer = trainer_of(config_of("edm", "train.precision=fp32", steps=2))
        trainer.state.gradients.scale = LossScale(True, value)
        advance(trainer, 2)
        results.append(trainer.state.tensors())
    assert same(*results)


def test_the_loss_scale_is_kept_by_checkpoints(tmp_path):
    config = config_of("edm", "train.precision=fp16", steps=8)
    first, second = trainer_of(config), trainer_of(config)
    first.state.gradients.scale.update(False)
    advance(first, 2)
    first.state.save(tmp_path / "state.safetensors")
    second.state.restore(tmp_path / "state.safetensors")
    assert second.state.gradients.scale.state() == [32768.0, 2]


def test_bfloat16_trains(tmp_path):
    trainer = trainer_of(config_of("ict", "train.precision=bf16", steps=3))
    advance(trainer, 3)
    assert trainer.report().loss > 0 and not trainer.state.gradients.scale.active
    assert all(p.dtype == torch.float32 for p in trainer.state.parameters())
