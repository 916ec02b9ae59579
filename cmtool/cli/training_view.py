"""What a person sees of a training run: the progress bar's note, what was saved, warnings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cmtool.cli.output import Output
from cmtool.training.forecast import Forecast
from cmtool.training.report import Listener, Report
from cmtool.units import human_time


class View(Listener):
    """Draws a session's reports on stderr."""

    def __init__(self, output: Output, update: Callable[..., None]) -> None:
        self.output = output
        self.update = update
        self._forecast = True

    def started(self, step: int, steps: int, needs: Forecast) -> None:
        """Say what the run needs, and where it goes on from."""
        for line in needs.lines():
            self.output.say(line)
        if step:
            self.output.say(f"going on from step {step} of {steps}")
        self.update(completed=step, note="starting")

    def report(self, report: Report) -> None:
        """Move the bar; after the first report say how long the run will take."""
        # The most wanted first: what a narrow line has no room for is left out from the end.
        note = f"loss {report.loss:.4g}  {report.images_per_s:,.0f} images/s  N {report.num_scales}  lr {report.lr:.1e}"
        self.update(completed=report.step, note=note)
        if self._forecast and report.step < report.steps:
            left = (report.steps - report.step) * report.images_seen / report.step / max(report.images_per_s, 1e-9)
            self.output.say(f"about {human_time(left)} to go at {report.images_per_s:,.0f} images/s")
        self._forecast = False

    def saved(self, path: Path) -> None:
        """Say where a sample grid went."""
        if path.suffix == ".png":
            self.output.say(f"samples: {path}")

    def warn(self, message: str) -> None:
        """Pass a warning on."""
        self.output.warn(message)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Say the figures in one line."""
        self.output.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
