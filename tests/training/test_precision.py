"""Half precisions: what they round, where they are refused, and that a gradient keeps its direction."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cmtool.config.load import resolve
from cmtool.errors import ConfigError
from cmtool.losses.objective import Objective
from cmtool.losses.terms import Draw, Slice
from cmtool.networks.convolution import Conv2d, set_backward_dtype
from cmtool.rng import batch_normal
from cmtool.training.precision import gains, has_fast_bf16, refused, settle_precision
from tests.losses.oracles import loss_of
from tests.training.tiny import CPU, config_of, trainer_of

SIDE = ("data.resolution=16", "data.channels=3", "network.channels=16", "network.group_channels=4")
LEVELS = (0.01, 0.1, 1.0, 10.0, 80.0)
GPU = torch.device("cuda")


def big(recipe: str, *sets: str, **flags: object):
    """A network large enough to gain: base 64, 32 pixels."""
    sizes = ("network.kind=adm", "network.channels=64", "data.resolution=32", "network.encoder=standard")
    return resolve("shapes", recipe=recipe, sets=(*sizes, *sets), flags=flags).config


def test_auto_takes_bfloat16_only_where_network_device_and_recipe_gain(monkeypatch):
    monkeypatch.setattr("cmtool.training.precision.has_fast_bf16", lambda device: device.type == "cuda")
    assert settle_precision(big("ict"), GPU).name == "bf16"
    assert settle_precision(big("ict"), CPU).name == "fp32"
    for small in ("network.channels=32", "data.resolution=16"):
        assert not gains(big("ict", small))
        assert settle_precision(big("ict", small), GPU).name == "fp32"
    assert settle_precision(config_of("ict"), GPU).name == "fp32"


def test_a_transformer_gains_from_a_width_of_96_on_at_any_side():
    for width, side, able in ((96, 16, True), (128, 8, True), (64, 32, False)):
        sets = ("network.kind=dit", f"network.width={width}", f"data.resolution={side}")
        assert gains(resolve("shapes", recipe="ict", sets=sets).config) is able


def test_the_processor_says_whether_it_multiplies_bfloat16(monkeypatch):
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able}, raising=False)
        assert has_fast_bf16(CPU) is able
    assert not has_fast_bf16(torch.device("mps"))


def test_consistency_models_round_gradients_and_diffusion_models_everything():
    bf16 = {"train.precision": "bf16"}
    plan = settle_precision(big("ict", **bf16), CPU)
    assert (plan.autocast, plan.backward, plan.paired) == (None, torch.bfloat16, True)
    plan = settle_precision(big("ict", "train.half_passes=backward", **bf16), CPU)
    assert (plan.autocast, plan.backward, plan.paired) == (None, torch.bfloat16, False)
    plan = settle_precision(big("edm", **bf16), CPU)
    assert (plan.autocast, plan.backward) == (torch.bfloat16, None)
    plan = settle_precision(big("ict", "train.half_passes=all", **bf16), CPU)
    assert (plan.autocast, plan.backward) == (torch.bfloat16, None)


@pytest.mark.parametrize(
    "sets",
    [("train.compile=true",), ("train.shard=true",), ("process.truncated_at=0.5",), ("network.checkpointing=true",)],
)
def test_networks_that_cannot_note_their_convolutions_keep_exact_forward_passes(sets):
    plan = settle_precision(big("ict", *sets, **{"train.precision": "bf16"}), CPU)
    assert (plan.backward, plan.paired) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("recipe", "sets", "reason"),
    [
        ("ict", ("network.kind=mlp", "network.num_blocks=2"), "not in network.kind = 'mlp'"),
        (
            "cd-inf-full",
            (),
            "differentiates through",
        ),
    ],
)
def test_recipes_that_do_not_train_in_bfloat16_refuse_it(recipe, sets, reason):
    config = resolve("digits", recipe=recipe, sets=sets, flags={"train.precision": "bf16"}).config
    assert refused(config) is not None
    with pytest.raises(ConfigError, match=f"does not train in bf16: .*{reason}"):
        settle_precision(config, CPU)


def test_an_mps_device_has_no_float64():
    with pytest.raises(ConfigError, match="no float64"):
        settle_precision(config_of("ict", **{"train.precision": "fp64"}), torch.device("mps"))


class At:
    """Draws that sit at one noise level and its neighbor on the grid."""

    def __init__(self, objective: Objective, t: float, r: float) -> None:
        self.t, self.r, self.objective = t, r, objective

    def __call__(self, objective, x0, label, state, rows) -> Draw:
        z = batch_normal(tuple(x0.shape), rows.seed, "noise", rows.step)
        return Draw(x0, z, (torch.full((len(x0),), self.t), torch.full((len(x0),), self.r)), label, 0.0, rows)


def lively(recipe: str, *sets: str, precision: str, **flags: object):
    """A trainer whose network answers something: fresh ones end in zeros."""
    config = config_of(recipe, *SIDE, *sets, preset="shapes", batch=8, **{"train.precision": precision}, **flags)
    trainer = trainer_of(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.state.student.network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=g) / math.sqrt(parameter[0].numel()))
    return trainer


def gradient_at(trainer, t: float, r: float, monkeypatch) -> torch.Tensor:
    """The gradient of one batch at (t, r)."""
    draw = At(trainer.objective, t, r)
    monkeypatch.setattr(Objective, "draw", lambda self, x0, label, state, rows: draw(self, x0, label, state, rows))
    x0, label, _ = trainer.batches.take(0, 0, 8)
    trainer.state.optimizer.zero_grad()
    loss = loss_of(trainer.objective, trainer.nets, x0, label, trainer.curriculum(), Slice(0, 0, 0, 8))
    loss.weighted.mean().backward()
    return torch.cat([p.grad.flatten() for p in trainer.state.parameters()])


@pytest.fixture(scope="module")
def pair_trainers():
    sets = ("data.size=16", "network.attention=[8]", "network.head_channels=16")
    made = []
    for precision in ("fp32", "bf16"):
        trainer = lively("ict", *sets, precision=precision)
        trainer.nets = replace(trainer.nets, target=trainer.state.student)
        made.append(trainer)
    return made


@pytest.mark.parametrize("points", [11, 161, 1281])
@pytest.mark.parametrize("level", LEVELS)
def test_a_gradient_in_bfloat16_keeps_its_direction_at_every_level_and_stage(pair_trainers, level, points, monkeypatch):
    from cmtool.diffusion.grid import karras_grid

    grid = karras_grid(points)
    at = min(range(1, points), key=lambda i: abs(math.log(grid[i] / level)))
    exact, rounded = (gradient_at(trainer, grid[at], grid[at - 1], monkeypatch) for trainer in pair_trainers)
    assert pair_trainers[1].state.student.paired
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.fixture(scope="module")
def transformers():
    made = []
    for precision in ("fp32", "bf16"):
        trainer = lively("ict", "data.size=16", "network.kind=dit", "network.depth=2", precision=precision)
        trainer.nets = replace(trainer.nets, target=trainer.state.student)
        made.append(trainer)
    return made


@pytest.mark.parametrize("level", LEVELS)
def test_so_does_the_gradient_of_a_transformer(transformers, level, monkeypatch):
    from cmtool.diffusion.grid import karras_grid

    grid = karras_grid(1281)
    at = min(range(1, 1281), key=lambda i: abs(math.log(grid[i] / level)))
    exact, rounded = (gradient_at(trainer, grid[at], grid[at - 1], monkeypatch) for trainer in transformers)
    assert transformers[1].state.student.paired
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.parametrize("level", LEVELS)
def test_so_it_does_towards_an_average_of_the_weights(pair_trainers, level, monkeypatch):
    from cmtool.diffusion.grid import karras_grid

    grid, found = karras_grid(1281), []
    at = min(range(1, 1281), key=lambda i: abs(math.log(grid[i] / level)))
    for trainer in pair_trainers:
        average = copy.deepcopy(trainer.state.student).requires_grad_(False)
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in average.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=g) * parameter.abs().mean() * 1e-3)
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "nets", replace(trainer.nets, target=average))
            found.append(gradient_at(trainer, grid[at], grid[at - 1], patched))
    assert F.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("level", LEVELS)
def test_a_diffusion_model_keeps_its_gradient_with_all_passes_rounded(level, monkeypatch):
    sets = ("data.size=16", "network.attention=[8]", "network.head_channels=16")
    both = [lively("edm", *sets, precision=precision) for precision in ("fp32", "bf16")]
    exact, rounded = (gradient_at(trainer, level, level, monkeypatch) for trainer in both)
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.parametrize("level", LEVELS)
def test_a_distillation_keeps_its_gradient_with_the_teacher_rounded(level, monkeypatch, tmp_path):
    from cmtool.checkpoint import save_model
    from cmtool.diffusion.grid import karras_grid

    sets = ("data.size=16", "network.attention=[8]", "network.head_channels=16")
    teacher = lively("edm", *sets, precision="fp32").state.student
    save_model(tmp_path / "teacher.safetensors", teacher.network.state_dict(), teacher.header)
    grid, found = karras_grid(18), []
    at = min(range(1, 18), key=lambda i: abs(math.log(grid[i] / level)))
    for precision in ("fp32", "bf16"):
        trainer = lively("cd", *sets, precision=precision, teacher=str(tmp_path / "teacher.safetensors"))
        student = trainer.state.student
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in student.network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.02)
        trainer.nets = replace(trainer.nets, target=student)
        found.append(gradient_at(trainer, grid[at], grid[at - 1], monkeypatch))
    assert trainer.nets.teacher.autocast == torch.bfloat16
    assert F.cosine_similarity(*found, dim=0) > 0.99


def test_rounding_all_passes_loses_the_direction_that_rounding_gradients_keeps(monkeypatch, pair_trainers):
    """Why half_passes is "backward": neighbors of a fine grid differ by less than bfloat16 resolves."""
    from cmtool.diffusion.grid import karras_grid

    grid = karras_grid(1281)
    at = min(range(1, 1281), key=lambda i: abs(grid[i] - 10))
    exact_trainer = pair_trainers[0]
    exact = gradient_at(exact_trainer, grid[at], grid[at - 1], monkeypatch)
    monkeypatch.setattr(exact_trainer.state.student, "autocast", torch.bfloat16)
    rounded = gradient_at(exact_trainer, grid[at], grid[at - 1], monkeypatch)
    assert F.cosine_similarity(exact, rounded, dim=0) < 0.9


def test_the_convolution_forward_is_exact_and_its_gradients_are_rounded():
    g = torch.Generator().manual_seed(1)
    layer = Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 5, generator=g, requires_grad=True)
    answers = {}
    for dtype in (None, torch.bfloat16):
        layer.backward_dtype = dtype
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        (y * y.detach().sin()).sum().backward()
        answers[dtype] = (y.detach(), x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone())
    plain, half = answers[None], answers[torch.bfloat16]
    torch.testing.assert_close(half[0], plain[0], rtol=0, atol=1e-6)
    for a, b in zip(half[1:], plain[1:], strict=True):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9999
    torch.testing.assert_close(half[3], plain[3])


def test_convolutions_at_the_ends_keep_their_gradients_exact():
    trainer = lively("ict", "data.size=16", precision="bf16")
    network = trainer.state.student.network
    ends = (network.input_blocks[0][0], network.out["2"])
    assert all(layer.backward_dtype is None for layer in ends)
    others = [m for m in network.modules() if isinstance(m, Conv2d) and m not in ends]
    assert others
    assert all(layer.backward_dtype == torch.bfloat16 for layer in others)
    assert set_backward_dtype(network, None) == len(others)
