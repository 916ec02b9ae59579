"""What a step draws before any network has looked at it, and the networks that may look at it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """Rows `start` .. `start + len(x0)` of a global batch of `total` images: what one forward pass sees."""

    seed: int
    step: int
    start: int
    total: int


@dataclass(frozen=True)
class Nets:
    """The networks that a step may look at.

    `target` is the student itself where it has no weights of its own; `sample_ema` is the average used for sampling;
    `frozen` is another model that some couplings ask for.
    """

    student: nn.Module
    target: nn.Module
    sample_ema: nn.Module | None = None
    teacher: nn.Module | None = None
    frozen: nn.Module | None = None

    @property
    def paired(self) -> bool:
        """Whether student and target are asked as a pair of passes that share the errors of a half."""
        return bool(getattr(self.student, "paired", False))


@dataclass(frozen=True)
class Draw:
    """Images x0 and unit noise z (B, C, H, W), times t and r (B,), labels (B,) or None.

    `mix` is the scheduled share of images that the model makes itself, `rows` the place in the global batch, `made`
    (B,) bool which images those are, where that has been drawn already.
    """

    x0: Tensor
    z: Tensor
    t: Tensor
    r: Tensor
    label: Tensor | None
    mix: float
    rows: Slice
    made: Tensor | None = None
