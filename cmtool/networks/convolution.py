"""A convolution that runs in half precision where consistency training tolerates it: backward, and in pairs of passes.

Consistency training descends a small difference of two large outputs. Rounding both forward passes drowns it, because
each makes errors of its own. The backward pass only propagates the difference: rounded to bfloat16 it loses less than a
hundredth, and it is half of the work.

A pair of passes can share its errors instead. The first pass (`Tape.writing`) rounds the operands of its convolutions
and notes their inputs x and outputs y. The second (`Tape.reading`, at a neighboring point, with the same weights or an
average of them) returns y + W' (x' - x) + (W' - W) x for its own inputs x' and weights W'. It rounds only changes, each
relative to its own size, so the difference of the two passes is as exact as half precision allows, however small it is.
Everything but the convolutions is computed in the dtype of the weights.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: Any
    padding: Any
    transposed: bool
    groups: int


@dataclass
class Note:
    """What a convolution of the first pass leaves for the second: its input, output and weights, without gradients.

    `rounded`: the input in half precision.
    """

    x: Tensor
    rounded: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass
class Tape:
    """The convolutions of one pass, in the order of their calls."""

    notes: deque[Note] = field(default_factory=deque)
    reads: bool = False

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Note every convolution that records gradients in half precision."""
        self.reads = False
        with computed_by(self):
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Let the same convolutions, in the same order, compute only the difference from what was noted."""
        self.reads = True
        with computed_by(self):
            yield

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype
    ) -> Tensor:
        """Return the answer of a convolution of this pass, in the dtype of x, with products in `dtype`."""
        if self.reads:
            return after(self.notes.popleft(), x, weight, bias, geometry)
        rounded = x.detach().to(dtype)
        y = half_backward(x, rounded, weight, bias, geometry, whole=True)
        own = (weight.detach(), None if bias is None else bias.detach())
        self.notes.append(Note(x.detach(), rounded, y.detach(), *own))
        return y


class Pass(Protocol):
    """One pass of a pair; `reads`: the second one, which records no gradients."""

    reads: bool

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype
    ) -> Tensor:
        """Return the answer of a convolution of this pass, in the dtype of x, with products in `dtype`."""


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextlib.contextmanager
def computed_by(way: Pass) -> Iterator[None]:
    """Let `way` compute the convolutions that have a `backward_dtype`."""
    token = _PASS.set(way)
    try:
        yield
    finally:
        _PASS.reset(token)


def convolve(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """Convolve without dilation; all tensors and the result share one dtype."""
    stride, padding, transposed, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, (1, 1), transposed, (0, 0), groups)


class _HalfBackward(torch.autograd.Function):
    """A convolution with bias in the dtype of x; its gradients by convolutions in the dtype of `rounded`, which is x.

    `whole`: the convolution itself is in that dtype as well. `y`: its answer, where that is known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rounded: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        whole: bool,
        y: Tensor | None,
    ) -> Tensor:
        if whole:
            weight, bias = weight.to(rounded.dtype), None if bias is None else bias.to(rounded.dtype)
        if y is None:
            y = convolve(rounded if whole else x, weight, geometry, bias).to(x.dtype)
        ctx.save_for_backward(rounded, weight)
        ctx.geometry = geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, transposed, groups = ctx.geometry
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], False]
        moved = (gradient.to(x.dtype), x, weight.to(x.dtype))
        by_input, by_weight, _ = torch.ops.aten.convolution_backward(
            *moved, None, stride, padding, (1, 1), transposed, (0, 0), groups, wanted
        )
        by_input = by_input.to(gradient.dtype) if wanted[0] else None
        by_weight = by_weight.to(gradient.dtype) if wanted[1] else None
        by_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        return by_input, None, by_weight, by_bias, None, None, None


def half_backward(
    x: Tensor,
    rounded: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    whole: bool,
    y: Tensor | None = None,
) -> Tensor:
    """Return a convolution of x whose gradients are taken in the dtype of `rounded`, as `_HalfBackward` says."""
    answer: Tensor = _HalfBackward.apply(x, rounded, weight, bias, geometry, whole, y)
    return answer


