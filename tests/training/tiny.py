"""Runs small enough for a test: the digits preset with an 8-channel network, 8 images a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from cmtool.checkpoint import save_model
from cmtool.config.load import resolve
from cmtool.config.schema import RunConfig
from cmtool.data.load import load_dataset
from cmtool.losses.objective import Loss
from cmtool.machine.stopping import Stop
from cmtool.training.loop import Trainer
from cmtool.training.report import Listener, Outcome, Report
from cmtool.training.run_folder import RunFolder
from cmtool.training.session import Session
from cmtool.training.setup import fresh_student, prepare

SMALL = ("network.channels=8", "network.head_channels=8", "data.size=64")
FLAGS = ("--set", "network.channels=8", "--set", "network.head_channels=8", "--set", "data.size=64")
CPU = torch.device("cpu")
FOLLOWS = ("cd", "sid", "dmd2")  # from a teacher


def config_of(
    recipe: str, *sets: str, steps: int = 6, batch: int = 8, preset: str = "digits", **flags: object
) -> RunConfig:
    """Return a small configuration of a recipe of the digits preset (or of another one, as it is)."""
    given = {"train.steps": steps, "train.batch_size": batch, **flags}
    small = SMALL if preset == "digits" else ()
    return resolve(preset, recipe=recipe, sets=(*small, *sets), flags=given).config


def trainer_of(config: RunConfig) -> Trainer:
    """Return a trainer at step 0."""
    return prepare(config, load_dataset(config.data), CPU)


def advance(trainer: Trainer, step: int) -> None:
    """Train until `step` steps are done."""
    while trainer.state.step < step:
        trainer.step()


def reports(trainer: Trainer) -> Iterator[Report]:
    """Train to the end of the run; a report every `log_every` steps and at the last."""
    for _ in trainer.run(intervals=[trainer.config.train.log_every]):
        yield trainer.report()


def change_loss(trainer: Trainer, change: Callable[[Loss], Loss]) -> None:
    """Let every loss pass through `change` before it is descended."""
    plain = trainer.objective
    trainer.objective = SimpleNamespace(draw=plain.draw, loss=lambda *a: change(plain.loss(*a)))


def teacher_file(path: Path, seed: int = 5, scale: float = 0.2, preset: str = "digits", recipe: str = "edm") -> Path:
    """Write a model, diffusion for "edm", whose weights are random (fresh ones end in zeros and would answer nothing)."""
    config = config_of(recipe, preset=preset)
    model = fresh_student(config, load_dataset(config.data))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * scale)
    save_model(path, model.network.state_dict(), model.header)
    return path


def with_source(recipe: str, folder: Path, *sets: str, preset: str = "digits", **flags: object) -> RunConfig:
    """Return a small configuration, with a teacher or starting weights where the recipe needs them."""
    needs = {"ect": ("init",), "polish": ("teacher", "start")}.get(recipe, ("teacher",) if recipe in FOLLOWS else ())
    for role in needs:
        file = folder / ("start.safetensors" if role == "start" else "teacher.safetensors")
        kind = "icd" if role == "start" else "edm"
        made = file if file.is_file() else teacher_file(file, preset=preset, recipe=kind)
        flags["init" if role == "start" else role] = str(made)
    return config_of(recipe, *sets, preset=preset, **flags)


class Heard(Listener):
    """Keeps what a session told."""

    def __init__(self) -> None:
        self.reports, self.files, self.warnings, self.start = [], [], [], None

    def started(self, step, steps, needs):
        self.start = step

    def report(self, report):
        self.reports.append(report)

    def saved(self, path):
        self.files.append(Path(path))

    def warn(self, message):
        self.warnings.append(message)


def session_of(config: RunConfig, path: Path) -> tuple[Session, Heard]:
    """Return a session in the run folder `path`, and what it will tell."""
    path.mkdir(parents=True, exist_ok=True)
    heard = Heard()
    return Session(trainer_of(config), RunFolder(path), heard), heard


def run(session: Session, stop: Stop | None = None, arguments: Sequence[str] = ()) -> Outcome:
    """Run a session until it ends."""
    stop = stop or Stop()
    session.begin(stop, arguments)
    for due in session.trainer.run(stop, session.intervals()):
        session.attend(due)
    return session.end()


def train(config: RunConfig, path: Path, stop: Stop | None = None) -> Outcome:
    """Run a new session to its end."""
    return run(session_of(config, path)[0], stop)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
