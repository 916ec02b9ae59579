"""The next step's images on their way to the GPU while it computes this one's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[int, int, int]


class Ahead(Generic[T]):
    """Answers `make(step, start, count)`, and makes the same rows of the next step in a thread meanwhile.

    `make` must be a function of its arguments alone: what was made too early (a run went back to a checkpoint) is
    dropped, and nothing but time is lost.
    """

    def __init__(self, make: Callable[[int, int, int], T]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._waiting: dict[Key, Future[T]] = {}

    def settle(self) -> None:
        """Wait until the thread has made what it was asked for."""
        wait(self._waiting.values())

    def take(self, step: int, start: int, count: int) -> T:
        """Return make(step, start, count) and begin with the next step's."""
        made = self._waiting.pop((step, start, count), None)
        found = self._make(step, start, count) if made is None else made.result()
        late = [key for key in self._waiting if key[0] not in (step, step + 1)]
        for key in late:
            self._waiting.pop(key).cancel()
        self._waiting[step + 1, start, count] = self._pool.submit(self._make, step + 1, start, count)
        return found
