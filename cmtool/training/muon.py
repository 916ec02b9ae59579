"""Muon for the matrices of a network, AdamW for everything else in it, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

# Matrices with fewer rows or columns are those of colors, patches and outputs, which are better moved by AdamW.
LEAST_SIDE = 32


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a weight is a matrix of some size; a kernel (out, in, h, w) counts as one of out rows."""
    return parameter.dim() > 1 and min(parameter.shape[0], parameter[0].numel()) >= LEAST_SIDE


class Muon(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) for the matrices among the weights, AdamW for the others.

    A matrix moves by its momentum with all singular values brought to about 1, so that directions with small gradients
    are learned as fast as the others. Updates have the size that AdamW's have (Liu et al. 2025), so that its rates and
    its weight decay fit both. `betas` and `eps` are AdamW's; Muon's momentum is .95. Its iteration for the singular
    values computes in bfloat16 whatever the weights are.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        own: list[nn.Parameter] = self.param_groups[0]["params"]
        self._matrices = [parameter for parameter in own if is_matrix(parameter)]
        # torch's Muon takes nothing but matrices: kernels are lent to it flattened.
        self._lent = [nn.Parameter(parameter.detach().flatten(1)) for parameter in self._matrices]
        others = [parameter for parameter in own if not is_matrix(parameter)]
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._muon = torch.optim.Muon(self._lent, adjust_lr_fn="match_rms_adamw", **common) if self._lent else None
        self._adamw = torch.optim.AdamW(others, betas=betas, eps=eps, foreach=True, **common) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        # The state is kept here, where checkpoints read it and new stages clear it.
        if self._adamw is not None:
            self._adamw.state = self.state
            self._run(self._adamw)
        if self._muon is not None:
            for parameter, lent in zip(self._matrices, self._lent, strict=True):
                lent.data = parameter.detach().flatten(1)
                lent.grad = None if parameter.grad is None else parameter.grad.flatten(1)
                self._muon.state[lent] = self.state[parameter]
            self._run(self._muon)
            for parameter, lent in zip(self._matrices, self._lent, strict=True):
                if lent.data_ptr() != parameter.data_ptr():  # a kernel in another layout was copied to be flattened
                    parameter.copy_(lent.view(parameter.shape))

    def _run(self, part: torch.optim.Optimizer) -> None:
        part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        part.step()
