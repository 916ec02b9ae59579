"""Couplings: which clean image meets which noise."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cmtool.config.parts import CouplingPart

Coupling = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def independent(x0: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Images and noise as they were drawn."""
    return x0, z


COUPLINGS: dict[str, Callable[[CouplingPart], Coupling]] = {"independent": lambda part: independent}


def build_coupling(part: CouplingPart) -> Coupling:
    """Return the coupling that `part` names."""
    return COUPLINGS[part.kind](part)
