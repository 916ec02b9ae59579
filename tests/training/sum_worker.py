"""What both processes of tests/training/test_summing.py do: steps whose gradients are summed early, late, and by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmtool.data.load import load_dataset
from cmtool.machine.world import World
from cmtool.training import summing
from cmtool.training.loop import Trainer
from cmtool.training.setup import prepare
from cmtool.training.summing import GradientSum
from tests.training.tiny import CPU, config_of

# Recipe and settings: several micro-batches (of unlike size), a forward-mode derivative, a second network with steps of
# its own, and weights that get no gradient (those of the head, which only a learned weighting asks).
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "micro-batches": ("ct", ("train.micro_batch=3", "train.grad_clip=0.01")),
    "forward mode": ("cd-inf", ()),
    "fake network": ("sid", ("recipe.score.fake_steps=2",)),
    "no gradient": ("ict", ("network.log_variance=true",)),
}
STEPS = 2


def trained(case: str, folder: Path, world: World | None) -> Trainer:
    recipe, sets = CASES[case]
    flags: dict[str, object] = {"train.precision": "fp64"}
    if recipe in ("cd-inf", "sid"):
        flags["teacher"] = str(folder / "teacher.safetensors")
    config = config_of(recipe, *sets, **flags)
    trainer = prepare(config, load_dataset(config.data), CPU, world)
    for _ in range(STEPS):
        trainer.step()
    return trainer


def weights(trainer: Trainer) -> list[Tensor]:
    networks = [learner.model.network for learner in trainer.state.learners]
    return [p.detach() for network in (*networks, trainer.state.ema.network) for p in network.parameters()]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def traced(work: Callable[[], Any]) -> list[str]:
    """Return in their order the beginnings of sums, and both ends of backward passes, while `work` is done."""
    seen: list[str] = []
    reduce, backward = dist.all_reduce, Tensor.backward

    def reduced(tensor: Tensor, *given: Any, **named: Any) -> Any:
        seen.append("sum" if tensor.is_floating_point() else "question")
        return reduce(tensor, *given, **named)

    def passed(loss: Tensor, *given: Any) -> None:
        seen.append("pass")
        backward(loss, *given)
        seen.append("end of pass")

    with replaced(dist, "all_reduce", reduced), replaced(Tensor, "backward", passed):
        work()
    return seen


def found(folder: Path, world: World) -> dict[str, Any]:
    """Per case: whether early and late sums end in the same bits, how far one process is, and what happened when."""
    told: dict[str, Any] = {}
    with replaced(summing, "BUCKET", 16384):  # several buckets of so small a network
        for case in CASES:
            early: list[Trainer] = []
            events = traced(lambda case=case, early=early: early.append(trained(case, folder, world)))  # type: ignore[misc]
            with replaced(GradientSum, "begun_within", lambda self: contextlib.nullcontext()):
                late = trained(case, folder, world)
            one = trained(case, folder, None)
            pairs = [list(zip(weights(early[0]), weights(other), strict=True)) for other in (late, one)]
            told[case] = {
                "same": all(torch.equal(a, b) for a, b in pairs[0]),
                "apart": max(float((a - b).abs().max()) for a, b in pairs[1]),
                "events": events,
                "buckets": len(early[0].state.gradients._sum._buckets),
            }
    return told
