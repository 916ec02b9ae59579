"""Experiment trackers as listeners of a session: TensorBoard files, Weights & Biases. Off unless requested."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cmtool.config.schema import RunConfig
from cmtool.files.cache import offline
from cmtool.training.forecast import Forecast
from cmtool.training.report import Listener, Report


def scalars(report: Report) -> dict[str, float]:
    """Return a report's numbers by the names that trackers show."""
    named = {
        "train/loss": report.loss,
        "train/distance": report.distance,
        "train/grad_norm": report.grad_norm,
        "schedule/num_scales": report.num_scales,
        "schedule/target_ema": report.target_ema,
        "schedule/lr": report.lr,
        "speed/images_per_s": report.images_per_s,
    }
    return named | {f"distance/t{band}": value for band, value in report.bands.items()}


class Several(Listener):
    """Passes everything on to several listeners."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners

    def started(self, step: int, steps: int, needs: Forecast) -> None:
        """Pass it on."""
        for listener in self.listeners:
            listener.started(step, steps, needs)

    def expects(self, sentence: str) -> None:
        """Pass it on."""
        for listener in self.listeners:
            listener.expects(sentence)

    def report(self, report: Report) -> None:
        """Pass it on."""
        for listener in self.listeners:
            listener.report(report)

    def saved(self, path: Path) -> None:
        """Pass it on."""
        for listener in self.listeners:
            listener.saved(path)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Pass it on."""
        for listener in self.listeners:
            listener.evaluated(step, figures)

    def warn(self, message: str) -> None:
        """Pass it on."""
        for listener in self.listeners:
            listener.warn(message)


class Tracker(Listener):
    """The common part of trackers: numbers of reports and evaluations, and sample grids, by step."""

    def report(self, report: Report) -> None:
        """Write the numbers of a report."""
        self.numbers(scalars(report), report.step)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of an evaluation."""
        self.numbers({f"eval/{name}": value for name, value in figures.items()}, step)

    def saved(self, path: Path) -> None:
        """Show a sample grid."""
        if path.suffix == ".png" and path.stem.startswith("step-"):
            self.picture(path, int(path.stem.removeprefix("step-")))

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Write numbers of a step."""

    def picture(self, path: Path, step: int) -> None:
        """Show a picture of a step."""


class TensorBoard(Tracker):
    """Writes event files into the run folder; events that a killed run wrote beyond its checkpoint are hidden."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder / "tensorboard", stack
        self._writer: Any = None

    def started(self, step: int, steps: int, needs: Forecast) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step or None)  # type: ignore[no-untyped-call]
        self._stack.callback(self._writer.close)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Write numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        """Show a picture of a step."""
        from cmtool.data.decode import read_image

        self._writer.add_image("samples", read_image(path, 3), step, dataformats="HWC")


class WandB(Tracker):
    """Writes for Weights & Biases: offline unless the user has logged in; a resumed run continues under its own id."""

    def __init__(self, folder: Path, config: RunConfig, stack: ExitStack) -> None:
        self._folder, self._config, self._stack = folder, config, stack
        self._run: Any = None

    def started(self, step: int, steps: int, needs: Forecast) -> None:
        """Begin the run."""
        import wandb

        named = hashlib.blake2b(str(self._folder.resolve()).encode(), digest_size=6).hexdigest()
        logged_in = bool(os.environ.get("WANDB_API_KEY")) and not offline()
        mode: Any = os.environ.get("WANDB_MODE", "online" if logged_in else "offline")
        self._run = wandb.init(
            project="cmtool",
            id=f"{self._folder.name}-{named}",
            name=self._folder.name,
            dir=str(self._folder),
            config=self._config.model_dump(mode="json"),
            mode="offline" if offline() and mode == "online" else mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        self._stack.callback(self._run.finish)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Write numbers of a step."""
        self._run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        """Show a picture of a step."""
        import wandb

        self._run.log({"samples": wandb.Image(str(path))}, step=step)


@contextmanager
def tracked(view: Listener, names: Sequence[str], folder: Path, config: RunConfig) -> Iterator[Listener]:
    """Yield a listener that passes everything on to `view` and to the trackers; they are closed when the block ends.

    Args:
        view: what a person sees.
        names: "tensorboard", "wandb".
        folder: the run folder, where their files go.
        config: the settings they show.
    """
    with ExitStack() as stack:
        made = {"tensorboard": lambda: TensorBoard(folder, stack), "wandb": lambda: WandB(folder, config, stack)}
        yield Several([view, *(made[name]() for name in names)]) if names else view
