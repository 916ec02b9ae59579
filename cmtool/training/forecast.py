"""What a run will need: disk, memory, time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cmtool.config.schema import RunConfig
from cmtool.errors import UserError
from cmtool.networks import parameter_count
from cmtool.training.state import TrainState
from cmtool.units import human_bytes


@dataclass(frozen=True)
class Forecast:
    """Bytes of a checkpoint, of all that the run keeps on disk at once, and of weights and optimizer in memory.

    Memory is for one process.
    """

    parameters: int
    checkpoint: int
    disk: int
    memory: int

    def lines(self) -> list[str]:
        """Return the line to show at start-up."""
        memory, disk = human_bytes(self.memory), human_bytes(self.disk)
        return [
            f"{self.parameters:,} parameters; weights, averages and optimizer take {memory} of memory "
            f"besides the activations, the run up to {disk} of disk"
        ]


def forecast(config: RunConfig, state: TrainState) -> Forecast:
    """Count what a run keeps: two checkpoints and one being written, and the model."""
    weights = sum(p.numel() * p.element_size() for p in state.student.network.parameters())
    copies = 2 + len(state.extra_emas) + (state.target is not state.student)
    moments = {"sgd": 1, "lion": 1, "muon": 1}.get(config.train.optimizer, 2)
    checkpoint = weights * (copies + moments)
    # The fake network of score distillation has no average, but an optimizer of its own.
    fake = 0 if state.fake is None else sum(p.numel() * p.element_size() for p in state.fake.model.network.parameters())
    checkpoint += fake * (1 + moments)
    kept = config.train.steps // config.train.keep_every if config.train.keep_every else 0
    return Forecast(
        parameters=parameter_count(state.student.network),
        checkpoint=checkpoint,
        disk=checkpoint * (3 + kept + (config.train.decay != "none")) + 2 * weights,
        memory=(checkpoint + weights + fake) // (state.sharding.world.size if state.sharding is not None else 1),
    )


def _written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("checkpoints/*/*") if file.is_file())


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to start a run that the disk has no room for; what a resumed run has already written is deducted.

    Raises:
        UserError: says what is free and what is needed.
    """
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed - _written(folder):
        raise UserError(
            f"the disk under {place} has {human_bytes(free)} free and the run needs {human_bytes(needed)}.",
            "free some space, choose another disk with --out, or set train.checkpoint_every and train.keep_every",
        )
