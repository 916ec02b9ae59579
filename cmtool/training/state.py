"""Everything that changes while training runs, and its way into a checkpoint and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmtool.checkpoint import load_tensors, save_model
from cmtool.config.schema import RunConfig
from cmtool.errors import CheckpointError
from cmtool.models import Model, build_model, placed
from cmtool.rng import derive
from cmtool.training.averages import decay_at, move_towards
from cmtool.training.clock import Course
from cmtool.training.learner import Learner
from cmtool.training.provenance import machine, versions
from cmtool.training.run_folder import RunFolder
from cmtool.training.sharding import Sharding, local, share

# What the tensors of the optimizers are called in a checkpoint, in the order of `TrainState.learners`.
_OPTIMIZERS = ("optimizer.", "fake_optimizer.")


class TrainState:
    """Student, target, sampling averages and optimizer at a step.

    `target` is the student itself unless the recipe gives it its own decay; `fake` is the fake network of score
    distillation with its optimizer. With `sharding` every process holds its rows of each network, and all processes
    must take part in saving, exporting or copying one.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Model,
        sharding: Sharding | None = None,
        precision: str | None = None,
        fake: Model | None = None,
    ) -> None:
        self.config = config
        # The number format of the computation, which the settings may leave to the machine.
        self.precision = precision or config.train.precision
        self.sharding = sharding
        self.student = student.train()
        part = config.recipe.target
        self.target: Model = self._frozen_copy().train() if part.keeps_network else student
        self.ema = self._frozen_copy().eval()
        self.extra_emas = [self._frozen_copy().eval() for _ in config.train.extra_emas]
        self._fake = None if fake is None else fake.train()
        if sharding is not None:
            for network in self._networks().values():
                sharding.apply(network)
        self.learner = Learner(student, config.train, sharding)
        self.fake = None if fake is None else Learner(fake, config.train, sharding, config.recipe.score.fake_lr)
        self.optimizer, self.gradients = self.learner.optimizer, self.learner.gradients
        self.step = 0
        self.retries = 0
        self.course = Course(config.train.steps)
        # Seconds spent on the run, where it follows a clock.
        self.spent: float | None = None

    @property
    def noise_seed(self) -> int:
        """Seed of noise, times and dropout: the run's own, and a new one after each roll-back to a checkpoint."""
        seed = self.config.train.seed
        return derive(seed, "retry", self.retries) if self.retries else seed

    @property
    def learners(self) -> list[Learner]:
        """Everything that has an optimizer: the student first, then the fake network, if there is one."""
        return [self.learner] if self.fake is None else [self.learner, self.fake]

    def parameters(self) -> list[nn.Parameter]:
        """Return the student's weights that are trained."""
        return self.learner.parameters()

    def clear_gradients(self) -> None:
        """Forget the gradients of every network."""
        for learner in self.learners:
            learner.gradients.clear()

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of a sharded run; without sharding, every caller does."""
        return self.sharding is None or self.sharding.world.main

    def average_norm(self) -> float:
        """Return the Euclidean norm of the sampling average's weights, over all processes."""
        return float(self.gradients.total_norm([local(parameter) for parameter in self.ema.network.parameters()]))

    def average(self, network: Model | None = None) -> Model | None:
        """Return the sampling average (or another model of the run), ready to be called by process 0 only.

        In a sharded run it is a whole copy in process 0 and None in the others; all of them must call this.
        """
        model = network or self.ema
        if self.sharding is None:
            return model
        tensors = self.sharding.gather(model.network.state_dict())
        if not self.sharding.world.main:
            return None
        copied = build_model(model.header).to(model.dtype)
        copied.network.load_state_dict(tensors)
        copied.autocast = model.autocast
        return placed(copied.requires_grad_(False), model.device, self.config.train.compile).eval()

    def _frozen_copy(self) -> Model:
        return copy.deepcopy(self.student).requires_grad_(False)

    def advance_averages(self, target_ema: float) -> None:
        """Move the sampling averages and the target after an optimizer step, in the order of the released code."""
        train = self.config.train
        move_towards(self.ema.network, self.student.network, decay_at(train.ema, self.step))
        for settings, average in zip(train.extra_emas, self.extra_emas, strict=True):
            move_towards(average.network, self.student.network, decay_at(settings, self.step))
        if self.target is not self.student:
            move_towards(self.target.network, self.student.network, target_ema)

    def _networks(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"student": self.student.network, "sample_ema": self.ema.network}
        if self.target is not self.student:
            networks["target"] = self.target.network
        if self._fake is not None:
            networks["fake"] = self._fake.network
        networks.update({f"extra_ema_{i}": average.network for i, average in enumerate(self.extra_emas)})
        return networks

    def tensors(self) -> dict[str, Tensor]:
        """Return the complete training state by name; in a sharded run process 0 gets it and the others nothing."""
        found = {
            f"{role}.{name}": tensor
            for role, network in self._networks().items()
            for name, tensor in network.state_dict().items()
        }
        if self.sharding is not None:
            found = self.sharding.gather(found)
        for prefix, learner in zip(_OPTIMIZERS, self.learners, strict=False):
            found |= {f"{prefix}{name}": tensor for name, tensor in learner.moments().items()}
        return found

    def save(self, path: Path) -> None:
        """Write the state to `path` (safetensors with a digest), whole or not at all."""
        header = {"kind": "training-state", "step": self.step, "versions": versions()}
        # The meaning of the label embedding's rows: a run that continues from here has to number classes the same way.
        header["data"] = self.student.header["data"]
        header |= {"loss_scale": self.gradients.scale.state(), "retries": self.retries}
        if self.fake is not None:
            header["fake_loss_scale"] = self.fake.gradients.scale.state()
        if self.spent is not None or self.course.decisions:
            header["clock"] = {"spent": self.spent or 0.0, "decisions": self.course.decisions}
        tensors = self.tensors()
        if self.writes:
            save_model(path, tensors, header)

    def restore(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is damaged or of another network.
        """
        tensors, header = load_tensors(path)
        try:
            for role, network in self._networks().items():
                own = {k.removeprefix(f"{role}."): v for k, v in tensors.items() if k.startswith(f"{role}.")}
                self._load(network, own)
            for prefix, learner in zip(_OPTIMIZERS, self.learners, strict=False):
                learner.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            self.step = int(header["step"])
            self.gradients.scale.restore(header.get("loss_scale", self.gradients.scale.state()))
            if self.fake is not None:
                self.fake.gradients.scale.restore(header["fake_loss_scale"])
            self.retries = int(header.get("retries", 0))
            clock = header.get("clock") or {}
            self.course = Course(self.config.train.steps, clock.get("decisions", ()))
            self.spent = float(clock["spent"]) if "spent" in clock else None
        except (KeyError, IndexError, AttributeError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} does not fit this run's network: {str(error).splitlines()[0]}") from error

    def _load(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load weights into a network; if it is sharded, every process takes its rows."""
        if self.sharding is None:
            network.load_state_dict(tensors)
            return
        own = network.state_dict()
        wrong = sorted(own.keys() ^ tensors.keys()) or [name for name in own if own[name].shape != tensors[name].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors differ, first {wrong[0]}")
        for name, tensor in own.items():
            local(tensor).copy_(share(tensors[name], tensor))

    def export(self, path: Path, extra: dict[str, Any] | None = None, network: nn.Module | None = None) -> None:
        """Write the sampling average (or another network) with its header as a model file."""
        header = {**self.student.header, "step": self.step, "versions": versions(), **(extra or {})}
        header["machine"] = machine(self.student.device, self.config, self.precision)
        if self.course.decisions:
            header["decisions"] = self.course.decisions
        tensors = (network or self.ema.network).state_dict()
        if self.sharding is not None:
            tensors = self.sharding.gather(tensors)
        if self.writes:
            save_model(path, tensors, header)


def restore_newest(folder: RunFolder, state: TrainState) -> tuple[int | None, dict[Path, str]]:
    """Restore the newest intact checkpoint; return its step (None: there is none) and what was found damaged."""
    damaged = {}
    for step, file in folder.checkpoints():
        try:
            state.restore(file)
        except CheckpointError as error:
            damaged[file] = error.message
            continue
        return step, damaged
    return None, damaged
