"""The experiments behind `cmtool theory WHAT`, one at a time or all of them on two processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from cmtool.errors import UserError, unknown
from cmtool.theory.study import Study

# Each command and the module whose `run` is its study.
STUDIES = {
    "scaling": "scaling",
    "classes": "classes",
    "schedules": "schedules",
    "typical": "typical",
    "edm": "edm",
    "gap": "gap",
    "samplers": "solvers",
    "chain": "chain",
}
# The longest first, so that the other process can take all the short ones meanwhile.
ORDER = ("samplers", *[name for name in STUDIES if name != "samplers"])


def find(name: str) -> Callable[..., Study]:
    """The function of one study; every argument of it has a default.

    Raises:
        UserError: for an unknown name.
    """
    if name not in STUDIES:
        raise UserError(unknown("theory command", name, STUDIES))
    function: Callable[..., Study] = importlib.import_module(f"cmtool.theory.{STUDIES[name]}").run
    return function


def run_default(name: str) -> Study:
    """One study as `theory all` runs it; a plain function, so that another process can be given it."""
    return find(name)()


def run_all(jobs: int = 2) -> Iterator[Study]:
    """Every study with its defaults, as each is finished; `jobs` processes, 1 runs them here."""
    if jobs < 2 or (os.cpu_count() or 1) < 2:
        yield from (run_default(name) for name in ORDER)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = [pool.submit(run_default, name) for name in ORDER]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_order(studies: list[Study]) -> list[Study]:
    """Studies in the order of the commands, whichever was finished first."""
    return sorted(studies, key=lambda study: list(STUDIES).index(study.name))
