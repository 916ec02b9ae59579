"""What only a CUDA device can show: it answers as the processor does, repeats itself, and waits for nobody in a step."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.matched import enliven
from cmtool.config.load import resolve
from cmtool.config.methods import METHODS
from cmtool.data.load import load_dataset
from cmtool.diffusion.grid import karras_grid
from cmtool.losses.objective import Objective
from cmtool.losses.terms import Draw, Slice
from cmtool.machine.recorded import WARM_UP, Recorded
from cmtool.networks.in_step import in_step, on_tape
from cmtool.rng import batch_normal
from cmtool.samplers.generate import generate, sample_batch
from cmtool.samplers.plan import plan_sampling
from cmtool.training.setup import prepare
from tests.losses.oracles import loss_of

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = ("network.channels=64", "network.attention=[8]", "network.head_channels=32", "data.size=64")


def trainer_on(device: torch.device, recipe: str, *sets: str, **flags: object):
    """A trainer of a U-Net whose layers that start at zero say something."""
    given = {"train.batch_size": 8, "train.steps": 20, **flags}
    config = resolve("shapes", recipe=recipe, sets=(*SIZES, *sets), flags=given).config
    trainer = prepare(config, load_dataset(config.data), device)
    for network in {trainer.state.student.network, trainer.state.target.network, trainer.state.ema.network}:
        enliven(network)
    return trainer


def gradient_at(trainer, level: float, points: int, monkeypatch) -> torch.Tensor:
    """The gradient of one batch at the grid's point nearest to `level` and its neighbor, in float64 on the CPU."""
    grid = karras_grid(points)
    at = min(range(1, points), key=lambda i: abs(math.log(grid[i] / level)))

    def draw(self, x0, label, state, rows) -> Draw:
        z = batch_normal(tuple(x0.shape), rows.seed, "noise", rows.step, device=x0.device)
        t, r = (torch.full((len(x0),), grid[index], device=x0.device) for index in (at, at - 1))
        return Draw(x0, z, (t, r), label, 0.0, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "draw", draw)
        trainer.nets = replace(trainer.nets, target=trainer.state.student)
        x0, label, _ = trainer.batches.take(0, 0, 8)
        trainer.state.optimizer.zero_grad()
        loss_of(
            trainer.objective, trainer.nets, x0, label, trainer.curriculum(), Slice(0, 0, 0, 8)
        ).weighted.mean().backward()
    return torch.cat([p.grad.flatten() for p in trainer.state.parameters()]).cpu().double()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("points", [11, 1281])
def test_a_gradient_points_where_the_processors_does_at_every_level(precision, points, monkeypatch):
    exact = trainer_on(CPU, "ict", **{"train.precision": "fp64"})
    there = trainer_on(GPU, "ict", **{"train.precision": precision})
    for level in (0.01, 0.1, 1.0, 10.0, 80.0):
        wanted = gradient_at(exact, level, points, monkeypatch)
        found = gradient_at(there, level, points, monkeypatch)
        cosine = float(F.cosine_similarity(wanted, found, dim=0))
        print(f"{precision} N={points} t={level}: cosine {cosine:.5f}")
        assert cosine > 0.99


def test_a_network_answers_as_on_the_processor():
    ours, there = (trainer_on(device, "ict", **{"train.precision": "fp32"}).state.student for device in (CPU, GPU))
    x = 5 * torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.full((8,), 5.0)
    with torch.no_grad():
        difference = (ours(x, t) - there(x.cuda(), t.cuda()).cpu()).abs().max()
    assert difference < 1e-2


def gradient_of(trainer, pairing) -> torch.Tensor:
    """The gradient of the first batch, its pair of passes run by `pairing`, in float64 on the CPU."""
    trainer.state.student.pairing = pairing
    x0, label, _ = trainer.batches.take(0, 0, 8)
    trainer.state.clear_gradients()
    loss = loss_of(trainer.objective, trainer.nets, x0, label, trainer.curriculum(), Slice(0, 0, 0, 8))
    loss.weighted.mean().backward()
    return torch.cat([p.grad.flatten() for p in trainer.state.parameters()]).cpu().double()


@pytest.mark.parametrize("recipe", ["ict", "ct"])
def test_passes_of_a_pair_side_by_side_have_the_gradient_of_one_after_the_other(recipe):
    trainer = trainer_on(GPU, recipe, **{"train.precision": "bf16"})
    with torch.no_grad():
        for parameter in trainer.state.target.parameters():
            parameter.mul_(1.001)
    one, two = (gradient_of(trainer, way) for way in (on_tape, in_step))
    assert float(F.cosine_similarity(one, two, dim=0)) > 0.999


