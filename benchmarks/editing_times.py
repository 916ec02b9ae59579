"""Noise levels for editing, found where the answer is known: Gaussian images.

    python benchmarks/editing_times.py            # how far each grid ends from the exact posterior
    python benchmarks/editing_times.py --search   # fit (first level, last level, guidance) for every task

For Gaussian data the consistency function is linear, so Algorithm 4 maps a Gaussian to a Gaussian and its distance to
the true posterior (2-Wasserstein, per unknown dimension, root mean square over measurements) is a formula. The images
have the pixel covariances of the digits and of the shapes (8 x 8 and 6 x 6); in addition, two pixels of deviation .5
and correlation .9, one known to be 1. "g" is the over-relaxation of the known part between the steps (0: the paper's
algorithm).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from cmtool.cli.output import Output
from cmtool.config.schema import EditConfig
from cmtool.data.shapes import shapes_images
from cmtool.editing.levels import tuned_times
from cmtool.editing.loop import LUMA
from cmtool.samplers.times import geometric_times, solver_times

Array = NDArray[np.float64]
SIGMA_MIN = 0.002
# Levels and guidance fitted only to the two pixels: what 20 evaluations can reach there.
TWO_PIXEL_TIMES = tuple(0.551 * ((index + 0.88) / 0.88) ** -0.58 for index in range(20))
TWO_PIXEL_GUIDANCE = 1.26


def root(matrix: Array) -> Array:
    """Symmetric square root."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


@dataclass(frozen=True)
class Problem:
    """Gaussian images N(mean, covariance), of which `known` (a projection) is measured for every row of `truths`."""

    name: str
    mean: Array
    covariance: Array
    known: Array
    truths: Array

    def posterior(self) -> tuple[Array, Array, Array]:
        """Return (basis of the unknown part, posterior means in it (rows), posterior covariance in it)."""
        values, vectors = np.linalg.eigh(self.known)
        seen, hidden = vectors[:, values > 0.5].T, vectors[:, values < 0.5]
        gain = self.covariance @ seen.T @ np.linalg.inv(seen @ self.covariance @ seen.T + 1e-9 * np.eye(len(seen)))
        means = self.mean + (self.truths - self.mean) @ seen.T @ gain.T
        return hidden, means @ hidden, hidden.T @ (self.covariance - gain @ seen @ self.covariance) @ hidden

    def after_edit(self, times: Sequence[float], guidance: float) -> tuple[Array, Array]:
        """Return means (rows) and covariance of Algorithm 4's answer."""
        size = len(self.mean)
        values, vectors = np.linalg.eigh(self.covariance)
        fixed = self.truths @ self.known
        means, covariance = fixed, np.zeros((size, size))
        for index, t in enumerate(times):
            noise = t**2 - (SIGMA_MIN**2 if index else 0.0)
            f = (vectors * np.sqrt((values.clip(0) + SIGMA_MIN**2) / (values.clip(0) + t**2))) @ vectors.T
            strength = 1.0 if index == len(times) - 1 else 1.0 + guidance
            keep = np.eye(size) - strength * self.known
            means = (self.mean + (means - self.mean) @ f) @ keep + strength * fixed
            covariance = keep @ f @ (covariance + noise * np.eye(size)) @ f @ keep
        return means, covariance

    def distance(self, times: Sequence[float], guidance: float = 0.0) -> float:
        """2-Wasserstein distance of the edit to the posterior, per unknown dimension."""
        hidden, wanted, spread = self.posterior()
        means, covariance = self.after_edit(times, guidance)
        inner, half = hidden.T @ covariance @ hidden, root(spread)
        excess = np.trace(inner) + np.trace(spread) - 2 * np.trace(root(half @ inner @ half))
        squares = ((means @ hidden - wanted) ** 2).sum(axis=1) + max(float(excess), 0.0)
        return float(np.sqrt(squares.mean() / hidden.shape[1]))


def two_pixels() -> Problem:
    """Deviation .5, correlation .9; the first pixel is 1."""
    covariance = 0.25 * np.array([[1.0, 0.9], [0.9, 1.0]])
    return Problem("two pixels", np.zeros(2), covariance, np.diag([1.0, 0.0]), np.array([[1.0, 0.0]]))


