"""A convolution whose backward pass alone may run in a half.

Consistency training descends a small difference of two large outputs. Rounding the forward passes drowns it, while
the backward pass only carries it on: rounded to bfloat16 it loses less than a hundredth, and it is half of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _HalfBackward(torch.autograd.Function):
    """A convolution of x with weight in the dtype of x; its gradients by convolutions in `dtype`.

    `geometry`: stride, padding, whether it is transposed, groups.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: tuple[Any, Any, bool, int], dtype: torch.dtype) -> Any:
        ctx.save_for_backward(x.to(dtype), weight)
        ctx.geometry = geometry
        stride, padding, transposed, groups = geometry
        return torch.convolution(x, weight, None, stride, padding, (1, 1), transposed, (0, 0), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, transposed, groups = ctx.geometry
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        moved = (gradient.to(x.dtype), x, weight.to(x.dtype))
        by_input, by_weight, _ = torch.ops.aten.convolution_backward(
            *moved, None, stride, padding, (1, 1), transposed, (0, 0), groups, wanted
        )
        by_input = by_input.to(gradient.dtype) if wanted[0] else None
        return by_input, by_weight.to(weight.dtype) if wanted[1] else None, None, None


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` (padding by zeros, no dilation) that computes its gradients in `backward_dtype` if that is set.

    Forward-mode derivatives are taken where no gradients are recorded, and there it is the plain convolution.
    """

    backward_dtype: torch.dtype | None = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.backward_dtype is None or not torch.is_grad_enabled():
            return super()._conv_forward(input, weight, bias)
        geometry = (self.stride, self.padding, False, self.groups)
        y = _HalfBackward.apply(input, weight, geometry, self.backward_dtype)
        return y if bias is None else y + bias[:, None, None]

    def after_doubling(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, H, W) enlarged twice by repeating its pixels; returns (B, C', 2H, 2W).

        For a 3x3 kernel on a CPU as one transposed convolution of x itself: weights that meet copies of one pixel are
        added up first, and four products are left of nine. The same up to rounding, in half of the time.
        """
        if x.device.type != "cpu" or self.kernel_size != (3, 3) or self.stride != (1, 1) or self.groups != 1:
            return self(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernel = doubling_kernel(self.weight)
        geometry = ((2, 2), (1, 1), True, 1)
        if self.backward_dtype is None or not torch.is_grad_enabled():
            return F.conv_transpose2d(x, kernel, self.bias, *geometry[:2])
        y = _HalfBackward.apply(x, kernel, geometry, self.backward_dtype)
        return y if self.bias is None else y + self.bias[:, None, None]


def doubling_kernel(weight: Tensor) -> Tensor:
    """Return the kernel (C, C', 4, 4) of a transposed convolution of stride 2: `weight` (C', C, 3, 3) after doubling.

    Every pixel of the small image stands for four, and so does every weight.
    """
    exact = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    turned = exact.flip(-1, -2).transpose(0, 1)
    spread = [F.pad(turned, (left, 1 - left, top, 1 - top)) for top in (0, 1) for left in (0, 1)]
    return sum(spread[1:], spread[0]).to(weight.dtype, memory_format=torch.channels_last)


def inner_convolutions(network: nn.Module) -> Iterator[Conv2d]:
    """Yield all convolutions of a network but those at its ends, which are from and to images."""
    images = getattr(network, "channels", None)
    for module in network.modules():
        if isinstance(module, Conv2d) and images not in (module.in_channels, module.out_channels):
            yield module


def hold_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of the inner convolutions in a half, for a network that autocast runs in it and nobody trains.

    Autocast would round them again in every call, to the same bits.
    """
    for module in inner_convolutions(network):
        module.to(dtype)


def set_backward_dtype(network: nn.Module, dtype: torch.dtype | None) -> int:
    """Let all convolutions of a network but those at its ends (from and to images) compute gradients in `dtype`.

    Returns how many convolutions there are to which it applies.
    """
    found = list(inner_convolutions(network))
    for module in found:
        module.backward_dtype = dtype
    return len(found)
