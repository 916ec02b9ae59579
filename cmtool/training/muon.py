"""Muon for the matrices of a network, AdamW for everything else in it, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cmtool.training.precision import has_fast_bf16

# Matrices with fewer rows or columns are those of colors, patches and outputs, which are better moved by AdamW.
LEAST_SIDE = 32
MOMENTUM = 0.95
# Matrices of at most so many entries are worth taking together, so many at once.
SMALL, TOGETHER = 2**18, 16
# Jordan et al. 2024: of all odd quintics these are steepest at 0 of those whose iteration stays near 1.
QUINTIC, ITERATIONS, LEAST_NORM = (3.4445, -4.7750, 2.0315), 5, 1e-7


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a weight is a matrix of some size; a kernel (out, in, h, w) counts as one of out rows."""
    return parameter.dim() > 1 and min(parameter.shape[0], parameter[0].numel()) >= LEAST_SIDE


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices (..., rows, columns) with the same singular vectors and all singular values at .68 to 1.13.

    Jordan et al. 2024: five steps of a quintic Newton-Schulz iteration. The values are only near 1; to bring them
    nearer does not train better. One matrix, or several along one more axis.
    """
    x = matrices.mT if (tall := matrices.shape[-2] > matrices.shape[-1]) else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    a, b, c = QUINTIC
    added = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = added(x, added(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


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
        for alike in self._together():
            ahead = [self._ahead(parameter) for parameter in alike]
            several = len(ahead) > 1
            updates = orthogonalized(torch.stack(ahead)).unbind() if several else [orthogonalized(ahead[0])]
            # Singular values of 1 mean entries of 1 / sqrt(larger side) in the mean square; AdamW's have about .2.
            rate = group["lr"] * 0.2 * math.sqrt(max(ahead[0].shape))
            for parameter, update in zip(alike, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-rate)

    def _ahead(self, parameter: nn.Parameter) -> Tensor:
        """Return the momentum of a matrix (rows, columns) with the gradient that is there, and keep the momentum."""
        assert parameter.grad is not None
        grad = parameter.grad.flatten(1)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        ahead = grad.lerp(momentum, MOMENTUM)
        return ahead.bfloat16() if self._rounds else ahead

    def _together(self) -> Iterator[list[nn.Parameter]]:
        """Yield the matrices that have gradients: in bfloat16 small ones of one shape together, else one by one.

        In bfloat16 on a CPU a few of them together take half of the time; in float32 they do not.
        """
        alike: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in self._matrices:
            if parameter.grad is None:
                continue
            if not self._rounds or parameter.numel() > SMALL:
                yield [parameter]
            else:
                alike.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
        for group in alike.values():
            for first in range(0, len(group), TOGETHER):
                yield group[first : first + TOGETHER]
