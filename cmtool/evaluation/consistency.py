"""Is a model consistent? Compare its answers along a teacher's trajectories.

Everywhere on one trajectory of the probability-flow ODE, a consistency model should return the same image: the clean
end of that trajectory. Three root-mean-square distances measure how close it comes, and the distance between answers on
unrelated trajectories sets the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cmtool.config.classes import class_map
from cmtool.diffusion.grid import karras_grid
from cmtool.diffusion.solvers import heun_step
from cmtool.errors import DataError
from cmtool.models import Model, beside
from cmtool.rng import SampleStreams
from cmtool.samplers.generate import conditions_for, labels_for

TOGETHER = 64  # trajectories


@dataclass(frozen=True)
class Consistency:
    """Root mean square differences in units of the images ([-1, 1]).

    neighbor: between answers at adjacent levels. far: between the answer at the noisiest level and those at the others.
    end: between answers and the trajectory's end. shuffled: between answers and the end of another trajectory.
    """

    neighbor: float
    far: float
    end: float
    shuffled: float

    def figures(self) -> dict[str, float]:
        """Return the distances by name, and `end` as a share of `shuffled` (0: consistent, 1: unrelated)."""
        named = {f"consistency_{name}": value for name, value in asdict(self).items()}
        return named | {"consistency": self.end / self.shuffled if self.shuffled else 0.0}


@torch.no_grad()
def measure_consistency(model: Model, teacher: Model, count: int = 256, levels: int = 18) -> Consistency:
    """Walk `count` trajectories of the teacher (Heun, Karras grid of `levels`) and query the model at every level.

    Args:
        model: a consistency model.
        teacher: a diffusion model of the same images.
        count: trajectories, at least two; number i starts from the noise of sample i.
        levels: grid points.

    Raises:
        DataError: the two are for images of different shapes, or of different classes.
    """
    if model.image_shape != teacher.image_shape:
        raise DataError(f"the model makes images {model.image_shape} and the teacher {teacher.image_shape} (C, H, W).")
    # At the lowest level the model is the identity, which tells nothing.
    places = class_map(teacher.header["data"], model.header["data"], "the model")
    grid = tuple(reversed(karras_grid(levels, teacher.sigma_min, teacher.sigma_max, teacher.rho)))
    pictures = conditions_for(model, None)
    answers, ends = [], []
    for start in range(0, count, TOGETHER):
        seeds = range(start, min(start + TOGETHER, count))
        streams = SampleStreams(seeds, teacher.device, teacher.dtype)
        label = labels_for(teacher, streams, None)
        known = label if places is None or label is None else torch.tensor(places, device=label.device)[label]
        with beside(None if pictures is None else pictures(seeds).to(teacher.device)):
            asked, end = _walk(model, teacher, streams, grid, label, known if model.num_classes is not None else None)
        answers.append(asked)
        ends.append(end)
    return _distances(torch.cat(answers, dim=1), torch.cat(ends))


def _walk(
    model: Model,
    teacher: Model,
    streams: SampleStreams,
    grid: Sequence[float],
    label: Tensor | None,
    known: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the answers (levels - 1, B, ...) along a batch of trajectories, and the trajectories' ends (B, ...).

    `label` (B,) are the classes as the teacher numbers them, `known` the same as the model does.
    """
    x = grid[0] * streams.normal(teacher.image_shape)
    asked = []
    for level, lower in pairwise(grid):
        t, r = (torch.full((len(x),), value, dtype=x.dtype, device=x.device) for value in (level, lower))
        asked.append(model(x, t, known).float().cpu())
        x = heun_step(lambda y, at: teacher(y, at, label), x, t, r)
    return torch.stack(asked), x.float().cpu()


def _distances(answers: Tensor, ends: Tensor) -> Consistency:
    def rms(difference: Tensor) -> float:
        return float(difference.double().square().mean().sqrt())

    return Consistency(
        neighbor=rms(answers[1:] - answers[:-1]) if len(answers) > 1 else 0.0,
        far=rms(answers[1:] - answers[:1]) if len(answers) > 1 else 0.0,
        end=rms(answers - ends),
        shuffled=rms(answers - ends.roll(1, dims=0)),
    )
