"""Optimizers against their formulas, and their state through tensors and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmtool.config.schema import TrainConfig
from cmtool.training.optimizers import (
    FusedRAdam,
    build_optimizer,
    optimizer_tensors,
    rectification,
    restore_optimizer,
)

KINDS = ["radam", "adam", "adamw", "lion", "sgd", "muon"]


def settings(kind, **changes):
    return TrainConfig(steps=10, optimizer=kind, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, **changes)


def gradients(count, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


def run(optimizer, parameters, grads):
    for grad in grads:
        for parameter in parameters:
            parameter.grad = grad.clone().reshape(parameter.shape)
        optimizer.step()


def test_lion_is_algorithm_2_of_its_paper():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    expected, momentum = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    grads = gradients(6, (3,))
    run(build_optimizer(settings("lion"), [weight]), [weight], grads)
    for g in grads:
        update = torch.sign(0.9 * momentum + 0.1 * g)
        expected = expected - 0.01 * (update + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * g
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_adamw_is_the_published_update():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    x, m, v = weight.detach().clone(), 0.0, 0.0
    grads = gradients(5, (2,))
    run(build_optimizer(settings("adamw"), [weight]), [weight], grads)
    for step, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        x = x - 0.01 * 0.1 * x
        x = x - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), x, rtol=1e-9, atol=1e-9)


def test_radam_is_sgd_while_the_variance_is_intractable():
    """Liu et al. 2020: below rho_t = 5 the step is the bias-corrected momentum alone."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    x, m = weight.detach().clone(), 0.0
    grads = gradients(3, (2,))
    run(build_optimizer(settings("radam"), [weight]), [weight], grads)
    for step, g in enumerate(grads, 1):
        g = g + 0.1 * x
        m = 0.9 * m + 0.1 * g
        x = x - 0.01 * m / (1 - 0.9**step)
    torch.testing.assert_close(weight.detach(), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fused_radam_is_torchs_radam_before_and_after_its_variance_is_tractable(decay, monkeypatch):
    mine, theirs = (nn.Parameter(torch.linspace(-2, 2, 64, dtype=torch.float64)) for _ in range(2))
    common = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": decay}
    fused, reference = FusedRAdam([mine], **common), torch.optim.RAdam([theirs], **common)
    calls, kernel = [], torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    grads = gradients(30, (64,))
    for number, grad in enumerate(grads):
        rate = 0.02 * (1 - number / 40)
        for optimizer, weight in ((fused, mine), (reference, theirs)):
            optimizer.param_groups[0]["lr"] = rate
            run(optimizer, [weight], [grad])
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-11, atol=1e-12)
    assert len(calls) == 25
    assert (rectification(5, 0.99) is None, rectification(6, 0.99) is None) == (True, False)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        torch.testing.assert_close(fused.state[mine][key], reference.state[theirs][key], rtol=1e-12, atol=1e-14)


def test_radam_waits_for_a_weight_that_had_no_gradient_before():
    """Weights at different steps have different rectifications: torch's own form counts each by itself."""
    pairs = [[nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)] for _ in range(2)]
    made = [FusedRAdam(pairs[0], lr=0.1), torch.optim.RAdam(pairs[1], lr=0.1)]
    for optimizer, (early, late) in zip(made, pairs, strict=True):
        run(optimizer, [early], gradients(9, (3,)))
        run(optimizer, [early, late], gradients(9, (3,), seed=1))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_state_through_tensors_and_back_goes_on_to_the_bit(kind, layout):
    def fresh():
        g = torch.Generator().manual_seed(3)
        shapes = [(4, 3, 3, 3), (5, 7), (2,), *([(40, 5, 3, 3), (32, 64), (32, 32, 1, 1)] if kind == "muon" else [])]
        made = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
        for weight in made:
            weight.data = weight.data.to(memory_format=layout) if weight.dim() == 4 else weight.data
        return made

    def give(parameters, seed):
        g = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=g).as_strided(parameter.shape, parameter.stride())

    names = ["conv.weight", "linear", "bias", "kernel", "matrix", "skip.weight"]
    whole = fresh()
    optimizer = build_optimizer(settings(kind), whole)
    for seed in range(4):
        give(whole, seed)
        optimizer.step()
    middle = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in optimizer_tensors(optimizer, names).items()
    }
    resumed = fresh()
    for a, b in zip(resumed, whole, strict=True):
        a.data.copy_(b.data)
    other = build_optimizer(settings(kind), resumed)
    restore_optimizer(other, names, middle)
    for seed in range(4, 12):
        give(whole, seed)
        optimizer.step()
        give(resumed, seed)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (40, 3, 4, 4), (64, 4, 3, 3)])
