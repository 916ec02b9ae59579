"""What some recipes need besides settings: reference images, stored teacher pairs, a measured law of noise levels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from cmtool.checkpoint import load_tensors, resolve_file, save_model
from cmtool.config.parts import CouplingPart, DirectionPart
from cmtool.config.schema import RunConfig
from cmtool.data.cache import cache_dir, file_digest
from cmtool.data.dataset import Dataset
from cmtool.errors import CheckpointError, ConfigError
from cmtool.losses.coupling import Pairs
from cmtool.losses.diagnose import level_density
from cmtool.losses.direction import Reference
from cmtool.losses.recipes import Supplies
from cmtool.models import Model, load
from cmtool.rng import batch_normal, generator
from cmtool.samplers.generate import bind
from cmtool.samplers.solvers import heun, no_noise
from cmtool.samplers.times import solver_times

# Images at once when pairs are made.
CHUNK = 256
# Images that the discrepancy is measured with.
MEASURED = 2048


def reference_images(
    part: DirectionPart, config: RunConfig, dataset: Dataset, device: torch.device
) -> Reference | None:
    """Return the images that a posterior mean runs over: all, or `part.reference` of them drawn by the seed.

    Mirrored copies are added where training mirrors images.
    """
    if part.kind != "posterior_mean" or part.pool == "batch":
        return None
    return some_images(config, dataset, device, part.reference)


def some_images(config: RunConfig, dataset: Dataset, device: torch.device, limit: int) -> Reference:
    """Return `limit` images (0: all) drawn by the seed, with mirrored copies where training mirrors images."""
    count = len(dataset)
    if 0 < limit < count:
        chosen = torch.randperm(count, generator=generator(config.train.seed, "reference"))[:limit]
    else:
        chosen = torch.arange(count)
    images, labels = dataset.batch(chosen)
    if config.data.flip:
        images = torch.cat([images, images.flip(-1)])
        labels = None if labels is None else torch.cat([labels, labels])
    kinds = labels.to(device) if labels is not None and config.data.labels else None
    return Reference(images.to(device), kinds, whole=len(chosen) == count)


def check_guidance(part: DirectionPart, teacher: Model | None) -> None:
    """Refuse guidance by a teacher that never saw an image without its label.

    Raises:
        ConfigError: with the setting that trains such a teacher.
    """
    if part.guidance != 1 and teacher is not None and not teacher.header.get("label_dropout"):
        raise ConfigError(
            "guidance needs a teacher trained with dropped labels, and this one was not.",
            "cmtool train-edm ... --set train.label_dropout=0.1",
        )


def _pairs_file(part: CouplingPart, config: RunConfig) -> Path:
    given = f"{config.teacher}|{config.train.seed}|{part.pairs}|{part.solver_steps}|{config.train.precision}"
    key = hashlib.blake2b(given.encode(), digest_size=8)
    key.update(file_digest(resolve_file(str(config.teacher)), "blake2b").encode())
    return cache_dir() / "pairs" / f"{key.hexdigest()}.safetensors"


@torch.no_grad()
def make_pairs(part: CouplingPart, config: RunConfig, teacher: Model) -> dict[str, Tensor]:
    """Solve the teacher's ODE from `part.pairs` draws of noise; return noisy, clean and, if it has classes, labels."""
    seed, count, shape = config.train.seed, part.pairs, teacher.image_shape
    noisy = teacher.sigma_max * batch_normal((count, *shape), seed, "pairs-noise")
    labels = None
    if teacher.num_classes is not None:
        labels = torch.randint(teacher.num_classes, (count,), generator=generator(seed, "pairs-labels"))
    times = solver_times(part.solver_steps, teacher.sigma_min, teacher.sigma_max, teacher.rho)
    clean = []
    for first in range(0, count, CHUNK):
        x = noisy[first : first + CHUNK].to(teacher.device, teacher.dtype)
        label = None if labels is None else labels[first : first + CHUNK].to(teacher.device)
        denoise = bind(teacher, label, clamp=not teacher.float_samples)
        clean.append(heun(denoise, x, (*times, 0.0), no_noise).float().cpu())
    found = {"noisy": noisy, "clean": torch.cat(clean)}
    return found if labels is None else {**found, "labels": labels}


def stored_pairs(part: CouplingPart, config: RunConfig, teacher: Model | None) -> Pairs | None:
    """Return the teacher's pairs, from the cache if they were made before; None where the coupling needs none."""
    if part.kind != "teacher" or teacher is None:
        return None
    path = _pairs_file(part, config)
    try:
        tensors = load_tensors(path)[0]
    except CheckpointError:
        tensors = make_pairs(part, config, teacher)
        save_model(path, tensors, {"kind": "pairs", "teacher": str(config.teacher)})
    on = {name: tensor.to(teacher.device) for name, tensor in tensors.items()}
    return Pairs(on["noisy"], on["clean"], on.get("labels"), teacher.sigma_max)


def frozen_predictor(part: CouplingPart, device: torch.device) -> Model | None:
    """Return the frozen model that the generator coupling asks for; None where it asks for none."""
    if part.kind != "generator" or part.predictor != "frozen" or part.model is None:
        return None
    return load(part.model, device)


def gather(config: RunConfig, dataset: Dataset, device: torch.device, teacher: Model | None) -> Supplies:
    """Return everything that the recipe's parts ask for.

    Raises:
        ConfigError: for guidance that the teacher cannot give.
    """
    recipe = config.recipe
    check_guidance(recipe.direction, teacher)
    density = None
    if recipe.times.kind == "discrepancy":
        images = some_images(config, dataset, device, MEASURED).images
        density = level_density(images, config.process, recipe.times.floor, config.train.seed)
    reference = reference_images(recipe.direction, config, dataset, device)
    return Supplies(teacher, reference, stored_pairs(recipe.coupling, config, teacher), density)
