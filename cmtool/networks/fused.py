"""Group normalization, a condition's scale and shift, and SiLU in one pass over the images, as Triton kernels.

On a GPU these three are limited by memory: torch reads and writes the images five times where one read and one write
would do. Images are channels last, so that the convolutions on both sides copy nothing. Statistics are float32, with
squares of centered values (a mean of 30 deviations costs no digits), whatever the images are.

Importing this module needs Triton, which torch brings along on Linux with CUDA. `TRITON_INTERPRET=1` runs the same
kernels on a CPU, which is how they are tested where there is no card.
"""

# ruff: noqa: ANN001, ANN202 -- what kernels take has no types in Python
from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from cmtool.networks.normalization import HALF, GroupNorm, activated, conditioned, gradients_by_torch

# Values that a program holds at a time; more would spill from the registers.
TILE = 4096


@triton.jit
def _moments(x, base, channels, pixels, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of one group of one image, whose first value is at x + base."""
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, pixels, ROWS):
        rows = start + tl.arange(0, ROWS)
        there = (rows < pixels)[:, None] & (columns < width)[None, :]
        total += tl.load(x + base + rows[:, None] * channels + columns[None, :], there, other=0.0).to(tl.float32)
    mean = tl.sum(total) / (pixels * width)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, pixels, ROWS):
        rows = start + tl.arange(0, ROWS)
        there = (rows < pixels)[:, None] & (columns < width)[None, :]
        value = tl.load(x + base + rows[:, None] * channels + columns[None, :], there, other=0.0).to(tl.float32)
        squares += tl.where(there, (value - mean) * (value - mean), 0.0)
    return mean, 1 / tl.sqrt(tl.sum(squares) / (pixels * width) + eps)


@triton.jit
def _slope_and_shift(weight, bias, condition, image, channel, channels, there, CONDITIONED: tl.constexpr):
    """What a normalized channel is multiplied by, and what is added to it then."""
    gain = tl.load(weight + channel, there, other=0.0).to(tl.float32)
    added = tl.load(bias + channel, there, other=0.0).to(tl.float32)
    if CONDITIONED:
        scale = 1 + tl.load(condition + image * 2 * channels + channel, there, other=0.0).to(tl.float32)
        shift = tl.load(condition + image * 2 * channels + channels + channel, there, other=0.0).to(tl.float32)
        gain, added = gain * scale, added * scale + shift
    return gain, added


@triton.jit
def _forward(
    x, y, weight, bias, condition, means, inverses, pixels, channels, groups, eps,
    CONDITIONED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program normalizes one group of one image."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    width = channels // groups
    columns = tl.arange(0, COLUMNS)
    channel = group * width + columns
    base = image.to(tl.int64) * pixels * channels + group * width
    mean, inverse = _moments(x, base, channels, pixels, width, eps, ROWS, COLUMNS)
    tl.store(means + tl.program_id(0), mean)
    tl.store(inverses + tl.program_id(0), inverse)
    slope, shift = _slope_and_shift(weight, bias, condition, image, channel, channels, columns < width, CONDITIONED)
    for start in range(0, pixels, ROWS):
        rows = start + tl.arange(0, ROWS)
        there = (rows < pixels)[:, None] & (columns < width)[None, :]
        place = base + rows[:, None] * channels + columns[None, :]
        value = tl.load(x + place, there, other=0.0).to(tl.float32)
        value = (value - mean) * inverse * slope[None, :] + shift[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(y + place, value.to(y.dtype.element_ty), there)


@triton.jit
def _incoming(gradient, place, there, normalized, slope, shift, SILU: tl.constexpr):
    """The gradient in front of the activation."""
    moved = tl.load(gradient + place, there, other=0.0).to(tl.float32)
    if SILU:
        value = normalized * slope[None, :] + shift[None, :]
        share = tl.sigmoid(value)
        moved = moved * share * (1 + value * (1 - share))
    return moved


@triton.jit
def _backward(
    x, gradient, change, weight, bias, condition, means, inverses, by_gains, by_shifts, pixels, channels, groups,
    CONDITIONED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program takes one group of one image back: sums by channel first, then the gradient of x."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    width = channels // groups
    columns = tl.arange(0, COLUMNS)
    channel = group * width + columns
    base = image.to(tl.int64) * pixels * channels + group * width
    mean, inverse = tl.load(means + tl.program_id(0)), tl.load(inverses + tl.program_id(0))
    slope, shift = _slope_and_shift(weight, bias, condition, image, channel, channels, columns < width, CONDITIONED)
    gains = tl.zeros([ROWS, COLUMNS], tl.float32)
    shifts = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, pixels, ROWS):
        rows = start + tl.arange(0, ROWS)
        there = (rows < pixels)[:, None] & (columns < width)[None, :]
        place = base + rows[:, None] * channels + columns[None, :]
        normalized = (tl.load(x + place, there, other=0.0).to(tl.float32) - mean) * inverse
        moved = _incoming(gradient, place, there, normalized, slope, shift, SILU)
        gains += moved * normalized
        shifts += moved
    by_gain, by_shift = tl.sum(gains, 0), tl.sum(shifts, 0)
    tl.store(by_gains + image * channels + channel, by_gain, columns < width)
    tl.store(by_shifts + image * channels + channel, by_shift, columns < width)
    first = tl.sum(slope * by_shift) / (pixels * width)
    second = tl.sum(slope * by_gain) / (pixels * width)
    for start in range(0, pixels, ROWS):
        rows = start + tl.arange(0, ROWS)
        there = (rows < pixels)[:, None] & (columns < width)[None, :]
        place = base + rows[:, None] * channels + columns[None, :]
        normalized = (tl.load(x + place, there, other=0.0).to(tl.float32) - mean) * inverse
        moved = _incoming(gradient, place, there, normalized, slope, shift, SILU)
        value = inverse * (moved * slope[None, :] - first - normalized * second)
        tl.store(change + place, value.to(change.dtype.element_ty), there)


def _tiles(pixels: int, width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {"ROWS": min(triton.next_power_of_2(pixels), max(TILE // columns, 1)), "COLUMNS": columns}


class FusedNorm(torch.autograd.Function):
    """silu(condition(normalize(x))) of x (B, C, H, W), channels last, in float32 or half precision.

    Its backward pass is a kernel too. A derivative of that, and forward-mode derivatives, take torch's operations.
    """

    @staticmethod
    def forward(  # noqa: D102 -- the class says it
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, condition: Tensor | None, number: int, eps: float, silu: bool
    ) -> Tensor:
        batch, channels, height, width = x.shape
        flat = None if condition is None else condition.reshape(batch, 2 * channels).contiguous()
        dtype = x.dtype if condition is None else torch.promote_types(x.dtype, condition.dtype)
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
        mean, inverse = x.new_empty(2, batch * number, dtype=torch.float32).unbind()
        shape = (height * width, channels, number)
        how = {"CONDITIONED": flat is not None, "SILU": silu, **_tiles(height * width, channels // number)}
        if x.numel():
            _forward[(batch * number,)](x, y, weight, bias, flat, mean, inverse, *shape, eps, **how)
        ctx.save_for_backward(x, weight, bias, condition, mean, inverse)
        ctx.shape, ctx.how, ctx.number, ctx.eps = shape, how, number, eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight, bias, condition, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*gradients_by_torch(ctx, gradient, ctx.how["SILU"]), None, None, None)
        batch, channels = x.shape[:2]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        change = torch.empty_like(x)
        by_gain, by_shift = x.new_zeros(2, batch, channels, dtype=torch.float32).unbind()
        flat = None if condition is None else condition.reshape(batch, 2 * channels).contiguous()
        if x.numel():
            sums = (mean, inverse, by_gain, by_shift)
            grid = (batch * ctx.shape[2],)
            _backward[grid](x, gradient, change, weight, bias, flat, *sums, *ctx.shape, **ctx.how)
        if flat is None or condition is None:
            return change, by_gain.sum(0).to(weight.dtype), by_shift.sum(0).to(bias.dtype), None, None, None, None
        gain = flat[:, :channels].float() + 1
        by_condition = torch.cat([torch.addcmul(bias * by_shift, weight, by_gain), by_shift], 1)
        by_weight, by_bias = ((gain * sums).sum(0).to(weight.dtype) for sums in (by_gain, by_shift))
        by_condition = by_condition.view_as(condition).to(condition.dtype)
        return change, by_weight, by_bias, by_condition, None, None, None


def fused(layer: GroupNorm, x: Tensor, condition: Tensor | None, silu: bool) -> Tensor | None:
    """Return the layer's answer by the kernels, None where torch is to give it.

    The first call of each kind (dtypes, shape without the batch, groups) is a race: the kernels are taken if they agree
    with torch, gradients included, and are faster.
    """
    if x.device.type != "cuda" or x.dtype not in (torch.float32, *HALF):
        return None
    kind = (x.dtype, x.shape[1:], layer.num_groups, None if condition is None else condition.dtype, silu)
    if kind not in _verdicts:
        if torch.cuda.is_current_stream_capturing():
            return None  # a recording has no time for a race
        _verdicts[kind] = wins(layer, x, condition, silu, _milliseconds)
    return _apply(layer, x, condition, silu) if _verdicts[kind] else None


def use(network: nn.Module) -> None:
    """Let every group normalization of a network take the kernels where they win."""
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.fused = fused


_verdicts: dict[tuple[Any, ...], bool] = {}
# Largest difference from torch's answers and gradients, in units of their root mean square times 10.
AGREES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _apply(layer: GroupNorm, x: Tensor, condition: Tensor | None, silu: bool) -> Tensor:
    answer: Tensor = FusedNorm.apply(x, layer.weight, layer.bias, condition, layer.num_groups, layer.eps, silu)
    return answer


def wins(
    layer: GroupNorm,
    x: Tensor,
    condition: Tensor | None,
    silu: bool,
    clock: Callable[[Callable[[], object]], float],
) -> bool:
    """Whether the kernels agree with torch on these inputs, forward and backward, and `clock` finds them faster."""
    given = [x.detach().requires_grad_(), *([] if condition is None else [condition.detach().requires_grad_()])]
    wanted = [*given, layer.weight, layer.bias]
    incoming = torch.linspace(-1, 1, x.numel(), device=x.device).to(x.dtype).view(x.permute(0, 2, 3, 1).shape)

    def run(work: Callable[..., Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            y = work(layer, given[0], given[1] if condition is not None else None, silu)
            return [y.detach(), *torch.autograd.grad(y, wanted, incoming.permute(0, 3, 1, 2).to(y.dtype))]

    def by_torch(layer: GroupNorm, x: Tensor, condition: Tensor | None, silu: bool) -> Tensor:
        y = conditioned(layer._normalized(x), condition)
        return activated(y) if silu else y

    try:
        ours, theirs = run(_apply), run(by_torch)
    except Exception:  # a compiler may raise anything, and none of it is a reason to stop
        return False
    for one, two in zip(ours, theirs, strict=True):
        size = two.float().square().mean().sqrt() + 1e-12
        if not bool((one.float() - two.float()).abs().max() <= 10 * AGREES[x.dtype] * size):
            return False
    return clock(lambda: run(_apply)) < clock(lambda: run(by_torch))


def _milliseconds(work: Callable[[], object], rounds: int = 10) -> float:
    """Median time that the GPU takes for a piece of work."""
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)
