"""Measurements that act on rows and on columns: blurs and reductions, with pseudo-inverses from small decompositions.

A picture x (B, C, H, W) is measured as R x C^T with matrices R (h, H) and C (w, W). The singular vectors of the whole
map are the products of theirs and its singular values the products of theirs, so that two small decompositions in
float64 give the pseudo-inverse of an HW x hw matrix that is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.editing.loop import Operator
from cmtool.editing.subject import Subject, clipped

# Singular values below this share of the largest count as zero: bytes hold nothing of what is shrunk so far.
CUT = 1e-3
# Standard deviations on the scale of [-1, 1]: what rounding to 255 levels makes, and what a model's answers leave open.
# With any noise at all, what is shrunk below the root of `LOST` is left to the model: a measurement trusted there
# drives the answers apart. Both were chosen on held-out shapes.
BYTES = 2 / 255 / math.sqrt(12)
OPEN = 0.3
LOST = 0.005
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Separable:
    """The map x -> R x C^T and its decomposition.

    `rows` and `columns` are (U, s, V) of R and C in float64: U (h, k), s (k,), V (H, k).
    """

    rows: tuple[Tensor, Tensor, Tensor]
    columns: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, rows: Matrix, columns: Matrix) -> Separable:
        """Decompose R (h, H) and C (w, W)."""

        def parts(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
            u, s, vh = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
            return u, s, vh.T

        return cls(parts(rows), parts(columns))

    @property
    def values(self) -> Tensor:
        """The singular values (k, l), zero where they count as zero."""
        s = self.rows[1][:, None] * self.columns[1]
        return torch.where(s >= CUT * s.max(), s, torch.zeros_like(s))

    def measure(self, x: Tensor) -> Tensor:
        """Return R x C^T (B, C, h, w), without what counts as zero."""
        return self._between(x, 2, 0, self.values)

    def restore(self, measured: Tensor) -> Tensor:
        """Return the pseudo-inverse of the measurement (B, C, h, w): the least image (B, C, H, W) that explains it."""
        s = self.values
        return self._between(measured, 0, 2, torch.where(s > 0, 1 / s, s))

    def known(self, ratio: float = 0.0) -> Operator:
        """Return what is known of x: P = A^+ A, or with noise in the measurement A^T (A A^T + ratio I)^-1 A.

        `ratio` is the variance of the noise over that of what the model leaves open; the second form is the best linear
        answer then, and shrinks what the noise drowns (CM4IR, Garber & Tirer 2025, calls it A^+_eta A).
        """
        square = self.values**2
        gain = square / (square + ratio).clamp_min(1e-300)
        return Operator(lambda v: self._between(v, 2, 2, gain))

    def _between(self, x: Tensor, start: int, end: int, gain: Tensor) -> Tensor:
        """Take x from the bases `start` (0: measurement, 2: image) to `end`, each of its values times a gain."""

        def on(basis: Tensor) -> Tensor:
            return basis.to(dtype=x.dtype, device=x.device)

        inner = on(self.rows[start]).T @ x @ on(self.columns[start])
        return on(self.rows[end]) @ (on(gain) * inner) @ on(self.columns[end]).T


def blur_matrix(length: int, sigma: float) -> Matrix:
    """Return the Gaussian blur of a line of pixels, (length, length); its ends are repeated, as image programs do.

    `sigma` in pixels is the standard deviation; the weights end at 4 of them.
    """
    from scipy.ndimage import gaussian_filter1d

    return np.ascontiguousarray(gaussian_filter1d(np.eye(length), sigma, axis=0, mode="nearest"))


def reduction_matrix(length: int, factor: int, kernel: str) -> Matrix:
    """Return the reduction of a line of pixels by a whole factor: the "mean" of them, or Pillow's "bicubic" filter.

    It is (length / factor, length), and Pillow itself says what it is: its reduction of the identity.
    """
    from PIL import Image

    rule = {"mean": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}[kernel]
    small = Image.fromarray(np.eye(length, dtype=np.float32)).resize((length // factor, length), rule)
    return np.asarray(small, dtype=np.float64).T.copy()


def blur(height: int, width: int, rows: float, columns: float) -> Separable:
    """A Gaussian blur of standard deviations `rows` (down) and `columns` (across) in pixels."""
    return Separable.of(blur_matrix(height, rows), blur_matrix(width, columns))


def reduction(height: int, width: int, factor: int, kernel: str) -> Separable:
    """A reduction by `factor`, which divides both sides; `kernel` as for `reduction_matrix`."""
    return Separable.of(reduction_matrix(height, factor, kernel), reduction_matrix(width, factor, kernel))


def trust(noise: float) -> float:
    """Return the `ratio` of `Separable.known` for noise of this standard deviation; 0 for none."""
    return LOST + (noise / OPEN) ** 2 if noise > 0 else 0.0


def measured(subject: Subject, way: Separable, values: Tensor, noise: float) -> Subject:
    """Return a subject of which `values` (1, C, h, w) are known, measured by `way` with noise of that deviation."""
    known = way.known(trust(noise))
    y = way.restore(values.double()).to(values.dtype)
    return replace(subject, y=y, operator=lambda like: known, legal=clipped)
