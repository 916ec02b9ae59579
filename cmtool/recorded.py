"""Work for a GPU that is recorded once and replayed: where networks are small, Python is what everybody waits for."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = tuple["Tensor | None", ...]
# Calls that are made as they are before one is recorded: libraries choose their algorithms and take their memory then.
WARM_UP = 3


class _Tape(NamedTuple):
    """A graph, the memory that it reads its inputs from, and that which it leaves its answers in."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    answers: tuple[Tensor, ...]


def kind_of(inputs: Inputs) -> tuple[Any, ...]:
    """Return what decides whether a recording fits: shape and dtype of every input, or that there is none."""
    return tuple(None if x is None else (tuple(x.shape), x.dtype) for x in inputs)


class Recorded:
    """`work(*inputs)` as CUDA graphs, one for each kind of inputs (shapes, dtypes).

    `work` must do all its arithmetic on the GPU, ask nothing back from it, draw no random numbers, and depend on
    nothing but its inputs and memory that stays where it is (weights that are updated in place). Work that turns out
    not to be like that is called as it is from then on, and `reason` says why.

    Args:
        work: what to record; returns tensors.
        before: called before a recording, after the calls that warm up.
        within: share of the device's memory above which nothing is recorded: a recording keeps what it needs, and
            large networks have nothing to gain.
    """

    def __init__(
        self,
        work: Callable[..., tuple[Tensor, ...]],
        before: Callable[[], None] | None = None,
        within: float = 0.25,
    ) -> None:
        self._work, self._before, self._within = work, before, within
        self._calls: dict[tuple[Any, ...], int] = {}
        self._tapes: dict[tuple[Any, ...], _Tape] = {}
        self._pool: Any = None
        self.reason: str | None = None

    @property
    def replays(self) -> bool:
        """Whether anything has been recorded."""
        return bool(self._tapes)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Return what `work` answers, in memory of the caller's own."""
        kind = kind_of(inputs)
        tape = self._tapes.get(kind)
        if tape is None:
            seen = self._calls[kind] = self._calls.get(kind, 0) + 1
            if self.reason is None and seen == WARM_UP:
                return self._watched(inputs)
            if self.reason is not None or seen < WARM_UP or not self._record(kind, inputs):
                return self._work(*inputs)
            tape = self._tapes[kind]
        there = [place for place in tape.inputs if place is not None]
        torch._foreach_copy_(there, [x for x in inputs if x is not None])
        tape.graph.replay()
        return tuple(answer.clone() for answer in tape.answers)

    def _watched(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Do the work and see whether it waits for the GPU: its recording would fail, and spoil what is under way."""
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
                self.reason = f"it waits for the GPU ({warning.filename}:{warning.lineno})"
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return answers

    def _record(self, kind: tuple[Any, ...], inputs: Inputs) -> bool:
        """Record the work on inputs of this kind; whether that worked. Nothing is computed."""
        device = next(x.device for x in inputs if x is not None)
        used, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        if used > self._within * there:
            self.reason = f"it takes {used / there:.0%} of the device's memory"
            return False
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
        except Exception as error:  # whatever a driver, library or kernel may raise: none of it is a reason to stop
            self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            return False
        finally:
            gc.enable() if collects else None
            torch.cuda.set_stream(stream)  # which a recording that failed leaves at its own
        self._tapes[kind] = _Tape(graph, places, answers)
        return True