def after(note: Note, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve x (no gradients) as the difference from a noted convolution, rounding the differences as it did."""
    dtype = note.rounded.dtype
    change = convolve((x - note.x).to(dtype), weight.to(dtype), geometry)
    if not same(weight, note.weight):
        change += convolve(note.rounded, (weight - note.weight).to(dtype), geometry)
    y = change.to(x.dtype).add_(note.y)
    if bias is None or note.bias is None or same(bias, note.bias):
        return y
    return y.add_((bias - note.bias)[:, None, None])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are known to hold the same numbers; only on a CPU is different memory compared."""
    return a.data_ptr() == b.data_ptr() or (a.device.type == "cpu" and torch.equal(a, b))


class _HalfGradients:
    """A layer that computes its gradients in `backward_dtype` if that is set.

    On a tape the forward pass uses that dtype too. Forward-mode derivatives are taken where no gradients are recorded,
    and there it is a plain layer.
    """

    backward_dtype: torch.dtype | None = None

    def _in_half(self) -> bool:
        if self.backward_dtype is None:
            return False
        way = _PASS.get()
        return torch.is_grad_enabled() or (way is not None and way.reads)

    def _half_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        assert self.backward_dtype is not None
        way = _PASS.get()
        if way is not None:
            return way.convolve(x, weight, bias, geometry, self.backward_dtype)
        return half_backward(x, x.detach().to(self.backward_dtype), weight, bias, geometry, whole=False)


class Linear(_HalfGradients, nn.Linear):
    """`nn.Linear` of tokens (B, N, C), in half precision a convolution of one pixel."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C')."""
        if not self._in_half():
            return super().forward(input)
        rows, weight = input.transpose(1, 2).unsqueeze(2), self.weight[:, :, None, None]
        mapped = self._half_forward(rows, weight, self.bias, Geometry((1, 1), (0, 0), False, 1))
        return mapped.squeeze(2).transpose(1, 2)


class Conv2d(_HalfGradients, nn.Conv2d):
    """`nn.Conv2d` (padding by zeros, no dilation) with gradients, and on a tape all of it, in `backward_dtype`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._in_half():
            return super()._conv_forward(input, weight, bias)
        return self._half_forward(input, weight, bias, Geometry(self.stride, self.padding, False, self.groups))

    def after_doubling(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, H, W) enlarged twice by repeating its pixels; returns (B, C', 2H, 2W).

        A kernel of one pixel is applied before enlarging. A 3x3 kernel on a CPU becomes one transposed convolution of x
        itself: the weights that multiply copies of one pixel are added up first, which leaves four products of nine.
        The result is the same up to rounding, in half of the time.
        """
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            return F.interpolate(nn.Conv2d.forward(self, x), scale_factor=2.0, mode="nearest")
        if x.device.type != "cpu" or self.kernel_size != (3, 3) or self.stride != (1, 1) or self.groups != 1:
            return nn.Conv2d.forward(self, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        if not self._in_half():
            return convolve_doubled(x, self.weight, self.bias)
        return self._half_forward(x, doubling_kernel(self.weight), self.bias, Geometry((2, 2), (1, 1), True, 1))


def convolve_doubled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x (B, C, H, W) enlarged twice by a 3x3 kernel that keeps the side: see `Conv2d.after_doubling`."""
    if x.device.type != "cpu":
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    return F.conv_transpose2d(x, doubling_kernel(weight), bias, (2, 2), (1, 1))


def doubling_kernel(weight: Tensor) -> Tensor:
    """Return the kernel (C, C', 4, 4) of a transposed convolution of stride 2: `weight` (C', C, 3, 3) after doubling.

    Every pixel of the small image stands for four, and the weights are added up to match.
    """
    exact = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    kernel = exact.flip(-1, -2).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    for dim in (2, 3):
        first, second, third = kernel.split(1, dim)
        kernel = torch.cat([first, first + second, second + third, third], dim)
    return kernel.to(weight.dtype)


def inner_convolutions(network: nn.Module) -> Iterator[Conv2d | Linear]:
    """Yield all convolutions of a network except the first and the last, which read and write images."""
    images = getattr(network, "channels", None)
    for module in network.modules():
        if isinstance(module, Linear) or (
            isinstance(module, Conv2d) and images not in (module.in_channels, module.out_channels)
        ):
            yield module


def hold_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of the inner convolutions in half precision, for an untrained network that runs under autocast.

    Autocast would round them again in every call, with the same result.
    """
    for module in inner_convolutions(network):
        module.to(dtype)


def set_backward_dtype(network: nn.Module, dtype: torch.dtype | None) -> int:
    """Let all convolutions of a network except the first and the last compute gradients in `dtype`.

    Returns the number of convolutions it applies to.
    """
    found = list(inner_convolutions(network))
    for module in found:
        module.backward_dtype = dtype
    return len(found)
