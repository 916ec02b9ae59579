"""Everything that changes while training runs, and its way into a checkpoint and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmtool.checkpoint import load_tensors, save_model
from cmtool.config.schema import RunConfig
from cmtool.errors import CheckpointError
from cmtool.models import Model
from cmtool.rng import derive
from cmtool.training.averages import decay_at, move_towards
from cmtool.training.numbers import LossScale
from cmtool.training.optimizers import build_optimizer, optimizer_tensors, restore_optimizer
from cmtool.training.provenance import machine, versions
from cmtool.training.run_folder import RunFolder


class TrainState:
    """Student, target, sampling averages and optimizer at a step.

    `target` is the student itself unless the recipe gives it a decay of its own.
    """

    def __init__(self, config: RunConfig, student: Model) -> None:
        self.config = config
        self.student = student.train()
        part = config.recipe.target
        self.target: Model = self._frozen_copy().train() if part.keeps_network else student
        self.ema = self._frozen_copy().eval()
        self.extra_emas = [self._frozen_copy().eval() for _ in config.train.extra_emas]
        self.names = [name for name, p in student.network.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.train, self.parameters())
        self.step = 0
        self.scale = LossScale(config.train.precision == "fp16")
        self.retries = 0

    @property
    def noise_seed(self) -> int:
        """Seed of noise, times and dropout: the run's own, another one after each roll-back to a checkpoint."""
        seed = self.config.train.seed
        return derive(seed, "retry", self.retries) if self.retries else seed

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights that are trained, in the order of `names`."""
        return [p for p in self.student.network.parameters() if p.requires_grad]

    def _frozen_copy(self) -> Model:
        return copy.deepcopy(self.student).requires_grad_(False)

    def advance_averages(self, target_ema: float) -> None:
        """Move the sampling averages and the target after the optimizer's step, in the released code's order."""
        train = self.config.train
        # A magnitude-preserving network keeps its weights at unit size; the averages follow the normalized ones.
        normalize = getattr(self.student.network, "normalize_weights", None)
        if normalize is not None:
            normalize()
        move_towards(self.ema.network, self.student.network, decay_at(train.ema, self.step))
        for settings, average in zip(train.extra_emas, self.extra_emas, strict=True):
            move_towards(average.network, self.student.network, decay_at(settings, self.step))
        if self.target is not self.student:
            move_towards(self.target.network, self.student.network, target_ema)

    def _networks(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"student": self.student.network, "sample_ema": self.ema.network}
        if self.target is not self.student:
            networks["target"] = self.target.network
        networks.update({f"extra_ema_{i}": average.network for i, average in enumerate(self.extra_emas)})
        return networks

    def tensors(self) -> dict[str, Tensor]:
        """Return the complete training state by name."""
        found = {
            f"{role}.{name}": tensor
            for role, network in self._networks().items()
            for name, tensor in network.state_dict().items()
        }
        state = optimizer_tensors(self.optimizer, self.names)
        return found | {f"optimizer.{name}": tensor for name, tensor in state.items()}

    def save(self, path: Path) -> None:
        """Write the state to `path` (safetensors with a digest), whole or not at all."""
        header = {"kind": "training-state", "step": self.step, "versions": versions()}
        header |= {"loss_scale": self.scale.state(), "retries": self.retries}
        save_model(path, self.tensors(), header)

    def restore(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is damaged or of another network.
        """
        tensors, header = load_tensors(path)
        try:
            for role, network in self._networks().items():
                own = {k.removeprefix(f"{role}."): v for k, v in tensors.items() if k.startswith(f"{role}.")}
                network.load_state_dict(own)
            state = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
            restore_optimizer(self.optimizer, self.names, state)
            self.step = int(header["step"])
            self.scale.restore(header.get("loss_scale", self.scale.state()))
            self.retries = int(header.get("retries", 0))
        except (KeyError, IndexError, AttributeError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} does not fit this run's network: {str(error).splitlines()[0]}") from error

    def export(self, path: Path, extra: dict[str, Any] | None = None, network: nn.Module | None = None) -> None:
        """Write the sampling average (or another network) with its header as a model file."""
        header = {**self.student.header, "step": self.step, "versions": versions(), **(extra or {})}
        header["machine"] = machine(self.student.device, self.config)
        save_model(path, (network or self.ema.network).state_dict(), header)


def restore_newest(folder: RunFolder, state: TrainState) -> tuple[int | None, dict[Path, str]]:
    """Restore the newest whole checkpoint; return its step (None: there is none) and what was found damaged."""
    damaged = {}
    for step, file in folder.checkpoints():
        try:
            state.restore(file)
        except CheckpointError as error:
            damaged[file] = error.message
            continue
        return step, damaged
    return None, damaged
