"""Group normalization, with the scale and shift that a residual block applies to it.

torch's CPU kernels for channels-last images are slow when a group has few channels and, in the backward pass, when an
image has many pixels, because they walk through memory group by group. In those cases the sums are taken here channel
by channel, in whole vectors; otherwise, and under every transform, torch's own operations are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

HALF = (torch.float16, torch.bfloat16)
MAX_GROUPS = 32


def wide(x: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, any other unchanged."""
    return x.float() if x.dtype in HALF else x


def rows_of(x: Tensor) -> Tensor:
    """Return channels-last images (B, C, H, W) as (B, H W, C), without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class Groups(NamedTuple):
    """How the channels are grouped: `number` groups of `width` channels, each with `size` values per image."""

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
    """Return (x - mean, mean, 1 / sqrt(variance + eps)) of x (B, C, H, W), channels last; the latter two (B, G)."""
    rows, centered = rows_of(x), torch.empty_like(x)
    mean = groups.sums(rows.sum(1)) / groups.size
    off = torch.sub(rows, groups.spread(mean)[:, None], out=rows_of(centered))
    variance = groups.sums((off * off).sum(1)) / groups.size
    return centered, mean, (variance + eps).rsqrt()


def conditioned(y: Tensor, condition: Tensor | None) -> Tensor:
    """Return y times 1 + scale plus shift; `condition` (B, 2C, 1, 1) holds the scales, then the shifts."""
    if condition is None:
        return y
    scale, shift = condition.chunk(2, dim=1)
    return torch.addcmul(shift, y, scale + 1)


def activated(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else reads, in place when no gradients are recorded."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class _Normalize(torch.autograd.Function):
    """Normalize x (B, C, H, W), channels last, and apply a condition (B, 2C, 1, 1).

    `own`: sums by channels, in float32 for half precision; otherwise torch's kernel. The backward pass goes by channels
    in either case and needs only the inputs and the moments.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, condition: Tensor | None, number: int, eps: float, own: bool
    ) -> Tensor:
        batch, channels, height, width = x.shape
        groups = Groups(number, channels // number, height * width * (channels // number))
        if own:
            y, mean, inverse = moments(wide(x), groups, eps)
            by, to = groups.spread(inverse) * weight, bias.expand(batch, channels)
            if condition is not None:
                scale, shift = wide(condition).view(batch, 2, channels).unbind(1)
                by, to = by * (scale + 1), torch.addcmul(shift, bias, scale + 1)
            torch.addcmul(to[:, None], rows_of(y), by[:, None], out=rows_of(y))
            y = y.to(x.dtype if condition is None else torch.promote_types(x.dtype, condition.dtype))
        else:
            pixels = height * width
            y, mean, inverse = torch.native_group_norm(x, weight, bias, batch, channels, pixels, number, eps)
            if condition is not None:
                scale, shift = condition.chunk(2, dim=1)
                place = y if condition.dtype == y.dtype else None
                y = torch.addcmul(shift, y, scale + 1, out=place)
        ctx.save_for_backward(x, weight, bias, condition, wide(mean), wide(inverse))
        ctx.groups, ctx.number, ctx.eps = groups, number, eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or not _has_layout(gradient):
            return (
                *gradients_by_torch(ctx, gradient),
                None,
                None,
                None,
            )  # a derivative of this derivative, or many at once
        return (*_by_channels(ctx, gradient), None, None, None)


def _has_layout(x: Tensor) -> bool:
    """Whether x can report its memory layout; many tensors at once (torch.vmap, is_grads_batched) cannot."""
    try:
        x.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        return False
    return True


def gradients_by_torch(ctx: Any, gradient: Tensor, silu: bool = False) -> list[Tensor | None]:
    """Gradients for x, weight, bias and condition by torch's own operations, which can be differentiated again.

    `ctx` has these four saved, and as attributes `number` of groups and `eps`; `silu` if the activation belongs to it.
    """
    given = ctx.saved_tensors[:4]
    wanted = [tensor for tensor, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x, weight, bias, condition = given
        # Channels first, because torch before 2.13 lacks some derivatives of the other layout.
        y = F.group_norm(x.contiguous(), ctx.number, weight.to(x.dtype), bias.to(x.dtype), ctx.eps)
        y = conditioned(y, condition)
        y = F.silu(y) if silu else y
        found = iter(torch.autograd.grad(y, wanted, gradient.to(y.dtype), create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]


def _by_channels(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The same four gradients by sums over channels."""
    x, weight, bias, condition, mean, inverse = ctx.saved_tensors
    groups: Groups = ctx.groups
    gain = None if condition is None else wide(condition[:, : x.shape[1]]).flatten(1) + 1
    rows, moved = wide(rows_of(x)), wide(rows_of(gradient.contiguous(memory_format=torch.channels_last)))
    product = rows * moved
    by_shift = moved.sum(1)
    by_gain = (product.sum(1) - groups.spread(mean) * by_shift) * groups.spread(inverse)
    slope = weight if gain is None else weight * gain
    # The gradient with respect to x is linear in x and the incoming gradient, with coefficients per group and channel.
    first, second = groups.sums(slope * by_shift) / groups.size, groups.sums(slope * by_gain) / groups.size
    by_x = -inverse.square() * second
    constant = groups.spread(-inverse * first - by_x * mean)
    by_gradient = groups.spread(inverse) * slope
    change = torch.addcmul(constant[:, None], moved, by_gradient[:, None], out=product)
    change = change.addcmul_(rows, groups.spread(by_x)[:, None]).view_as(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if gain is None or condition is None:
        return change, by_gain.sum(0), by_shift.sum(0), None
    by_condition = torch.cat([torch.addcmul(bias * by_shift, weight, by_gain), by_shift], 1).view_as(condition)
    return change, (gain * by_gain).sum(0), (gain * by_shift).sum(0), by_condition


def _is_dual(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a forward-mode derivative."""
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class GroupNorm(nn.GroupNorm):
    """Group normalization over min(32, channels / group_channels) groups, with statistics in float32 for half
    precision.

    Widths that 32 does not divide use the greatest common divisor, so that every width works.
    """

    # From this many pixels on, torch's CPU kernel adds up whole rows (in float32 for half precision as well) and is as
    # fast as memory; below, it takes another path that is up to eight times slower than ours. It subtracts squares:
    # where the mean is 30 times the standard deviation, three in ten thousand are off.
    KERNEL_PIXELS = 1024
    # Groups of this many channels fill its vectors. Ours is then faster only for images of at least this many values,
    # with a condition or in half precision with many pixels, for whose gradients torch's kernel takes up to nine times
    # as long. The batch size must not decide: an image is normalized alike in every batch.
    WIDE_GROUP = 8
    LARGE_IMAGE = 16_384

    # What normalizes, conditions and activates in one go on a GPU where that pays (`fused.use`).
    fused: Callable[[GroupNorm, Tensor, Tensor | None, bool], Tensor | None] | None = None

    def __init__(self, channels: int, group_channels: int = 1, eps: float = 1e-5) -> None:
        wanted = min(MAX_GROUPS, max(1, channels // group_channels))
        super().__init__(wanted if channels % wanted == 0 else math.gcd(channels, wanted), channels, eps)

    def forward(self, x: Tensor, condition: Tensor | None = None, silu: bool = False) -> Tensor:
        """Normalize x (B, C, ...) in its own dtype.

        `condition` (B, 2C, 1, 1) holds scales, then shifts: the result is multiplied by 1 + scale and shifted.
        `silu`: activate the result.
        """
        if self.fused is not None and self._is_plain(x, condition):
            y = self.fused(self, x, condition, silu)
            if y is not None:
                return y
        if self._ours_pays(x, condition):
            how = self.num_groups, self.eps, not self._kernel_pays(x)
            y = _Normalize.apply(x, self.weight, self.bias, condition, *how)
        else:
            y = conditioned(self._normalized(x), condition)
        return activated(y) if silu else y

    def _is_plain(self, x: Tensor, condition: Tensor | None) -> bool:
        """Whether x is a channels-last image outside every transform: what kernels of our own can take."""
        if x.ndim != 4 or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch._C._are_functorch_transforms_active() or _is_dual(x, self.weight, self.bias, condition):
            return False
        return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)

    def _ours_pays(self, x: Tensor, condition: Tensor | None) -> bool:
        if x.device.type != "cpu" or not self._is_plain(x, condition):
            return False
        if self.weight.dtype != (torch.float32 if x.dtype in HALF else x.dtype):
            return False
        if x.shape[1] // self.num_groups < self.WIDE_GROUP:
            return True
        large = math.prod(x.shape[1:]) >= self.LARGE_IMAGE
        return large and (condition is not None or (x.dtype in HALF and self._kernel_pays(x)))

    def _kernel_pays(self, x: Tensor) -> bool:
        return math.prod(x.shape[2:]) >= self.KERNEL_PIXELS

    def _normalized(self, x: Tensor) -> Tensor:
        if x.dtype not in HALF or (x.device.type == "cpu" and self._kernel_pays(x)):
            return self._by_torch(x, self.weight, self.bias)
        if x.device.type == "cuda":
            # Its half-precision kernel adds up in float32 anyway, so autocast would widen the images for nothing.
            with torch.autocast("cuda", enabled=False):
                return self._by_torch(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return self._by_torch(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)

    def _by_torch(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        try:
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        except RuntimeError:
            # Forward-mode derivatives in torch before 2.13 need channels first.
            if x.is_contiguous():
                raise
            return F.group_norm(x.contiguous(), self.num_groups, weight, bias, self.eps)
