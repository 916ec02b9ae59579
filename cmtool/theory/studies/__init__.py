"""The experiments behind `cmtool theory WHAT`: each module has one function that returns a `Study`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from cmtool.errors import UserError, unknown
from cmtool.theory.study import Study

NAMES = ("scaling", "classes", "schedules", "typical", "edm", "gap", "samplers", "chain")


def find(name: str) -> Callable[..., Study]:
    """The function of one study; every argument of it has a default.

    Raises:
        UserError: for an unknown name.
    """
    if name not in NAMES:
        raise UserError(unknown("theory command", name, NAMES))
    function: Callable[..., Study] = importlib.import_module(f"cmtool.theory.studies.{name}").run
    return function


def run_default(name: str) -> Study:
    """One study as `theory all` runs it; a plain function, so that another process can be given it."""
    return find(name)()
