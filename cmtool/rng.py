"""Randomness as a value: every draw is a function of a seed and of what it is for.

Nothing in the project reads torch's global generators. A training step asks for the noise of its images by
index, each sample owns a generator, and two passes that must share a dropout mask run under one seed.
All draws are made on the CPU and moved, so that every device and every number of processes sees the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Rows of a batch share a generator in blocks of this size: a process that owns a slice draws only the blocks it
# touches, and a generator is set up once for many small images.
BLOCK = 16


def derive(seed: int, *keys: int | str) -> int:
    """Return a 63-bit seed that depends on `seed` and on every key, in order; stable over versions and machines."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator seeded with `derive(seed, *keys)`."""
    made = torch.Generator(device=device)
    made.manual_seed(derive(seed, *keys))
    return made


def moved(rows: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor from the CPU to `device`; to a GPU through pinned memory, so that the process does not wait.

    An ordinary copy blocks the process until the GPU has finished all earlier work, which delays the next work.
    """
    rows = rows if dtype is None else rows.to(dtype)
    if torch.device(device).type == "cuda":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def _by_blocks(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    seed: int,
    keys: tuple[int | str, ...],
    start: int,
    count: int | None,
) -> Tensor:
    total, row = shape[0], tuple(shape[1:])
    stop = total if count is None else start + count
    if not 0 <= start <= stop <= total:
        raise ValueError(f"rows {start}..{stop} are outside a batch of {total}")
    first, last = start // BLOCK, -(-stop // BLOCK)
    blocks = [draw((BLOCK, *row), generator=generator(seed, *keys, block)) for block in range(first, last)]
    if not blocks:
        return torch.empty((0, *row))
    return torch.cat(blocks)[start - first * BLOCK : stop - first * BLOCK]


def batch_normal(
    shape: Sequence[int],
    seed: int,
    *keys: int | str,
    start: int = 0,
    count: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers for rows `start` .. `start + count` of a global batch of `shape` (B, ...).

    Row i depends only on (seed, keys, i): slices drawn by several processes or micro-batches fit together.
    """
    return moved(_by_blocks(torch.randn, shape, seed, keys, start, count), device, dtype)


def batch_uniform(
    shape: Sequence[int],
    seed: int,
    *keys: int | str,
    start: int = 0,
    count: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Uniform numbers in [0, 1), float64 by default, sliced like `batch_normal`."""

    def draw(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    return moved(_by_blocks(draw, shape, seed, keys, start, count), device, dtype)


class SampleStreams:
    """One stream of normal numbers for each sample, so that sample i depends only on its own seed.

    Every call of `normal` advances all streams by one draw; batch size, order and device change nothing.
    """

    def __init__(
        self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self.device = device
        self.dtype = dtype
        self._generators = [generator(seed, "sample") for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw one standard normal tensor of `shape` (without batch) from each stream: (B, *shape)."""
        rows = [torch.randn(tuple(shape), generator=stream) for stream in self._generators]
        stacked = torch.stack(rows) if rows else torch.empty((0, *shape))
        return moved(stacked, self.device, self.dtype)

    def labels(self, num_classes: int) -> Tensor:
        """Uniform class labels (B,), a function only of each seed and independent of the noise."""
        drawn = [torch.randint(num_classes, (), generator=generator(seed, "label")) for seed in self.seeds]
        return (torch.stack(drawn) if drawn else torch.empty(0, dtype=torch.int64)).to(self.device)


@contextlib.contextmanager
def same_dropout(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run a pass with torch's generators seeded with `seed`, and restore them afterwards.

    Two passes under the same seed draw the same dropout mask on any device. Student and target must share it, or the
    difference of their outputs carries mask noise divided by the gap.
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
