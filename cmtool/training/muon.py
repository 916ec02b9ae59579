"""Muon for the matrices of a network, AdamW for everything else in it, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cmtool.training.precision import has_fast_bf16

# Matrices with fewer rows or columns are those of colors, patches and outputs, which are better moved by AdamW.
LEAST_SIDE = 32
MOMENTUM = 0.95
# Jordan et al. 2024: of all odd quintics these are steepest at 0 of those whose iteration stays near 1.
QUINTIC, ITERATIONS, LEAST_NORM = (3.4445, -4.7750, 2.0315), 5, 1e-7


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a weight is a matrix of some size; a kernel (out, in, h, w) counts as one of out rows."""
    return parameter.dim() > 1 and min(parameter.shape[0], parameter[0].numel()) >= LEAST_SIDE


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix (rows, columns) with its singular vectors kept and all singular values brought to .68 to 1.13.

    Jordan et al. 2024: five steps of a quintic Newton-Schulz iteration. The values are only near 1; to bring them
    nearer does not train better.
    """
    x = matrix.T if (tall := matrix.shape[0] > matrix.shape[1]) else matrix
    x = x / x.norm().clamp(min=LEAST_NORM)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, with Nesterov's momentum) for the matrices among the weights, AdamW for the others.

    A matrix moves by its momentum with all singular values brought to about 1, so that directions with small gradients
    are learned as fast as the others. Updates have the size that AdamW's have (Liu et al. 2025, arXiv 2502.16982,
    equation 4), so that its rates and its weight decay fit both. `betas` and `eps` are AdamW's; Muon's momentum is .95.

    `torch.optim.Muon` computes the same, but in bfloat16 everywhere, and takes no kernels. Here float32 is rounded
    where the device multiplies bfloat16 faster; a processor without instructions for that takes 15 times as long.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        # Restoring a state reads `fused`: AdamW's count of steps then goes to the weights' device.
        fused = (params := list(params))[0].device.type in ("cpu", "cuda")
        adam: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        super().__init__(params, adam)
        self._rounds = params[0].dtype == torch.float32 and has_fast_bf16(params[0].device)
        self._matrices = [parameter for parameter in params if is_matrix(parameter)]
        others = [parameter for parameter in params if not is_matrix(parameter)]
        self._adamw = torch.optim.AdamW(others, **adam) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        group = self.param_groups[0]
        if self._adamw is not None:
            # The state is kept here, where checkpoints read it and new stages clear it.
            self._adamw.state = self.state
            self._adamw.param_groups[0]["lr"] = group["lr"]
            self._adamw.step()
        for parameter in self._matrices:
            if parameter.grad is not None:
                self._move(parameter, parameter.grad.flatten(1), group["lr"], group["weight_decay"])

    def _move(self, parameter: nn.Parameter, grad: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        ahead = grad.lerp(momentum, MOMENTUM)
        update = orthogonalized(ahead.bfloat16() if self._rounds else ahead).reshape(parameter.shape)
        # Singular values of 1 mean entries of 1 / sqrt(larger side) in the mean square, where AdamW's have about .2.
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * 0.2 * math.sqrt(max(grad.shape)))
