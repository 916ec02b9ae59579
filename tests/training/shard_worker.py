"""What both processes of tests/training/conftest.py run: sharded steps beside whole ones, and sums; told as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmtool.config.schema import RunConfig
from cmtool.data.load import load_dataset
from cmtool.machine.launch import main_of_a_rank
from cmtool.machine.world import World, join_world
from cmtool.training.loop import Trainer
from cmtool.training.setup import prepare
from cmtool.training.sharding import Sharding, gathers_in_derivatives, local, whole
from tests.training import sum_worker
from tests.training.tiny import CPU, config_of

FP64 = {"train.precision": "fp64"}
# Recipe, settings, steps: a plain one, target and clipping, a forward-mode derivative with a teacher, scalars and a
# learned weighting, recomputed blocks, a fake network, a weak teacher beside the teacher, another network.
CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "ict": ("ict", (), 20),
    "cd": ("cd", ("train.grad_clip=0.01", "recipe.target.ema=0.9"), 2),
    "forward mode": ("cd-inf", (), 2),
    "edm2": ("ict", ("network.kind=edm2", "network.log_variance=true", "recipe.weighting.kind=learned"), 2),
    "checkpointing": ("ict", ("network.checkpointing=true", "train.micro_batch=2"), 2),
    "fake network": ("sid", ("recipe.score.fake_steps=2", "recipe.score.levels=[80.0,1.0]"), 2),
    "weak teacher": ("cd", ("recipe.direction.guidance=2.0", 'recipe.direction.weak="FOLDER/weak.safetensors"'), 2),
    "mlp": ("ict", ("network.kind=mlp", "train.optimizer=lion"), 2),
}
if not gathers_in_derivatives():
    del CASES["forward mode"]


def trainer(config: RunConfig, world: World | None = None) -> Trainer:
    return prepare(config, load_dataset(config.data), CPU, world)


def held(run: Trainer) -> int:
    """Bytes of weights, averages and moments in this process."""
    state = run.state
    networks = {state.target.network, state.ema.network, *(learner.model.network for learner in state.learners)}
    tensors: list[Tensor] = [local(p) for network in networks for p in network.parameters()]
    moments = [entries for learner in state.learners for entries in learner.optimizer.state.values()]
    tensors += [v for entries in moments for v in entries.values() if v.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def difference(one: Trainer, two: Trainer) -> float:
    worst = 0.0
    for role in ("student", "target", "ema"):
        pair = [getattr(run.state, role).network.parameters() for run in (one, two)]
        worst = max([worst, *(float((a.detach() - whole(b)).abs().max()) for a, b in zip(*pair, strict=True))])
    for own, other in zip(one.state.learners[1:], two.state.learners[1:], strict=True):
        pair = [own.parameters(), other.parameters()]
        worst = max([worst, *(float((a.detach() - whole(b)).abs().max()) for a, b in zip(*pair, strict=True))])
    return worst


@contextlib.contextmanager
def splits() -> Iterator[list[nn.Module]]:
    """Yield the networks that are split meanwhile."""
    found: list[nn.Module] = []
    apply = Sharding.apply

    def applied(self: Sharding, network: nn.Module) -> None:
        found.append(network)
        apply(self, network)

    with sum_worker.replaced(Sharding, "apply", applied):
        yield found


def run_case(name: str, folder: Path, world: World) -> dict[str, Any]:
    recipe, sets, steps = CASES[name]
    sets = tuple(text.replace("FOLDER", str(folder)) for text in sets)
    flags: dict[str, object] = dict(FP64)
    if recipe.startswith(("cd", "sid")):
        flags["teacher"] = str(folder / "teacher.safetensors")
    one = trainer(config_of(recipe, *sets, **flags))
    with splits() as split:
        two = trainer(config_of(recipe, *sets, "train.shard=true", **flags), world)
    for _ in range(steps):
        one.step()
        two.step()
    norms = (two.state.average_norm(), one.state.average_norm())
    found = {
        "difference": difference(one, two),
        "held": held(two),
        "whole": held(one),
        "norms": norms,
        "split": len(split),
    }
    losses = (two.report(), one.report())
    found |= {"loss": [r.loss for r in losses], "grad_norm": [r.grad_norm for r in losses]}
    if name == "ict":
        found |= across(one, two, folder, world)
    return found


def across(one: Trainer, two: Trainer, folder: Path, world: World) -> dict[str, Any]:
    """Checkpoints there and back: each goes on from the other's, and the average is gathered for process 0."""
    two.state.save(folder / "sharded.safetensors")
    two.state.export(folder / "model.safetensors")
    copy = two.state.average()
    if world.main:
        one.state.save(folder / "whole.safetensors")
    world.wait()
    two.state.restore(folder / "whole.safetensors")
    one.state.restore(folder / "sharded.safetensors")
    for _ in range(2):
        one.step()
        two.step()
    return {"resumed": difference(one, two), "copied": copy is not None, "main": world.main}


def main() -> int:
    folder = Path(sys.argv[1])
    with join_world("cpu") as world:
        mine = {name: run_case(name, folder, world) for name in CASES}
        (folder / f"sums-{world.rank}.json").write_text(json.dumps(sum_worker.found(folder, world)))
        (folder / f"found-{world.rank}.json").write_text(json.dumps(mine))
    return 0


if __name__ == "__main__":
    main_of_a_rank(main)