def fitted(name: str, images: Array, known: Array) -> Problem:
    """The Gaussian of these images (N, D), with four measurements drawn from it."""
    covariance = np.cov(images.T) + 1e-4 * np.eye(images.shape[1])
    truths = np.random.default_rng(0).multivariate_normal(images.mean(0), covariance, 4)
    return Problem(name, images.mean(0), covariance, known, truths)


def patch_projection(channels: int, side: int, factor: int) -> Array:
    """The projection onto patch means of (channels, side, side) images."""
    line = np.kron(np.eye(side // factor), np.full((factor, factor), 1 / factor))
    return np.kron(np.eye(channels), np.kron(line, line))


def hole(channels: int, side: int, margin: int, half: bool = False) -> Array:
    """The projection onto the pixels outside a hole in the middle, or outside the right half."""
    known = np.ones((channels, side, side))
    if half:
        known[:, :, side // 2 :] = 0
    else:
        known[:, margin:-margin, margin:-margin] = 0
    return np.diag(known.ravel())


def problems() -> dict[str, list[Problem]]:
    """Return the problems of every task."""
    from sklearn.datasets import load_digits

    digits = load_digits().images.reshape(-1, 64) / 8 - 1
    pictures = shapes_images(0, 1000, 16)[0].astype(np.float64) / 127.5 - 1
    small = pictures.reshape(1000, 3, 8, 2, 8, 2).mean((3, 5))[:, :, 1:7, 1:7].reshape(1000, -1)
    luma = np.array(LUMA) / np.linalg.norm(LUMA)
    return {
        "inpaint": [
            fitted("digits, middle", digits, hole(1, 8, 2)),
            fitted("digits, half", digits, hole(1, 8, 0, half=True)),
            fitted("shapes, middle", small, hole(3, 6, 1)),
        ],
        "superres": [
            fitted("digits, x 2", digits, patch_projection(1, 8, 2)),
            fitted("shapes, x 2", small, patch_projection(3, 6, 2)),
        ],
        "colorize": [fitted("shapes, luma", small, np.kron(np.outer(luma, luma), np.eye(36)))],
    }


def together(group: Sequence[Problem], times: Sequence[float], guidance: float) -> float:
    """Root mean square of the distances of several problems."""
    return float(np.sqrt(np.mean([problem.distance(times, guidance) ** 2 for problem in group])))


def show(output: Output) -> None:
    """Print the distance of the published and of the tuned levels, problem by problem."""
    paper = solver_times(40)[:-1]
    rows = []
    for task, group in problems().items():
        levels = getattr(EditConfig(), task)
        tuned, guidance = tuned_times(levels, 20, SIGMA_MIN, 80.0), levels.guidance
        rows.extend(
            [p.name, p.distance((80.0,)), p.distance(paper), p.distance(tuned), p.distance(tuned, guidance)]
            for p in group
        )
    pair = two_pixels()
    own = pair.distance(TWO_PIXEL_TIMES, TWO_PIXEL_GUIDANCE)
    rows.append([pair.name, pair.distance((80.0,)), pair.distance(paper), pair.distance(TWO_PIXEL_TIMES), own])
    heads = ["images", "1 evaluation", "paper, 39", "tuned, 20, g = 0", "tuned, 20"]
    output.table("distance to the exact posterior", heads, rows)


def search(output: Output, steps: int) -> None:
    """Fit the three numbers of every task by Nelder-Mead."""
    rows = []
    for task, group in [*problems().items(), ("two pixels", [two_pixels()])]:
        for free in (False, True):

            def cost(p: Array, group: list[Problem] = group, free: bool = free) -> float:
                first, last, guidance = np.exp(p)
                levels = geometric_times(steps, min(first, 80.0), min(max(last, 0.0021), 0.95 * min(first, 80.0)))
                return together(group, levels, guidance if free else 0.0)

            start = np.log([1.0, 0.15, 1.0])
            simplex = np.vstack([start, start + 0.5 * np.eye(3)])
            options = {"maxfev": 150, "xatol": 0.02, "fatol": 1e-4, "initial_simplex": simplex}
            found = minimize(cost, start, method="Nelder-Mead", options=options)
            first, last, guidance = np.exp(found.x)
            rows.append([task, steps, first, last, guidance if free else 0.0, found.fun])
    output.table("fitted levels", ["task", "evaluations", "first", "last", "g", "distance"], rows)


def main() -> None:
    """Print the table, or search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    output = Output()
    if given.search:
        search(output, given.steps)
    else:
        show(output)


if __name__ == "__main__":
    main()
