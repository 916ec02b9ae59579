"""The warm parent of the trials, and the commands they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.commands import Command, commands, warm_up


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the commands start from; everything is imported and has run once."""
    folder = tmp_path_factory.mktemp("warm")
    warm_up(folder)
    return folder


@pytest.fixture(scope="session")
def known(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """The commands by name, each with what it makes when nothing happens and how long that takes."""
    return commands(warm, tmp_path_factory.mktemp("references"))
