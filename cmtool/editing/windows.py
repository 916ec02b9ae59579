"""A model of one size on pictures of any larger size: overlapping windows, fused in every evaluation.

Fusing inside each evaluation, rather than at the end, lets neighboring windows agree step by step (MultiDiffusion);
no seam is left because the weights fall smoothly to the windows' rims. The windows lie elsewhere in each evaluation: a
model that draws its subject in the middle of every picture would otherwise repeat it in a lattice.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from cmtool.rng import derive
from cmtool.samplers.solvers import ConsistencyFunction


def positions(length: int, window: int, overlap: float = 0.5, offset: int = 0) -> list[int]:
    """Return the first pixels of windows that cover `length`, each overlapping the next by at least `overlap`.

    Both ends have a window; those between lie at `offset` plus whole strides.

    Raises:
        ValueError: if the window is longer than the picture.
    """
    if window > length:
        raise ValueError(f"a window of {window} pixels does not fit into {length}")
    stride, last = max(1, math.floor(window * (1 - overlap))), length - window
    return sorted({0, *range(offset % stride, last, stride), last})


def taper(window: int, like: Tensor) -> Tensor:
    """Weights (window, window) that are largest in the middle and small, but never zero, at the rim."""
    place = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    ramp = torch.sin(math.pi * place) ** 2
    return torch.outer(ramp, ramp).to(dtype=like.dtype, device=like.device)


class Windowed:
    """A model that accepts x (B, C, H, W) of any size at least its own, by fusing overlapping windows.

    The answer at a pixel is the weighted mean of the answers of all windows that see it. At the model's own size it is
    the model itself.

    Args:
        model: the model of one size.
        shape: (C, H, W) of the pictures.
        batch_size: windows computed at once.
    """

    def __init__(self, model: ConsistencyFunction, shape: tuple[int, int, int], batch_size: int = 64) -> None:
        self._model, self.image_shape, self.sigma_min = model, shape, model.sigma_min
        self._window, self._batch_size = model.image_shape[-1], batch_size

    def corners(self, t: float) -> list[tuple[int, int]]:
        """Return (top, left) of the windows at noise level `t`, of which they are a function."""
        rows, columns = (
            positions(length, self._window, offset=derive(0, "windows", axis, f"{t:.6g}"))
            for axis, length in enumerate(self.image_shape[1:])
        )
        return [(top, left) for top in rows for left in columns]

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the fused estimate of x0, same shape as x."""
        corners = self.corners(float(t[0]))
        if len(corners) == 1:
            return self._model(x, t, label)
        weight = taper(self._window, x)
        total, norm = torch.zeros_like(x), torch.zeros(x.shape[-2:], dtype=x.dtype, device=x.device)
        side = [slice(start, start + self._window) for start in range(max(self.image_shape[1:]))]
        for top, left in corners:
            norm[side[top], side[left]] += weight
        # Never more than a batch of windows is held: all of them are larger than four pictures.
        places = ((row, side[top], side[left]) for row in range(len(x)) for top, left in corners)
        while some := list(itertools.islice(places, self._batch_size)):
            rows = torch.tensor([row for row, _, _ in some], device=x.device)
            cut = torch.stack([x[row, :, down, across] for row, down, across in some])
            answers = self._model(cut, t[rows], None if label is None else label[rows])
            for (row, down, across), answer in zip(some, answers, strict=True):
                total[row, :, down, across] += weight * answer
        return total / norm