def test_the_first_update_of_muon_is_five_steps_of_the_quintic_on_the_singular_values(shape):
    """Momentum .05 g, Nesterov's .0975 g; in float64 the update is .2 sqrt(larger side) U f(S / |S|) V, exactly."""
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    grad = gradients(1, shape)[0].double()
    run(build_optimizer(settings("muon"), [weight]), [weight], [grad])
    left, values, right = torch.linalg.svd(grad.flatten(1), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    assert 0.65 < float(values.min()) < float(values.max()) < 1.2
    expected = -0.01 * 0.2 * max(grad.flatten(1).shape) ** 0.5 * (left * values) @ right
    torch.testing.assert_close(weight.detach().flatten(1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rounds", [True, False])
def test_muon_is_that_of_torch_up_to_the_rounding_of_its_iteration(rounds, monkeypatch):
    monkeypatch.setattr("cmtool.training.muon.has_fast_bf16", lambda device: rounds)
    mine, theirs = (nn.Parameter(gradients(1, (48, 64))[0].float()) for _ in range(2))
    own = build_optimizer(settings("muon"), [mine])
    other = torch.optim.Muon([theirs], lr=own.defaults["lr"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start, given = mine.detach().clone(), [grad.float() for grad in gradients(8, (48, 64), seed=1)]
    for optimizer, weight in ((own, mine), (other, theirs)):
        run(optimizer, [weight], given)
    apart = float(((mine - theirs).norm() / (theirs - start).norm()).detach())
    assert apart < (1e-6 if rounds else 0.02)


def test_matrices_of_one_shape_that_are_rounded_move_together_as_each_does_alone(monkeypatch):
    monkeypatch.setattr("cmtool.training.muon.has_fast_bf16", lambda device: True)
    monkeypatch.setattr("cmtool.training.muon.TOGETHER", 2)
    shapes = [(40, 64), (40, 64), (64, 40), (40, 64), (40, 4, 4, 4)]
    together, alone = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    given = [gradients(1, shape, seed)[0].float() for seed, shape in enumerate(shapes)]
    whole = build_optimizer(settings("muon"), together)
    for weight, grad in zip(together, given, strict=True):
        weight.grad = grad
    assert [len(group) for group in whole._together()] == [2, 2, 1]
    whole.step()
    for weight, grad in zip(alone, given, strict=True):
        run(build_optimizer(settings("muon"), [weight]), [weight], [grad])
    for one, other in zip(together, alone, strict=True):
        apart = float(((one - other).norm() / other.norm()).detach())
        assert apart < 0.02


def test_muon_moves_vectors_and_small_matrices_as_adamw_does():
    shapes = [(16,), (31, 40), (12, 96)]
    mine, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    for kind, own in (("muon", [*mine, nn.Parameter(torch.eye(32))]), ("adamw", theirs)):
        optimizer = build_optimizer(settings(kind), own)
        for seed in range(5):
            for parameter in own:
                parameter.grad = gradients(1, parameter.shape, seed)[0].float()
            optimizer.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-7)


def test_muon_of_vectors_alone_and_of_matrices_alone():
    for shape in ((8,), (32, 32)):
        weight = nn.Parameter(torch.zeros(shape))
        run(build_optimizer(settings("muon"), [weight]), [weight], [gradients(1, shape)[0].float()])
        assert float(weight.detach().abs().min()) > 0
