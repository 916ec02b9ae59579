"""What a session tells its caller, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmtool.training.forecast import Forecast
from cmtool.training.report import Report


class Listener:
    """What a session tells; every method may be overridden."""

    def started(self, step: int, steps: int, needs: Forecast) -> None:
        """Training begins at `step` of `steps`."""

    def report(self, report: Report) -> None:
        """Some steps are done."""

    def saved(self, path: Path) -> None:
        """A checkpoint, grid or model was written."""

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """The sampling average was judged."""

    def warn(self, message: str) -> None:
        """Something is wrong but the run goes on."""


@dataclass(frozen=True)
class Outcome:
    """How a session ended: the model if the run is finished, else why it stopped."""

    model: Path | None
    step: int
    signal: int = 0
    out_of_time: bool = False
