"""Population training in any dimension by simulation: f_T(x) = E[Y_1 | Y_T = x] of the posterior-resampled chain.

The chain walks from T to 1 and redraws X_0 from its posterior at every level; with the posterior *mean* in its
place the walk is DDIM, that is, distillation. It keeps every marginal, so no regression and no grid is needed in any d.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import DataError, UserError
from cmtool.files.archives import NpzReader
from cmtool.theory.distances import SAMPLED_DIM_LIMIT, assignment_w1, sliced_w1
from cmtool.theory.laws import Mixture, empirical
from cmtool.theory.levels import Levels, build_levels
from cmtool.theory.study import Curve, Panel, Study, Table

Array = NDArray[np.float64]
COLUMNS = ["T", "CT W1", "CD W1", "floor", "CT sliced", "CD sliced", "tr Cov lost", "W2 at most"]


def _step(x: Array, clean: Array, levels: Levels, index: int) -> Array:
    ratio = levels.noise[index - 1] / levels.noise[index]
    return ratio * x + (levels.signal[index - 1] - levels.signal[index] * ratio) * clean


def resample(law: Mixture, levels: Levels, x: Array, rng: np.random.Generator) -> Array:
    """One walk from each row of x (n, d) at level T down to level 1: draws of Y_1 given Y_T = x, (n, d)."""
    for index in range(levels.count - 1, 0, -1):
        clean = law.posterior_sample(x, levels.signal[index], levels.noise[index], rng)
        x = _step(x, clean, levels, index)
    return x


def consistency(law: Mixture, levels: Levels, x: Array, walks: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """f_T(x) for x (n, d) as the mean of `walks` walks, and its standard error, both (n, d)."""
    total, square = np.zeros_like(x), np.zeros_like(x)
    per_round = max(1, min(walks, 200_000 // max(1, len(x))))
    done = 0
    while done < walks:
        now = min(per_round, walks - done)
        ends = resample(law, levels, np.repeat(x, now, axis=0), rng).reshape(len(x), now, -1)
        total += ends.sum(axis=1)
        square += (ends**2).sum(axis=1)
        done += now
    mean = total / walks
    return mean, np.sqrt(np.maximum(square / walks - mean**2, 0) / max(walks - 1, 1))


def ddim(law: Mixture, levels: Levels, x: Array) -> Array:
    """The same walk with posterior means: what perfect distillation of the DDIM solver gives, (n, d)."""
    for index in range(levels.count - 1, 0, -1):
        x = _step(x, law.denoise(x, levels.signal[index], levels.noise[index]), levels, index)
    return x


def marginal(law: Mixture, levels: Levels, index: int, count: int, rng: np.random.Generator) -> Array:
    """`count` draws of X at the level with this index, (count, d)."""
    clean = law.sample(count, rng)
    return levels.signal[index] * clean + levels.noise[index] * rng.standard_normal(clean.shape)


def unbiased_trace_cov(ends: Array) -> float:
    """Tr Cov(f_T(X_T)) from walks (n, walks, d): the spread of the means less the part that is Monte Carlo noise."""
    count, walks, _ = ends.shape
    means = ends.mean(axis=1)
    noise = ends.var(axis=1, ddof=1).mean(axis=0).sum() / walks
    return float(means.var(axis=0, ddof=1).sum() - noise) if count > 1 else 0.0


def ring(modes: int = 4, std: float = 0.3) -> Mixture:
    """`modes` equal normals of width `std` on the unit circle."""
    angle = 2 * np.pi * np.arange(modes) / modes
    return Mixture(np.full(modes, 1 / modes), np.stack([np.cos(angle), np.sin(angle)], axis=1), np.full(modes, std))


def read_points(path: Path, limit: int = 20000) -> Array:
    """Rows of a .npy, .npz (its first array), .csv or .txt file as (n, d) float64.

    Raises:
        DataError: when it is missing, of another kind, holds no numbers, or holds too many points.
    """
    if not path.is_file():
        raise DataError(f"there is no data file {path}", "give a .npy, .npz, .csv or .txt file with one point per row")
    try:
        if path.suffix == ".npz":
            reader = NpzReader(path)
            points = reader.read(next(iter(reader.arrays)))
        elif path.suffix == ".npy":
            points = np.lib.format.open_memmap(path, mode="r")  # allocates nothing that a header merely claims
        else:
            points = np.loadtxt(path, delimiter="," if path.suffix == ".csv" else None, ndmin=2)
        points = np.asarray(points, float)
    except Exception as error:  # NumPy evaluates headers as Python text, which fails in a dozen ways
        if isinstance(error, (DataError, MemoryError)):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"cannot read points from {path}: {why}", "one point per row, numbers only, no header"
        ) from None
    points = points.reshape(len(points), -1) if points.ndim > 1 else points.reshape(-1, 1)
    if len(points) > limit:
        raise DataError(
            f"{path} holds {len(points)} points; the posterior sums over all of them at every step",
            f"take a subset of at most {limit}",
        )
    return points


def _row(law: Mixture, levels: Levels, count: int, walks: int, rng: np.random.Generator) -> list[Any]:
    x = marginal(law, levels, -1, count, rng)
    ends = np.stack([resample(law, levels, x, rng) for _ in range(walks)], axis=1)
    outputs, distilled = ends.mean(axis=1), ddim(law, levels, x)
    clouds = [marginal(law, levels, 0, count, rng) for _ in range(3)]
    center = law.weights @ law.means
    spread = law.weights @ ((law.means - center) ** 2).sum(axis=1) + law.dim * (law.weights @ law.stds**2)
    total = levels.signal[0] ** 2 * spread + law.dim * levels.noise[0] ** 2
    lost = max(float(total) - unbiased_trace_cov(ends), 0.0)
    exact = law.dim <= SAMPLED_DIM_LIMIT
    pairs = [(outputs, clouds[0]), (distilled, clouds[0]), (clouds[1], clouds[2])]
    distances = [assignment_w1(*pair) if exact else None for pair in pairs]
    slices = [sliced_w1(*pair, rng) for pair in pairs[:2]]
    return [levels.count, *distances, *slices, lost, float(np.sqrt(lost))]


def run(
    data: str | None = None,
    counts: tuple[int, ...] = (16, 64),
    count: int = 600,
    walks: int = 100,
    schedule: str = "li",
    seed: int = 0,
) -> Study:
    """W1 by assignment and sliced W1 of the population minimizers, the sampling floor, and the variance identity.

    `data` is a file of points (the empirical law), None a ring of four modes. Above three dimensions the assignment
    is left out, since its floor would hide everything, and only the identity's bound and sliced W1 are shown.

    Raises:
        UserError: for an unreadable file, or counts that are too small.
    """
    if count < 10 or walks < 2 or not counts:
        raise UserError("the chain needs 10 or more points and 2 or more walks each", "use --count 600 --walks 100")
    law = ring() if data is None else empirical(read_points(Path(data)))
    rng = np.random.default_rng(seed)
    levels_list = [build_levels(schedule, size) for size in sorted(set(counts))]
    rows = [_row(law, levels, count, walks, rng) for levels in levels_list]
    name = "ring of four modes" if data is None else f"{Path(data).name} ({len(law.weights)} points, d = {law.dim})"
    sampled = law.dim <= SAMPLED_DIM_LIMIT
    findings = [
        "The chain keeps every marginal, so the covariance that training loses is the sum of its best possible "
        f"losses; its root, {rows[-1][-1]:.3f} at T = {rows[-1][0]}, bounds W2 from training logs alone."
    ]
    if not sampled:
        findings.append(
            f"In d = {law.dim} no W1 is estimated from samples: two clouds of the same law are farther apart."
        )
    places = [row[0] for row in rows]
    picks = ((1, "CT"), (2, "CD"), (3, "floor of two clouds")) if sampled else ((5 - 1, "CT sliced"), (5, "CD sliced"))
    curves = [Curve(label, places, [row[i] for row in rows], "law" if i == 3 else "measured") for i, label in picks]
    note = f"W1 from {count} points is an estimate above a floor, shown beside it and never fitted."
    return Study(
        "chain",
        "Chain: population training by simulation",
        "What does perfect training give on these data?",
        [Table(f"{name}, {count} points, {walks} walks each", COLUMNS, rows)],
        (),
        [Panel(name, "levels T", "W1", curves, log_y=False)],
        findings,
        [note],
        {"data": data or "ring", "T": places, "count": count, "walks": walks, "seed": seed},
    )
