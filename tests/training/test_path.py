"""The way from the loop to the mathematics is short, and a reader finds every step of it in three files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

from tests.training.tiny import config_of, trainer_of

EXPECTED = [
    ("loop.py", "run"),
    ("loop.py", "step"),
    ("objective.py", "loss"),
    ("objective.py", "measure"),
    ("distance.py", "between"),
    ("distance.py", "pseudo_huber"),
]


def stack_of(name: str, work) -> list[tuple[str, str]]:
    """Return the frames, outermost first, of the package's first call of a function `name` within `work`."""
    found: list[tuple[str, str]] = []

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == name and not found:
            at: FrameType | None = frame
            while at is not None:
                path = Path(at.f_code.co_filename)
                if "cmtool" in path.parts and "tests" not in path.parts:
                    found.insert(0, (path.name, at.f_code.co_name))
                at = at.f_back

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def test_six_frames_in_three_files_lead_from_the_run_to_the_distance():
    trainer = trainer_of(config_of("ict", steps=1))
    assert stack_of("pseudo_huber", lambda: list(trainer.run())) == EXPECTED
