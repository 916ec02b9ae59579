"""Keeping numbers finite: gradient norms, the scale of a half-precision loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from cmtool.errors import DivergenceError
from cmtool.training.sharding import local


class LossScale:
    """The factor on a float16 loss that keeps small gradients from becoming zero (Micikevicius et al. 2018).

    Halved when a gradient overflows (that step is left out), doubled after `patience` good steps. Inactive (factor 1)
    in every other precision: bfloat16 has float32's range.
    """

    def __init__(self, active: bool, value: float = 65536.0, patience: int = 2000) -> None:
        self.active = active
        self.value = value if active else 1.0
        self.good = 0
        self.patience = patience

    def update(self, finite: bool) -> None:
        """Follow one step whose gradients were finite or not.

        Raises:
            DivergenceError: if they overflow at any scale: the loss itself runs away.
        """
        if not finite:
            self.value, self.good = self.value / 2, 0
            if self.value < 1e-4:
                raise DivergenceError(
                    "the gradients overflow float16 at any loss scale.",
                    "use --precision bf16 or fp32, or a smaller --set train.lr",
                )
            return
        self.good += 1
        if self.good >= self.patience:
            self.value, self.good = min(self.value * 2, 2.0**24), 0

    def state(self) -> list[float]:
        """Return what a checkpoint keeps."""
        return [self.value, self.good]

    def restore(self, state: Sequence[float]) -> None:
        """Put back what `state` gave."""
        if self.active:
            self.value, self.good = float(state[0]), int(state[1])


def gradient_norm(
    parameters: Iterable[nn.Parameter],
    scale: float,
    limit: float | None,
    total: Callable[[list[Tensor]], Tensor] = nn.utils.get_total_norm,
) -> Tensor:
    """Divide the gradients by `scale`, clip them to the global norm `limit` (None: do not), return their norm, ().

    `total` measures the norm, for gradients of which other processes have a part.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_(gradients, 1.0 / scale)
    norm = total(gradients)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@torch.no_grad()
def all_finite(modules: Iterable[nn.Module]) -> bool:
    """Whether every weight of the modules in this process is a finite number (waits for the device)."""
    weights = [local(parameter) for module in modules for parameter in module.parameters()]
    weights = [weight for weight in weights if weight.numel()]
    if not weights:
        return True  # with more processes than rows one may hold nothing
    # The largest magnitude is infinite or NaN exactly where a weight is; a sum of squares could overflow by itself.
    largest = torch._foreach_norm(weights, float("inf"))
    return bool(torch.isfinite(torch.stack([value.float() for value in largest])).all())
