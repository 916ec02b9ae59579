"""A headless browser for tests; where Debian's chromium and its driver are missing, tests are skipped and say so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("webdriver", Path(__file__).parent / "webdriver.py")
webdriver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(webdriver)


@pytest.fixture
def browser(tmp_path):
    if webdriver.find_browser() is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    window = webdriver.Browser(downloads)
    yield window
    window.close()