def test_pairs_side_by_side_are_chosen_by_a_race_and_recorded():
    trainer = trainer_on(GPU, "ct", "train.pairs_in_step=true", **{"train.precision": "bf16"})
    for _ in range(WARM_UP + 2):
        trainer.step()
    print(f"side by side: {trainer.state.student.pairing.won}; {trainer.replay.calls.reason}")
    assert trainer.state.student.pairing.won is not None
    trainer.state.student.pairing = in_step
    forced = trainer.recorder()
    trainer.replay = forced
    for _ in range(WARM_UP + 2):
        trainer.step()
    assert (forced.calls.reason, forced.calls.replays) == (None, True)
    trainer.check_finite(weights=True)


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("recipe", ["ict", "ct", "edm", "ict-gc", "ict-pm"])
def test_no_step_waits_for_the_device(recipe, steps):
    trainer = trainer_on(GPU, recipe, **{"train.precision": "bf16"})
    for _ in range(steps):
        trainer.step()
    assert (trainer.replay.calls.reason, trainer.replay.calls.replays) == (None, steps > WARM_UP)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in heard if "called a synchronizing" in str(w.message)]
    assert not waits, waits


@pytest.fixture
def repeatable(monkeypatch):
    """Algorithms that answer the same numbers each time, where torch has such."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weights_after(steps: int, recipe: str, *sets: str, **flags: object) -> tuple[torch.Tensor, object]:
    """Weights and sampling average after some steps, in float64, and what was recorded."""
    trainer = trainer_on(GPU, recipe, *sets, **{"train.precision": "fp32", **flags})
    for _ in range(steps):
        trainer.step()
    networks = (trainer.state.student.network, trainer.state.ema.network)
    return torch.cat([p.flatten() for n in networks for p in n.parameters()]).detach().cpu().double(), trainer.replay


def starting_from(recipe: str, folder: Path) -> dict[str, object]:
    """What a recipe starts from, made of random weights."""
    needs = METHODS[recipe].get("needs", "nothing")
    if needs == "nothing":
        return {}
    first = trainer_on(GPU, "ict" if needs == "consistency_init" else "edm")
    first.state.export(folder / "first.safetensors")
    return {"teacher" if needs == "teacher" else "init": str(folder / "first.safetensors")}


# Looks at the levels of a batch to see which of its two networks it needs.
WAIT = ("tcm",)


@pytest.mark.parametrize("recipe", [name for name, row in METHODS.items() if "score" not in row])
def test_replayed_passes_train_as_others_do(recipe, tmp_path, repeatable):
    flags = starting_from(recipe, tmp_path)
    sets = ("recipe.coupling.pairs=64", "recipe.coupling.solver_steps=4") if recipe in ("kd", "cmt", "reflow") else ()
    plain, _ = weights_after(9, recipe, "train.cuda_graphs=false", *sets, **flags)
    again, replay = weights_after(9, recipe, *sets, **flags)
    print(f"{recipe}: {float((plain - again).abs().max()):.1e}")
    assert (replay.calls.reason is None, replay.calls.replays) == (recipe not in WAIT, recipe not in WAIT)
    assert float((plain - again).abs().max()) < 1e-6


def test_replayed_passes_of_unlike_size_add_up(repeatable):
    flags = {"train.batch_size": 8, "train.micro_batch": 3}
    plain, _ = weights_after(6, "ict", "train.cuda_graphs=false", **flags)
    again, replay = weights_after(6, "ict", **flags)
    assert len(replay.calls._tapes) == 2
    assert float((plain - again).abs().max()) < 1e-6


def test_replayed_samples_are_the_samples(repeatable):
    model = trainer_on(GPU, "ict", **{"train.precision": "fp32"}).state.ema
    plan, seeds = plan_sampling(model.header, steps=2), list(range(70))
    replayed = torch.cat([batch.x0 for batch in generate(model, plan, seeds, batch_size=10)])
    plain = [sample_batch(model, plan, seeds[first : first + 10]).x0 for first in range(0, 70, 10)]
    assert float((replayed - torch.cat(plain)).abs().max()) < 1e-5


def breaks_when_recorded(x: torch.Tensor) -> tuple[torch.Tensor]:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("while it is recorded")
    return (2 * x,)


def test_what_cannot_be_recorded_is_called_as_it_is():
    asks = Recorded(lambda x: (x * x.sum().item(),))
    x = torch.ones(3, device=GPU)
    for _ in range(6):
        assert torch.equal(asks(x)[0], 3 * x)
    assert asks.reason is not None
    fails = Recorded(breaks_when_recorded)
    for _ in range(6):
        assert torch.equal(fails(x)[0], 2 * x)
    assert "while it is recorded" in fails.reason
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    fine = Recorded(lambda x: (2 * x,))
    for value in range(8):
        assert torch.equal(fine(value * x)[0], 2 * value * x)
    assert fine.replays


def test_deterministic_runs_repeat_to_the_bit(cmtool, workdir):
    words = ("train-ct", "--preset", "shapes", "--steps", 8, "--set", "data.size=64", "--deterministic", "--quiet")
    words += ("--set", "eval.reference=")  # unjudged
    for name in ("a", "b"):
        assert cmtool(*words, "--out", workdir / name).code == 0
    first, second = ((workdir / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert (first == second) is True
