"""A headless browser for tests; where Debian's chromium and its driver are missing, tests are skipped and say so."""

from __future__ import annotations

import pytest

from tests.browser import webdriver


@pytest.fixture
def browser(tmp_path):
    if webdriver.find_browser() is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    window = webdriver.Browser(downloads)
    yield window
    window.close()
