"""The readers."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory):
    """Every reader by name."""
    from tests.fuzz.readers import readers

    return readers(tmp_path_factory.mktemp("examples"))
