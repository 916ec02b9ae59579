"""One update of a moving average of the weights, ours against diffusers' EMAModel and plain loops."""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.matched import matched_config, pictures
from benchmarks.pairs import Contestant, compare, parser, publish
from cmtool.training.averages import move_towards
from cmtool.training.setup import fresh_student

DECAY, REPEATS = 0.9999, 10


def by_loop(average: nn.Module, source: nn.Module) -> None:
    """One parameter after another, as in most training scripts."""
    with torch.no_grad():
        for old, new in zip(average.parameters(), source.parameters(), strict=True):
            old.mul_(DECAY).add_(new, alpha=1 - DECAY)


def main(arguments: list[str] | None = None) -> None:
    """Measure and publish."""
    asked = parser(__doc__).parse_args(arguments)
    torch.set_num_threads(asked.threads)
    network = fresh_student(matched_config(asked, "ct"), pictures(asked, 16)).network.to(asked.device)
    ours, loop = (copy.deepcopy(network).requires_grad_(False) for _ in range(2))
    absent = {}

    def many(move: object) -> object:
        return lambda: [move() for _ in range(REPEATS)]  # type: ignore[operator]

    entries = [
        Contestant("cmtool", True, many(lambda: move_towards(ours, network, DECAY))),
        Contestant("loop over parameters", False, many(lambda: by_loop(loop, network))),
    ]
    try:
        if "diffusers" not in asked.peers.split(","):
            raise ImportError("not asked for")
        from diffusers.training_utils import EMAModel

        theirs = EMAModel(network.parameters(), decay=DECAY)
        entries.append(Contestant("diffusers EMAModel", False, many(lambda: theirs.step(network.parameters()))))
    except ImportError as error:
        absent["diffusers"] = str(error)
    publish(
        "averages", [compare(f"{REPEATS} updates of an average", entries, asked.rounds, asked.clock, absent)], asked
    )


if __name__ == "__main__":
    main()
