"""A pair of passes side by side: every convolution of both is one call, the difference being half of its batch.

The pair of `convolution.Tape` runs one pass after the other. Here the second runs in a thread that goes on only while
the first waits, from convolution to convolution. There both inputs are known: x, and x' of the second pass; the batch
(x, x' - x) is convolved by W at once, and x' by W' - W where the weights differ. Rounding is that of a tape, but for
biases, which are added exactly. A call of twice the size fills a GPU better and reads the weights once, no notes are
kept, and what is held for the backward pass holds the differences too. Not for networks with dropout, since both passes
would draw from one generator in turns.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.networks.convolution import Geometry, Tape, computed_by, convolve, half_backward, same

# A pass of a pair: what the network answers.
Work = Callable[[], Tensor]
# From the passes of a pair, the second of which records no gradients, to their answers.
Pairing = Callable[[Work, Work], tuple[Tensor, Tensor]]
# How far differences of a pair may be from those of a tape, in units of their own size.
AGREES = 0.1


class _Asked(NamedTuple):
    """A convolution that the second pass has come to."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


class _Unwanted(BaseException):
    """The first pass has failed: the second ends where it is."""


class _Second:
    """The second pass, in a thread of its own."""

    reads = True

    def __init__(self, work: Work) -> None:
        self._work = work
        self._asked: SimpleQueue[_Asked | Tensor | BaseException] = SimpleQueue()
        self._told: SimpleQueue[Tensor | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def advance(self, answer: Tensor | None) -> _Asked | Tensor:
        """Go on with the answer of the last convolution, to the next one or to the end, whose answer is returned."""
        if self._thread is None:
            self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True)
            self._thread.start()
        else:
            self._told.put(answer)
        found = self._asked.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def end(self) -> None:
        """Leave the pass where it is, if it has not ended."""
        if self._thread is not None:
            self._told.put(None)
            self._thread.join()

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype
    ) -> Tensor:
        """Ask for a convolution, and wait for the answer."""
        self._asked.put(_Asked(x, weight, bias, geometry))
        answer = self._told.get()
        if answer is None:
            raise _Unwanted
        return answer

    def _run(self) -> None:
        try:
            stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            with torch.no_grad(), computed_by(self), stream:
                self._asked.put(self._work())
        except BaseException as error:  # told to the first pass, which raises it
            self._asked.put(error)


class _First:
    """The first pass, which leads."""

    reads = False

    def __init__(self, second: _Second) -> None:
        self.second = second
        self.answer: Tensor | None = None  # of the second pass's last convolution

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype
    ) -> Tensor:
        """Convolve for both passes; returns the first one's answer."""
        asked = self.second.advance(self.answer)
        if not isinstance(asked, _Asked) or asked.geometry != geometry or asked.x.shape != x.shape:
            raise RuntimeError("the passes of a pair differ in their convolutions")
        rounded, y, self.answer = both(x.detach(), weight.detach(), bias, asked, dtype)
        return half_backward(x, rounded, weight, bias, geometry, whole=True, y=y)


@torch.no_grad()
def both(
    x: Tensor, weight: Tensor, bias: Tensor | None, asked: _Asked, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x in `dtype`, W x + b, and W' x' + b' of what was asked, both in the dtype of x, from one call."""
    count, channels_last = len(x), x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = torch.empty((2 * count, *x.shape[1:]), dtype=dtype, device=x.device, memory_format=layout)
    rounded, change = batch.split(count)
    rounded.copy_(x)
    torch.sub(asked.x, x, out=change)
    made, moved = convolve(batch, weight.to(dtype), asked.geometry).split(count)
    y = made.to(x.dtype) if bias is None else made + bias[:, None, None]
    answer = y + moved
    if not same(asked.weight, weight):
        answer += convolve(asked.x.to(dtype), (asked.weight - weight).to(dtype), asked.geometry)
    if bias is not None and asked.bias is not None and not same(asked.bias, bias):
        answer += (asked.bias - bias)[:, None, None]
    return rounded, y, answer


def in_step(predict: Work, reach: Work) -> tuple[Tensor, Tensor]:
    """Return what both passes of a pair answer, the second without gradients; see the module."""
    second = _Second(reach)
    first = _First(second)
    try:
        with computed_by(first):
            prediction = predict()
        target = second.advance(first.answer)
    finally:
        second.end()
    if not isinstance(target, Tensor):
        raise RuntimeError("the passes of a pair differ in their convolutions")
    return prediction, target


def on_tape(predict: Work, reach: Work) -> tuple[Tensor, Tensor]:
    """Return what both passes of a pair answer, one after the other."""
    tape = Tape()
    with tape.writing():
        prediction = predict()
    with torch.no_grad(), tape.reading():
        return prediction, reach()


class Race:
    """Runs pairs in step if that agrees with a tape, fits the memory and is faster, as the first pair shows."""

    def __init__(self, clock: Callable[[Callable[[], object]], float] | None = None) -> None:
        self._clock = clock or seconds
        self.won: bool | None = None

    def __call__(self, predict: Work, reach: Work) -> tuple[Tensor, Tensor]:
        """Return what both passes of a pair answer, the second without gradients."""
        if self.won is None:
            self.won = self._wins(predict, reach)
        return (in_step if self.won else on_tape)(predict, reach)

    def _wins(self, predict: Work, reach: Work) -> bool:
        try:
            wanted, found = (
                (prediction - target).detach()
                for prediction, target in (on_tape(predict, reach), in_step(predict, reach))
            )
        except (RuntimeError, MemoryError):  # of memory above all; what is wrong with the pass itself a tape shows
            return False
        if not bool((found - wanted).norm() <= AGREES * wanted.norm()):
            return False
        return self._clock(lambda: in_step(predict, reach)) < self._clock(lambda: on_tape(predict, reach))


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """Return the median seconds of a piece of work; waits for a GPU."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return sorted(found)[rounds // 2]
