"""Trials and inputs that several test processes count are said as one sum."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from tests import conftest, counted


def test_what_workers_count_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(counted.COUNTED, "fault trials", Counter())
    monkeypatch.setitem(counted.COUNTED, "fuzz inputs", Counter(png=1500))
    worker = SimpleNamespace(config=SimpleNamespace(workeroutput={}))
    conftest.pytest_sessionfinish(worker)
    conftest.pytest_testnodedown(SimpleNamespace(workeroutput=worker.config.workeroutput), None)
    conftest.pytest_testnodedown(SimpleNamespace(workeroutput={"counted": {"fault trials": {"kill": 2}}}), None)
    conftest.pytest_testnodedown(SimpleNamespace(), "crashed")
    assert counted.lines() == ["fault trials: 2 (2 kill)", "fuzz inputs: 3,000 (3,000 png)"]
