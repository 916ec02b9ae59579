"""Averages chosen after training: any power-function average as a sum of snapshots of a few others (EDM2, section 3.2).

During training the power averages are kept, and their weights are written out every `train.snapshot_every` steps. A
power average of width std at step t weighs the weights of step tau by (g + 1) tau^g / t^(g + 1), where g is a function
of std; the least-squares combination of the snapshots' profiles gives the requested average.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cmtool.checkpoint import load_tensors, read_header, save_model
from cmtool.errors import CheckpointError, ConfigError, UserError
from cmtool.training.averages import power_gamma

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.training.state import TrainState

Array = NDArray[np.float64]
FOLDER = "averages"
_NAME = re.compile(r"step-(\d+)-(\d+)\.safetensors\Z")


@dataclass(frozen=True)
class Snapshot:
    """A power average as it was at a step: its exponent and its file."""

    step: int
    gamma: float
    path: Path


def overlaps(steps: Array, gammas: Array, other_steps: Array, other_gammas: Array) -> Array:
    """Integrals of the product of every two profiles, (n, m): (g + 1)(h + 1) min(t, u)^(g+h+1) / ((g+h+1) t^.. u^..).

    `steps` and `gammas` are (n,) for one side and (m,) for the other. Ratios are taken first: powers of steps would
    overflow.
    """
    t, g = steps[:, None], gammas[:, None]
    u, h = other_steps[None, :], other_gammas[None, :]
    low = np.minimum(t, u)
    return (g + 1) * (h + 1) * (low / t) ** (g + 1) * (low / u) ** (h + 1) / ((g + h + 1) * low)


def combination(snapshots: list[Snapshot], step: int, gamma: float) -> tuple[Array, float]:
    """Return the weights (n,) of the snapshots and the relative error (0 to 1) of their combined profile.

    They minimize the L2 distance between the combined profile and that of (step, gamma).
    """
    steps = np.array([float(s.step) for s in snapshots])
    gammas = np.array([s.gamma for s in snapshots])
    goal = np.array([float(step)]), np.array([gamma])
    matrix = overlaps(steps, gammas, steps, gammas)
    right = overlaps(steps, gammas, *goal)[:, 0]
    weights: Array = np.asarray(np.linalg.lstsq(matrix, right, rcond=1e-13)[0], dtype=np.float64)
    norm = float(overlaps(*goal, *goal)[0, 0])
    left = norm - 2 * float(weights @ right) + float(weights @ matrix @ weights)
    return weights, float(np.sqrt(max(left, 0.0) / norm))


def write_snapshots(state: TrainState, run: Path) -> None:
    """Write every power average of `state` to a file of its own in the run folder."""
    averages = [(state.config.train.ema, state.ema), *zip(state.config.train.extra_emas, state.extra_emas, strict=True)]
    for index, (settings, average) in enumerate(averages):
        if settings.kind == "power":
            path = run / FOLDER / f"step-{state.step:07d}-{index}.safetensors"
            state.export(path, {"average": {"kind": "power", "std": settings.std}}, network=average.network)


def find_snapshots(run: Path) -> list[Snapshot]:
    """Return the snapshots of a run folder in order of step.

    Raises:
        UserError: if the run kept none.
    """
    found = []
    for path in sorted((run / FOLDER).glob("step-*.safetensors")):
        match = _NAME.match(path.name)
        if match:
            found.append(Snapshot(int(match[1]), power_gamma(float(read_header(path)["average"]["std"])), path))
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}.", "cmtool runs lists the runs of a folder.")
    if not found:
        raise UserError(
            f"{run} kept no snapshots of its averages.",
            'train with --set train.snapshot_every=500 and a power average (train.ema.kind = "power")',
        )
    return found


def check_std(std: float) -> None:
    """Refuse a width that no power average can have.

    Raises:
        ConfigError: names the range.
    """
    if not 0 < std < 0.29:
        raise ConfigError(
            f"--std {std:g} is no width of a power average; use a number between 0.01 and 0.25.",
            "e.g. cmtool ema RUN --std 0.05",
        )


def weighted_sum(paths: list[Path], weights: Array) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return sum_i weights[i] * tensors of paths[i], summed in float64, and the header of the last file.

    Raises:
        CheckpointError: if the files belong to different networks.
    """
    total: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        tensors, header = load_tensors(path)
        parts = {name: tensor.double() * float(weight) for name, tensor in tensors.items()}
        if total and total.keys() != parts.keys():
            raise CheckpointError(f"{path} is of another network than the other snapshots.")
        total = {name: part + total[name] if total else part for name, part in parts.items()}
    return {name: tensor.to(tensors[name].dtype) for name, tensor in total.items()}, header


def reconstruct(run: Path, std: float, out: Path) -> dict[str, Any]:
    """Write the model whose weights are the power average of relative width `std` at the run's last snapshot.

    Returns:
        step, number of snapshots, and `error`, the relative error of the profile.

    Raises:
        UserError: if the run has no snapshots, or no power average has that width.
    """
    check_std(std)
    snapshots = find_snapshots(run)
    last = snapshots[-1].step
    weights, error = combination(snapshots, last, power_gamma(std))
    own, header = weighted_sum([snapshot.path for snapshot in snapshots], weights)
    save_model(out, own, {**header, "step": last, "average": {"kind": "power", "std": std, "error": error}})
    return {"model": str(out), "step": last, "snapshots": len(snapshots), "error": error}
