"""Group normalization, with the scale and shift that a residual block puts on it.

torch's CPU kernels for images that lie channels last are slow where a group has few channels or the image many pixels:
they walk through memory group by group. On a CPU the same sums are taken here channel by channel, in whole vectors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HALF = (torch.float16, torch.bfloat16)
MAX_GROUPS = 32


def wide(x: Tensor) -> Tensor:
    """Return a half in float32, all else as it is."""
    return x.float() if x.dtype in HALF else x


def rows_of(x: Tensor) -> Tensor:
    """Return images (B, C, H, W) that lie channels last as (B, H W, C), without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class Groups(NamedTuple):
    """How the channels are grouped: `number` groups of `width` channels, each of `size` numbers in an image."""

    number: int
    width: int
    size: int

    def sums(self, channels: Tensor) -> Tensor:
        """Add up (B, C) over the channels of each group: (B, G)."""
        return channels.view(len(channels), self.number, self.width).sum(-1)

    def spread(self, groups: Tensor) -> Tensor:
        """Give every channel the value of its group: (B, G) -> (B, C)."""
        return groups.repeat_interleave(self.width, 1)


def moments(x: Tensor, groups: Groups, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (centered x, mean, 1 / sqrt(variance + eps)) of x (B, P, C); the latter two (B, G)."""
    mean = groups.sums(x.sum(1)) / groups.size
    centered = x - groups.spread(mean)[:, None]
    variance = groups.sums((centered * centered).sum(1)) / groups.size
    return centered, mean, (variance + eps).rsqrt()


class _Normalize(torch.autograd.Function):
    """Normalize x (B, C, H, W), channels last, and put a `condition` (B, 2C, 1, 1) on it.

    Only x and the moments are kept for the backward pass. Halves are computed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, condition: Tensor | None, number: int, eps: float, own: bool
    ) -> Tensor:
        batch, channels, height, width = x.shape
        groups = Groups(number, channels // number, height * width * (channels // number))
        gain, shift = None, None
        if condition is not None:
            scale, shift = (wide(condition) if own else condition).view(batch, 2, channels).unbind(1)
            gain = scale + 1
        if own:
            y, mean, inverse = moments(wide(rows_of(x)), groups, eps)
            by, to = groups.spread(inverse) * weight, bias.expand(batch, channels)
            if gain is not None and shift is not None:
                by, to = by * gain, torch.addcmul(shift, bias, gain)
            y = torch.addcmul(to[:, None], y, by[:, None], out=y)
            y = y.view(batch, height, width, channels).permute(0, 3, 1, 2)
        else:
            pixels = height * width
            y, mean, inverse = torch.native_group_norm(x, weight, bias, batch, channels, pixels, number, eps)
            if gain is not None and shift is not None:
                place = y if gain.dtype == y.dtype else None
                y = torch.addcmul(shift[:, :, None, None], y, gain[:, :, None, None], out=place)
        ctx.save_for_backward(x, weight, bias, None if gain is None else wide(gain), wide(mean), wide(inverse))
        ctx.groups = groups
        return y.to(x.dtype if condition is None else torch.promote_types(x.dtype, condition.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gain, mean, inverse = ctx.saved_tensors
        groups: Groups = ctx.groups
        rows, moved = wide(rows_of(x)), wide(rows_of(gradient.contiguous(memory_format=torch.channels_last)))
        product = rows * moved
        by_shift = moved.sum(1)
        by_gain = (product.sum(1) - groups.spread(mean) * by_shift) * groups.spread(inverse)
        slope = weight if gain is None else weight * gain
        # The gradient by x is a straight line in x and the incoming gradient: coefficients for each group and channel.
        first, second = groups.sums(slope * by_shift) / groups.size, groups.sums(slope * by_gain) / groups.size
        by_x = -inverse.square() * second
        constant = groups.spread(-inverse * first - by_x * mean)
        by_gradient = groups.spread(inverse) * slope
        change = torch.addcmul(constant[:, None], moved, by_gradient[:, None], out=product)
        change = change.addcmul_(rows, groups.spread(by_x)[:, None]).view_as(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if gain is None:
            return change, by_gain.sum(0), by_shift.sum(0), None, None, None, None
        by_condition = torch.cat([torch.addcmul(bias * by_shift, weight, by_gain), by_shift], 1)[:, :, None, None]
        return change, (gain * by_gain).sum(0), (gain * by_shift).sum(0), by_condition, None, None, None


class GroupNorm(nn.GroupNorm):
    """Group normalization over min(32, channels / group_channels) groups, with statistics in float32 for halves.

    Widths that 32 does not divide take the largest common divisor, so that every width works.
    """

    # From this many pixels on torch's CPU kernel adds up over whole rows (for halves in float32 as well) and is as fast
    # as memory; below it takes another path that is up to eight times slower than ours.
    KERNEL_PIXELS = 1024
    # Groups of so many channels fill its vectors; then ours gains on large batches alone: with a condition, and with
    # large images in a half, whose gradients its kernel takes up to nine times as long for.
    WIDE_GROUP = 8
    LARGE_BATCH = 400_000

    def __init__(self, channels: int, group_channels: int = 1, eps: float = 1e-5) -> None:
        wanted = min(MAX_GROUPS, max(1, channels // group_channels))
        super().__init__(wanted if channels % wanted == 0 else math.gcd(channels, wanted), channels, eps)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalize x (B, C, ...) in its own dtype.

        `condition` (B, 2C, 1, 1), scales and then shifts: the answer is times 1 + scale plus shift.
        """
        if self._ours_pays(x, condition is not None):
            try:
                how = self.num_groups, self.eps, not self._kernel_pays(x)
                return _Normalize.apply(x, self.weight, self.bias, condition, *how)
            except (RuntimeError, NotImplementedError):
                pass  # A forward-mode derivative or a transform of torch.func, which torch's own operations have.
        y = self._normalized(x)
        if condition is None:
            return y
        scale, shift = condition.chunk(2, dim=1)
        return torch.addcmul(shift, y, scale + 1)

    def _ours_pays(self, x: Tensor, conditioned: bool) -> bool:
        if x.device.type != "cpu" or x.ndim != 4 or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if x.shape[1] // self.num_groups < self.WIDE_GROUP:
            return True
        return x.numel() >= self.LARGE_BATCH and (conditioned or (x.dtype in HALF and self._kernel_pays(x)))

    def _kernel_pays(self, x: Tensor) -> bool:
        return x[0, 0].numel() >= self.KERNEL_PIXELS

    def _normalized(self, x: Tensor) -> Tensor:
        if x.dtype not in HALF or (x.device.type == "cpu" and self._kernel_pays(x)):
            return self._by_torch(x, self.weight, self.bias)
        if x.device.type == "cuda":
            # Its kernel for halves adds up in float32; autocast would widen the images all the same.
            with torch.autocast("cuda", enabled=False):
                return self._by_torch(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return self._by_torch(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)

    def _by_torch(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        try:
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        except RuntimeError:
            # The forward-mode derivative of torch before 2.13 takes channels first only.
            if x.is_contiguous():
                raise
            return F.group_norm(x.contiguous(), self.num_groups, weight, bias, self.eps)
