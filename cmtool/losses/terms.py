"""What the parts of an objective hand to one another: rows of a batch, networks, a draw, the points of a pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from cmtool.diffusion.guidance import Told
from cmtool.diffusion.solvers import Denoise, Step
from cmtool.networks.in_step import Pairing, on_tape


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Let a network drop nothing out for a while."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def told_of(augment: Tensor | None) -> dict[str, Tensor]:
    """Return what a network is told of its augmented images, as keywords; nothing where there are none."""
    return {} if augment is None else {"augment": augment}


@dataclass(frozen=True)
class Slice:
    """Rows `start` .. `start + len(x0)` of a global batch of `total` images: what one forward pass sees."""

    seed: int
    step: int
    start: int
    total: int


@dataclass(frozen=True)
class Nets:
    """The networks that a step may call.

    `target` is the student itself where it has no weights of its own; `sample_ema` is the average used for sampling;
    `frozen` is another model that some couplings ask for; `fake` is the denoiser of the model's own samples.
    `guidance` (B, 3) is what guided networks have been told.
    """

    student: nn.Module
    target: nn.Module
    sample_ema: nn.Module | None = None
    teacher: nn.Module | None = None
    frozen: nn.Module | None = None
    fake: nn.Module | None = None
    guidance: Tensor | None = None

    def told(self, guidance: Tensor | None) -> Nets:
        """Return these networks with guidance (B, 3) beside every time they are asked about; None: as they are."""
        if guidance is None:
            return self
        student: Any = Told(self.student, guidance)
        target: Any = student if self.target is self.student else Told(self.target, guidance)
        return replace(self, student=student, target=target, guidance=guidance)

    @property
    def paired(self) -> bool:
        """Whether student and target run as a pair of passes that share their half-precision rounding errors."""
        return bool(getattr(self.student, "paired", False))

    @property
    def pairing(self) -> Pairing:
        """What runs the passes of a pair."""
        return getattr(self.student, "pairing", None) or on_tape


class _Timed:
    """Times (B,) each, from the noisiest to the cleanest."""

    times: tuple[Tensor, ...]

    @property
    def t(self) -> Tensor:
        """The noisiest time (B,)."""
        return self.times[0]

    @property
    def r(self) -> Tensor:
        """The cleanest time (B,)."""
        return self.times[-1]


@dataclass(frozen=True)
class Draw(_Timed):
    """Everything that is settled about a pass before a network runs.

    Images `x0` and unit noise `z` are (B, C, H, W), `times` are (B,) each, from the noisiest to the cleanest, `label`
    is (B,) or None. `group` neighboring rows form one sample set (1: every row is its own set). `mix` is the scheduled
    share of images that the model generates itself, and `made` (B,) bool says which ones they are. `share` is the part
    of the run that is done, in [0, 1]; a tensor () in a recorded pass, which must not hold the number itself.
    `condition` (B, K, H, W) are the pictures that a conditioned network sees beside its input. `augment`
    (B, L) is what the networks are told of how the images were augmented; None: they were not.
    `guidance` (B, 3) is what a guided network is told: ln of the scale, first and last time.
    """

    x0: Tensor
    z: Tensor
    times: tuple[Tensor, ...]
    label: Tensor | None
    mix: float
    rows: Slice
    group: int = 1
    share: float | Tensor = 0.0
    made: Tensor | None = None
    condition: Tensor | None = None
    augment: Tensor | None = None
    guidance: Tensor | None = None


@dataclass(frozen=True)
class Points(_Timed):
    """What a target rule works with: the images of a draw, and the way from one noise level to another.

    `x0`, `z` and `x_t` are (B, C, H, W), `times` (B,) each in the images' dtype, `label` (B,) or None. `denoise` gives
    the slope of the path and `solver` follows it. With a `dropout_seed` every call of a network draws the same masks.
    `share`, `group` and `augment` are those of the draw.
    """

    x0: Tensor
    z: Tensor
    x_t: Tensor
    times: tuple[Tensor, ...]
    label: Tensor | None
    denoise: Denoise
    solver: Step
    dropout_seed: int | None
    share: float | Tensor = 0.0
    group: int = 1
    augment: Tensor | None = None
