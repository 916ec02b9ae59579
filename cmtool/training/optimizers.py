"""From gradients to moved weights: what is done to the gradients of a step, and the optimizers by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmtool.config.schema import TrainConfig
from cmtool.errors import DivergenceError
from cmtool.training.muon import Muon
from cmtool.training.sharding import Sharding, is_sharded, local
from cmtool.training.summing import GradientSum


class Gradients:
    """The gradients of one step: added up over its passes, summed over the processes, unscaled, clipped."""

    def __init__(
        self,
        train: TrainConfig,
        parameters: Callable[[], list[nn.Parameter]],
        trained: list[nn.Parameter],
        sharding: Sharding | None,
    ) -> None:
        """`trained` is what the optimizer moves: the parameters, or of sharded ones the rows of this process."""
        self.train, self.parameters, self.trained, self.sharding = train, parameters, trained, sharding
        self.scale = LossScale(train.precision == "fp16")
        self._sum = GradientSum([parameter for parameter in parameters() if not is_sharded(parameter)])

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.parameters(), *self.trained):
            parameter.grad = None

    def descend(self, loss: Tensor, step: int, check: bool = False, last: bool = False) -> None:
        """Add the gradients of a pass with one number (B,) for each of its images; with `check` read it before.

        `last`: no pass of the step follows, and other processes have passes too: their sum begins within this one.

        Raises:
            DivergenceError: if a checked loss is not finite.
        """
        mean = loss.sum() / self.train.batch_size
        if check and not math.isfinite(mean.item()):
            raise diverged("loss", step)
        with self._sum.begun_within() if last and self.sharding is None else contextlib.nullcontext():
            (mean * self.scale.value if self.scale.active else mean).backward()

    def collect(self) -> None:
        """Sum the gradients over all processes; for a sharded network torch has done so, but for what stays whole."""
        self._sum.finish()
        if self.sharding is None:
            return
        for parameter, rows in zip(self.parameters(), self.trained, strict=True):
            rows.grad = torch.zeros_like(rows) if parameter.grad is None else local(parameter.grad)

    def clip(self, step: int) -> Tensor | None:
        """Unscale and clip the gradients, and return their norm (); None if float16 overflowed: leave the step out.

        Raises:
            DivergenceError: if they are not finite; unchecked on a GPU, since reading them would stall the queue.
        """
        norm = gradient_norm(self.trained, self.scale.value, self.train.grad_clip, self.total_norm)
        if self.scale.active:
            finite = bool(torch.isfinite(norm))
            self.scale.update(finite)
            return norm if finite else None
        if norm.device.type == "cpu" and not math.isfinite(norm.item()):
            raise diverged("gradient", step)
        return norm

    def total_norm(self, tensors: list[Tensor]) -> Tensor:
        """Return the Euclidean norm, (), of tensors like `trained` (gradients, an average's weights), over all rows."""
        if self.sharding is None:
            return nn.utils.get_total_norm(tensors)
        split = [is_sharded(parameter) for parameter in self.parameters()]
        return self.sharding.total_norm(
            [tensor for tensor, here in zip(tensors, split, strict=True) if here],
            [tensor for tensor, here in zip(tensors, split, strict=True) if not here],
        ).to(self.parameters()[0].dtype)


def diverged(what: str, step: int) -> DivergenceError:
    """Return the error that says what was not finite, and what helps."""
    return DivergenceError(
        f"the {what} is not finite at step {step}.",
        "try a smaller --set train.lr, a --set train.grad_clip=1.0, or --precision fp32",
    )


class LossScale:
    """The factor on a float16 loss that keeps small gradients from becoming zero (Micikevicius et al. 2018).

    It is halved when a gradient overflows (that step is left out) and doubled after `patience` good steps. In every
    other precision it is inactive and 1: bfloat16 has the range of float32.
    """

    def __init__(self, active: bool, value: float = 65536.0, patience: int = 2000) -> None:
        self.active = active
        self.value = value if active else 1.0
        self.good = 0
        self.patience = patience

    def update(self, finite: bool) -> None:
        """Adjust the factor after a step whose gradients were finite or not.

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
    """Divide the gradients by `scale`, clip them to the global norm `limit` (None: do not) and return that norm, ().

    `total` measures the norm; gradients that are spread over processes need one of their own.
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
    """Whether every weight that this process holds is a finite number (waits for the device)."""
    weights = [local(parameter) for module in modules for parameter in module.parameters()]
    weights = [weight for weight in weights if weight.numel()]
    if not weights:
        return True  # with more processes than rows, one may hold nothing
    # The largest magnitude is infinite or NaN exactly where a weight is; a sum of squares could overflow by itself.
    largest = torch._foreach_norm(weights, float("inf"))
    return bool(torch.isfinite(torch.stack([value.float() for value in largest])).all())


def rectification(step: int, beta: float) -> float | None:
    """Return the variance rectification r_t of a step (the first is 1), None while the variance is intractable.

    Source: Liu et al. 2020, Algorithm 2, with torch's bound: rho_t > 5.
    """
    rho_inf = 2 / (1 - beta) - 1
    rho = rho_inf - 2 * step * beta**step / (1 - beta**step)
    if rho <= 5:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


class FusedRAdam(torch.optim.RAdam):
    """torch's RAdam with its state and, up to rounding, its numbers, in one pass over the weights.

    Once the variance is tractable, a step is one of Adam with the learning rate times r_t, and torch has a fused kernel
    for that. On a CPU it takes a third of the time of the foreach form. RAdam adds eps before the bias of the second
    moment is corrected, Adam adds it after: hence eps / sqrt(1 - beta2^t). For real, dense weights on a CPU or a GPU.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returns."""
        ready = all(self._rectified(group) for group in self.param_groups)
        if closure is not None or not ready:
            return super().step(closure)
        for group in self.param_groups:
            self._fused(group)
        return None

    def _steps(self, group: dict[str, Any]) -> set[int]:
        """Return how many steps the group's parameters with gradients have taken."""
        return {int(self.state[p]["step"]) if self.state[p] else 0 for p in group["params"] if p.grad is not None}

    def _rectified(self, group: dict[str, Any]) -> bool:
        """Whether all parameters of a group are at the same step, and the variance is tractable there."""
        steps = self._steps(group)
        return not steps or (len(steps) == 1 and rectification(min(steps) + 1, group["betas"][1]) is not None)

    def _fused(self, group: dict[str, Any]) -> None:
        columns: tuple[list[Tensor], ...] = ([], [], [], [], [])
        self._init_group(group, *columns)
        params, grads, means, squares, steps = columns
        if not params:
            return
        number, (beta1, beta2) = int(steps[0]) + 1, group["betas"]
        factor = rectification(number, beta2)
        assert factor is not None
        torch._foreach_add_(steps, 1)
        # One number for all, on the weights' device: the kernel reads it, and the CPU does not wait for it.
        now = torch.full((), float(number), device=params[0].device)
        torch._fused_adam_(
            params,
            grads,
            means,
            squares,
            [],
            [now] * len(params),
            lr=float(group["lr"]) * factor,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"] / math.sqrt(1 - beta2**number),
            amsgrad=False,
            maximize=False,
        )


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
    """Return the optimizer that `train.optimizer` names: fused where torch has that form, otherwise foreach."""
    common: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    adam = {**common, "betas": train.betas, "eps": train.eps}
    if train.optimizer == "radam" and params[0].device.type in ("cpu", "cuda"):
        return FusedRAdam(params, foreach=True, **adam)
    if train.optimizer == "radam":
        return torch.optim.RAdam(params, foreach=True, **adam)
    if train.optimizer == "lion":
        return Lion(params, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    if train.optimizer == "muon":
        return Muon(params, **adam)
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

    Fused kernels walk parameter and moments as flat memory: next to a channels-last weight, dense moments would be
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
