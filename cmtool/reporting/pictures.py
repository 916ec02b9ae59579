"""Pictures of a model for a page: one and two steps from the same noise, and the training images nearest to samples."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmtool.config.schema import DataConfig
from cmtool.data import Dataset, load_dataset, save_scatter, to_nhwc
from cmtool.data.images import compose_grid
from cmtool.errors import UserError
from cmtool.evaluation.memorization import copies
from cmtool.models import Model
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import Guidance, plan_sampling

Bytes = NDArray[np.uint8]
# Samples shown, in rows of ROW; points are so small that fewer than a thousand would say little.
SHOWN, ROW, POINTS = 32, 8, 1000
JUDGED, NEIGHBORS, MOST_REAL = 8, 3, 20_000


@dataclass(frozen=True)
class Picture:
    """A picture inside a page: a data URI with its size in pixels and what it shows."""

    uri: str
    width: int
    height: int
    caption: str


def embed_png(data: bytes, caption: str) -> Picture:
    """Wrap the bytes of a PNG."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        width, height = image.size
    return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height, caption)


def embed_grid(images: Tensor | Bytes, columns: int, caption: str) -> Picture:
    """Lay images out as a grid (see `compose_grid`) and wrap it."""
    grid = compose_grid(images, columns)
    stream = io.BytesIO()
    Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(stream, format="PNG", optimize=True)
    return embed_png(stream.getvalue(), caption)


def _scatter(points: Tensor, caption: str) -> Picture:
    with tempfile.TemporaryDirectory(prefix="cmtool-") as folder:
        return embed_png(save_scatter(points, Path(folder) / "points.png").read_bytes(), caption)


# How a model is guided, and the weak model where there is one.
Guided = tuple[Guidance | None, Model | None]


def _samples(model: Model, steps: int | None, count: int, guided: Guided) -> tuple[Tensor, str]:
    """Samples (count, C, H, W) of the seeds 0 .. count - 1 on the CPU, and in words how they were made."""
    guidance, weak = guided
    plan = replace(plan_sampling(model.header, steps=steps), guidance=guidance)
    x0 = torch.cat([batch.x0.float().cpu() for batch in generate(model, plan, range(count), weak=weak)])
    levels = ", ".join(f"{level:.3g}" for level in plan.times[:4]) + (" ..." if len(plan.times) > 4 else "")
    told = "" if guidance is None else f", guidance {guidance.scale:g}"
    return x0, f"{plan.nfe} evaluation{'s' * (plan.nfe != 1)} (times {levels}{told})"


def step_pictures(model: Model, guided: Guided = (None, None)) -> list[Picture]:
    """Return samples of a consistency model in one step and in two from the same noise (a teacher: its usual steps).

    The one-step image of a seed is placed above its two-step image; points (toy data) give two scatter pictures.
    """
    if model.kind != "consistency":
        count = POINTS if model.float_samples else SHOWN
        x0, how = _samples(model, None, count, guided)
        return [_scatter(x0, how) if model.float_samples else embed_grid(x0, ROW, how)]
    if model.float_samples:
        return [_scatter(*_samples(model, steps, POINTS, guided)) for steps in (1, 2)]
    (one, how_one), (two, how_two) = (_samples(model, steps, SHOWN, guided) for steps in (1, 2))
    rows = [part for start in range(0, SHOWN, ROW) for part in (one[start : start + ROW], two[start : start + ROW])]
    return [embed_grid(torch.cat(rows), ROW, f"rows 1, 3, ...: {how_one}; rows 2, 4, ... below, same noise: {how_two}")]


@dataclass(frozen=True)
class Nearest:
    """Samples next to the training images nearest to them, and whether they look like copies."""

    picture: Picture
    words: str


def nearest_training(model: Model, data: DataConfig, guided: Guided = (None, None)) -> Nearest:
    """Return one-step samples, each followed by the training images nearest to it in pixels.

    Raises:
        UserError: the training images are not on this machine, or the samples are points.
    """
    if model.latent is not None:
        raise UserError("latents are not compared with training images pixel by pixel.")
    if model.float_samples:
        raise UserError("points have no nearest training images to look at.")
    dataset = load_dataset(data)
    real = _some(dataset)
    x0, _ = _samples(model, None, 8 * JUDGED, guided)
    samples = to_nhwc(x0)
    flat, flat_real = (part.reshape(len(part), -1).astype(np.float32) for part in (samples, real))
    judged = copies(flat, flat_real)
    picture = embed_grid(_beside(samples[:JUDGED], real, flat, flat_real), 2 * (1 + NEIGHBORS), "")
    among = f"{len(real):,} of {len(dataset):,}" if len(real) < len(dataset) else f"all {len(real):,}"
    words = (
        f"Each sample (first, fifth, ... of a row) is followed by its {NEIGHBORS} nearest among {among} training "
        f"images, by the distance of pixels. {judged.share:.0%} of {len(samples)} samples lie nearer to a training "
        "image than that image lies to any other; of training images judged the same way, "
        f"{judged.expected:.0%} do."
    )
    return Nearest(picture, words)


def _some(dataset: Dataset) -> Bytes:
    if len(dataset) <= MOST_REAL:
        return to_nhwc(dataset.images)
    # Spread evenly, so that a sorted data set keeps all its classes.
    return to_nhwc(dataset.take(torch.linspace(0, len(dataset) - 1, MOST_REAL).long()))


def _beside(samples: Bytes, real: Bytes, flat: NDArray[np.float32], flat_real: NDArray[np.float32]) -> Bytes:
    distance = torch.cdist(torch.from_numpy(flat[: len(samples)]), torch.from_numpy(flat_real))
    nearest = distance.topk(min(NEIGHBORS, len(real)), dim=1, largest=False).indices.numpy()
    rows: list[Bytes] = []
    for sample, indices in zip(samples, nearest, strict=True):
        rows += [sample, *real[indices]]
    return np.stack(rows)


def grid_pictures(grids: Sequence[tuple[int, Path]], most: int = 24) -> list[tuple[int, Picture]]:
    """Return (step, picture) of a run's sample grids: all, or `most` of them, evenly spread and including both ends."""
    chosen = list(grids)
    if len(chosen) > most:
        chosen = [chosen[round(i * (len(chosen) - 1) / (most - 1))] for i in range(most)]
    found = []
    for step, path in chosen:
        try:
            found.append((step, embed_png(path.read_bytes(), f"step {step:,}")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # a picture that was cut off tells nothing
    return found
