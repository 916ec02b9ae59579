"""The readers, and the count of inputs at the end."""

from __future__ import annotations

import pytest

from tests.fuzz.sandbox import TRIED


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory):
    """Every reader by name."""
    from tests.fuzz.readers import readers

    return readers(tmp_path_factory.mktemp("examples"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many inputs were tried."""
    if TRIED:
        listed = ", ".join(f"{count:,} {name}" for name, count in sorted(TRIED.items()))
        terminalreporter.write_line(f"fuzz inputs: {sum(TRIED.values()):,} ({listed})")
