"""What a training run reports: the numbers of the steps since the last report."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Edges of the noise-level bands that reports break the distance down by.
BANDS = (0.02, 0.1, 0.5, 2.0, 10.0)


@dataclass(frozen=True)
class Report:
    """What happened over the steps since the last report; `step` counts finished steps."""

    step: int
    steps: int
    loss: float
    distance: float
    bands: dict[str, float]
    num_scales: int
    target_ema: float
    lr: float
    grad_norm: float
    images_per_s: float
    images_seen: int

    def row(self) -> dict[str, object]:
        """Return the row of `metrics.jsonl`: plain JSON, null where a number is not finite."""
        return {key: None if _odd(value) else value for key, value in self.__dict__.items()}


def _odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass
class Tally:
    """Numbers since the last report, left on their device: reading one would wait for it."""

    losses: list[Tensor] = field(default_factory=list)
    distances: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    paused: float = field(default_factory=time.perf_counter)
    images: int = 0

    def add(self, weighted: Tensor, distance: Tensor, t: Tensor) -> None:
        """Keep the numbers (B,) of one pass."""
        self.losses.append(weighted)
        self.distances.append(distance)
        self.times.append(t)
        self.images += len(t)

    def mark(self) -> tuple[int, int]:
        """Return what `rewind` needs to forget all passes after this point."""
        return len(self.losses), self.images

    def rewind(self, mark: tuple[int, int]) -> None:
        """Forget the passes since `mark`: they are done once more."""
        kept, self.images = mark
        for numbers in (self.losses, self.distances, self.times):
            del numbers[kept:]

    def finite(self) -> bool:
        """Whether every loss and gradient norm so far is a finite number (reads them: waits for the device)."""
        kept = [tensor.reshape(-1).float() for tensor in (*self.losses, *self.norms)]
        return not kept or bool(torch.isfinite(torch.cat(kept)).all())


def band_means(distance: Tensor, t: Tensor) -> dict[str, float]:
    """Mean distance (B,) for each band of noise levels t (B,) that has images in it."""
    edges = torch.tensor(BANDS, dtype=t.dtype, device=t.device)
    band = torch.bucketize(t, edges)
    names = [f"<{BANDS[0]:g}", *(f"<{edge:g}" for edge in BANDS[1:]), f">={BANDS[-1]:g}"]
    return {name: float(distance[band == i].mean()) for i, name in enumerate(names) if bool((band == i).any())}
