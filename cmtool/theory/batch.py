"""All studies at once, on two processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from cmtool.theory.studies import NAMES, run_default
from cmtool.theory.study import Study

# The longest first, so that the other process takes all the short ones meanwhile.
ORDER = ("samplers", *[name for name in NAMES if name != "samplers"])


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
    return sorted(studies, key=lambda study: NAMES.index(study.name))
