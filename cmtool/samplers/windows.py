"""A model of one size on pictures of any larger size: overlapping windows, fused in every evaluation.

Fusing inside each evaluation, rather than at the end, lets neighboring windows agree step by step (MultiDiffusion);
no seam is left because the weights fall smoothly to the windows' rims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmtool.samplers.multistep import ConsistencyFunction


def positions(length: int, window: int, overlap: float = 0.5) -> list[int]:
    """Return the first pixels of windows that cover `length` evenly, each overlapping the next by at least `overlap`.

    Raises:
        ValueError: if the window is longer than the picture.
    """
    if window > length:
        raise ValueError(f"a window of {window} pixels does not fit into {length}")
    if window == length:
        return [0]
    stride = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((length - window) / stride) + 1
    return [round(index * (length - window) / (count - 1)) for index in range(count)]


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
        overlap: least share of a window that the next one sees too.
    """

    def __init__(
        self, model: ConsistencyFunction, shape: tuple[int, int, int], batch_size: int = 64, overlap: float = 0.5
    ) -> None:
        self._model, self.image_shape, self.sigma_min = model, shape, model.sigma_min
        self._batch_size = batch_size
        window = model.image_shape[-1]
        self._window = window
        self._corners = [
            (top, left) for top in positions(shape[1], window, overlap) for left in positions(shape[2], window, overlap)
        ]

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the fused estimate of x0, same shape as x."""
        if len(self._corners) == 1:
            return self._model(x, t, label)
        side, many = self._window, len(self._corners)
        cut = torch.stack([x[:, :, top : top + side, left : left + side] for top, left in self._corners], dim=1)
        flat = cut.reshape(-1, *cut.shape[2:])
        times = t.repeat_interleave(many)
        labels = None if label is None else label.repeat_interleave(many)
        answers = self._in_batches(flat, times, labels).reshape(cut.shape)
        weight = taper(side, x)
        total, norm = torch.zeros_like(x), torch.zeros(x.shape[-2:], dtype=x.dtype, device=x.device)
        for index, (top, left) in enumerate(self._corners):
            total[:, :, top : top + side, left : left + side] += weight * answers[:, index]
            norm[top : top + side, left : left + side] += weight
        return total / norm

    def _in_batches(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        parts = []
        for first in range(0, len(x), self._batch_size):
            rows = slice(first, first + self._batch_size)
            parts.append(self._model(x[rows], t[rows], None if label is None else label[rows]))
        return torch.cat(parts)
