"""Pictures of a run in progress: a grid of the sampling average's samples, always from the same seeds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cmtool.config.schema import RunConfig
from cmtool.data.images import save_grid, save_scatter
from cmtool.models import Model
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling

# Pictures in a grid, points in a scatter plot.
GRID, CLOUD = 64, 2000


def preview(model: Model, count: int, seed: int = 0) -> Tensor:
    """Return `count` samples (count, C, H, W) on the CPU: in one step, or in 18 Heun steps for a teacher."""
    plan = plan_sampling(model.header)
    seeds = range(seed, seed + count)
    return torch.cat([batch.x0.float().cpu() for batch in generate(model, plan, list(seeds))])


def write_preview(model: Model, path: Path, config: RunConfig, step: int, points: bool) -> Tensor:
    """Write a grid of samples (for points a scatter plot) to `path`; return the samples (count, C, H, W)."""
    samples = preview(model, CLOUD if points else GRID)
    if points:
        save_scatter(samples, path)
    else:
        save_grid(samples, path, text={"preset": config.preset, "recipe": config.recipe_name, "step": step})
    return samples
