"""A convolution whose backward pass alone may run in a half.

Consistency training descends a small difference of two large outputs. Rounding the forward passes drowns it, while
the backward pass only carries it on: rounded to bfloat16 it loses less than a hundredth, and it is half of the work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _HalfBackward(torch.autograd.Function):
    """conv2d(x, weight) in the dtype of x; its gradients by convolutions in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any, groups: int, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(x.to(dtype), weight)
        ctx.geometry = (stride, padding, groups)
        return F.conv2d(x, weight, None, stride, padding, 1, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups = ctx.geometry
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        by_input, by_weight, _ = torch.ops.aten.convolution_backward(
            gradient.to(x.dtype), x, weight.to(x.dtype), None, stride, padding, (1, 1), False, (0, 0), groups, wanted
        )
        by_input = by_input.to(gradient.dtype) if wanted[0] else None
        return by_input, by_weight.to(weight.dtype) if wanted[1] else None, None, None, None, None


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` (padding by zeros, no dilation) that computes its gradients in `backward_dtype` if that is set.

    Forward-mode derivatives are taken where no gradients are recorded, and there it is the plain convolution.
    """

    backward_dtype: torch.dtype | None = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.backward_dtype is None or not torch.is_grad_enabled():
            return super()._conv_forward(input, weight, bias)
        y = _HalfBackward.apply(input, weight, self.stride, self.padding, self.groups, self.backward_dtype)
        return y if bias is None else y + bias[:, None, None]


def set_backward_dtype(network: nn.Module, dtype: torch.dtype | None) -> int:
    """Let all convolutions of a network but those at its ends (from and to images) compute gradients in `dtype`.

    Returns how many convolutions there are to which it applies.
    """
    count = 0
    images = getattr(network, "channels", None)
    for module in network.modules():
        if isinstance(module, Conv2d) and images not in (module.in_channels, module.out_channels):
            module.backward_dtype = dtype
            count += 1
    return count
