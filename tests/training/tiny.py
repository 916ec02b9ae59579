"""Runs small enough for a test: the digits preset with an 8-channel network, 8 images a step."""

from __future__ import annotations

from pathlib import Path

import torch

from cmtool.checkpoint import save_model
from cmtool.config.load import resolve
from cmtool.config.schema import RunConfig
from cmtool.data.load import load_dataset
from cmtool.training.listener import Listener, Outcome
from cmtool.training.run_folder import RunFolder
from cmtool.training.session import Session
from cmtool.training.setup import fresh_student, prepare
from cmtool.training.stopping import Stop

SMALL = ("network.channels=8", "network.head_channels=8", "data.size=64")
FLAGS = ("--set", "network.channels=8", "--set", "network.head_channels=8", "--set", "data.size=64")
CPU = torch.device("cpu")


def config_of(
    recipe: str, *sets: str, steps: int = 6, batch: int = 8, preset: str = "digits", **flags: object
) -> RunConfig:
    """Return a small configuration of a recipe of the digits preset (or of another one, as it is)."""
    given = {"train.steps": steps, "train.batch_size": batch, **flags}
    small = SMALL if preset == "digits" else ()
    return resolve(preset, recipe=recipe, sets=(*small, *sets), flags=given).config


def trainer_of(config: RunConfig):
    """Return a trainer at step 0."""
    return prepare(config, load_dataset(config.data), CPU)


def teacher_file(path: Path, seed: int = 5, scale: float = 0.2, preset: str = "digits") -> Path:
    """Write a diffusion model whose weights are random (fresh ones end in zeros and would answer nothing)."""
    config = config_of("edm", preset=preset)
    model = fresh_student(config, load_dataset(config.data))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * scale)
    save_model(path, model.network.state_dict(), model.header)
    return path


def with_source(recipe: str, folder: Path, *sets: str, preset: str = "digits", **flags: object) -> RunConfig:
    """Return a small configuration, with a teacher or starting weights where the recipe needs them."""
    needs = {"cd": "teacher", "ect": "init"}.get(recipe)
    if needs:
        file = folder / "teacher.safetensors"
        flags[needs] = str(file if file.is_file() else teacher_file(file, preset=preset))
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
    return Session(config, trainer_of(config), RunFolder(path), heard), heard


def train(config: RunConfig, path: Path, stop: Stop | None = None) -> Outcome:
    """Run a session to its end."""
    return session_of(config, path)[0].run(stop or Stop())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
