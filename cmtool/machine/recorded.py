"""Work for a GPU that is recorded once and replayed: with small networks, Python is the bottleneck."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = tuple["Tensor | None", ...]
# Calls made directly before one is recorded: in these, libraries choose their algorithms and allocate memory.
WARM_UP = 3


# A recording that takes this much longer than the direct call is dropped.
SLOWER = 1.05


class _Tape(NamedTuple):
    """A graph, the memory that it reads its inputs from, and the memory that it leaves its answers in."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    answers: tuple[Tensor, ...]


class _Span:
    """The time that the GPU takes for a piece of work, known once it is done."""

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __enter__(self) -> None:
        self._start.record()

    def __exit__(self, *_: object) -> None:
        self._end.record()

    def milliseconds(self) -> float | None:
        """Return the time, None while it is not known; does not wait."""
        return self._start.elapsed_time(self._end) if self._end.query() else None


@dataclass
class _Race:
    """One kind of call, direct and replayed; measures once which is faster."""

    calls: int = 0
    replays: int = 0
    plain: _Span | None = None
    replayed: _Span | None = None

    def settled(self) -> tuple[float, float] | None:
        """Return both times as soon as they are known."""
        if self.plain is None or self.replayed is None:
            return None
        times = self.plain.milliseconds(), self.replayed.milliseconds()
        if times[0] is None or times[1] is None:
            return None
        self.plain = None
        return times[0], times[1]


def kind_of(inputs: Inputs) -> tuple[Any, ...]:
    """Return what decides whether a recording fits: shape and dtype of every input, or that there is none."""
    return tuple(None if x is None else (tuple(x.shape), x.dtype) for x in inputs)


class Recorded:
    """`work(*inputs)` as CUDA graphs, one for each kind of inputs (shapes, dtypes).

    `work` must do all its arithmetic on the GPU, read nothing back from it, draw no random numbers, and depend on
    nothing but its inputs and memory that stays where it is (weights that are updated in place). Work that turns
    out not to be like that, or to be slower this way, is called directly from then on, and `reason` says why.

    Args:
        work: what to record; returns tensors.
        before: called before a recording, after the calls that warm up.
        within: share of the device's memory above which nothing is recorded: a recording keeps what it needs, and
            large networks have nothing to gain from one.
        tell: called with `reason` when there is one.
    """

    def __init__(
        self,
        work: Callable[..., tuple[Tensor, ...]],
        before: Callable[[], None] | None = None,
        within: float = 0.25,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._work, self._before, self._within, self._tell = work, before, within, tell
        self._races: dict[tuple[Any, ...], _Race] = {}
        self._tapes: dict[tuple[Any, ...], _Tape] = {}
        self._pool: Any = None
        self.reason: str | None = None

    @property
    def replays(self) -> bool:
        """Whether anything has been recorded."""
        return bool(self._tapes)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Return the result of `work`, in memory that belongs to the caller."""
        kind = kind_of(inputs)
        race = self._races.setdefault(kind, _Race())
        if kind not in self._tapes:
            race.calls += 1
            if self.reason is not None or (race.calls > WARM_UP and not self._record(kind, inputs)):
                return self._work(*inputs)
            if race.calls == WARM_UP:
                return self._watched(inputs)
            if race.calls < WARM_UP:
                race.plain = span = _Span()
                with span:
                    return self._work(*inputs)
        answers = self._replay(self._tapes[kind], race, inputs)
        if (times := race.settled()) and times[1] > SLOWER * times[0]:
            self._give_up(f"it takes {times[1]:.1f} ms replayed and {times[0]:.1f} ms as it is")
            self._tapes.clear()
        return answers

    def _give_up(self, reason: str) -> bool:
        if self.reason is None and self._tell is not None:
            self._tell(reason)
        self.reason = reason
        return False

    def _replay(self, tape: _Tape, race: _Race, inputs: Inputs) -> tuple[Tensor, ...]:
        there = [place for place in tape.inputs if place is not None]
        torch._foreach_copy_(there, [x for x in inputs if x is not None])
        race.replays += 1
        span = _Span() if race.replays == 2 else None  # the first one brings the graph to the GPU
        race.replayed = span or race.replayed
        with span or contextlib.nullcontext():
            tape.graph.replay()
        return tuple(answer.clone() for answer in tape.answers)

    def _watched(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Do the work and see whether it waits for the GPU: recording it would fail, and spoil work in progress."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                answers = self._work(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in heard:
            if "called a synchronizing" in str(warning.message):
                self._give_up(f"it waits for the GPU ({warning.filename}:{warning.lineno})")
            elif "Synchronization debug mode" not in str(warning.message):  # torch's word on the mode itself
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return answers

    def _record(self, kind: tuple[Any, ...], inputs: Inputs) -> bool:
        """Record the work on inputs of this kind; whether that worked. Nothing is computed."""
        device = next(x.device for x in inputs if x is not None)
        used, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        if used > self._within * there:
            return self._give_up(f"it takes {used / there:.0%} of the device's memory")
        if self._before is not None:
            self._before()
        places = tuple(None if x is None else x.clone() for x in inputs)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # A graph or tensor that the collector finds while work is recorded would call what must not be called then.
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                answers = self._work(*places)
        except Exception as error:  # a driver, library or kernel may raise anything, and none of it is a reason to stop
            return self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        finally:
            gc.enable() if collects else None
            torch.cuda.set_stream(stream)  # which a failed recording leaves set to its own
        self._tapes[kind] = _Tape(graph, places, answers)
        return True
