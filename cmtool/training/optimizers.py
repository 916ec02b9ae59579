"""Optimizers by name, in their fastest form on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cmtool.config.schema import TrainConfig
from cmtool.training.fused_radam import FusedRAdam


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, Algorithm 2), used by the generator-augmented flows paper."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            means = [self.state[p]["exp_avg"] for p in params]
            first, second = group["betas"]
            directions = torch._foreach_lerp(means, grads, 1 - first)
            torch._foreach_sign_(directions)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"])
            torch._foreach_lerp_(means, grads, 1 - second)


def build_optimizer(train: TrainConfig, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that `train.optimizer` names; fused where torch has such a form, else foreach."""
    common: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    adam = {**common, "betas": train.betas, "eps": train.eps}
    if train.optimizer == "radam" and params[0].device.type in ("cpu", "cuda"):
        return FusedRAdam(params, foreach=True, **adam)
    if train.optimizer == "radam":
        return torch.optim.RAdam(params, foreach=True, **adam)
    if train.optimizer == "lion":
        return Lion(params, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    if train.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=train.betas[0], foreach=True, **common)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(params, fused=params[0].device.type in ("cpu", "cuda"), **adam)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Flatten an optimizer's state to tensors named `<parameter>.<entry>`."""
    found = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            found[f"{names[index]}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, moments in the memory layout of their parameter.

    Fused kernels walk parameter and moments as flat memory: dense moments beside a channels-last weight would be
    read in another order.
    """
    state: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(names)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        parameter, key = name.rsplit(".", 1)
        own = parameters[index[parameter]]
        if value.shape == own.shape and value.dim():
            value = torch.empty_like(own, dtype=value.dtype).copy_(value).detach()
        state.setdefault(index[parameter], {})[key] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
