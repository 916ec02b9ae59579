"""The network behind a distance in learned features: trained once on a run's own images, kept in the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from cmtool.checkpoint import load_tensors, save_model
from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset
from cmtool.data.disturb import disturbed, labels_of
from cmtool.errors import CheckpointError, ConfigError
from cmtool.files.cache import cache_dir
from cmtool.losses.aligned import Features
from cmtool.machine.device import one_thread
from cmtool.machine.world import World
from cmtool.rng import derive, same_dropout
from cmtool.training.batches import batch_indices, flip_mask

# Images a step, the probability of every change, and Adam's rate, which rises and falls once.
BATCH, CHANCE, RATE = 32, 0.15, 4e-3


def learned_features(
    config: RunConfig, dataset: Dataset, device: torch.device, world: World | None = None
) -> Features | None:
    """Return the network of the distance "align", trained, on `device`; None if the recipe has another distance.

    The first process trains it, or finds it in the cache, and hands it to the others.

    Raises:
        ConfigError: if the data are latents, which cannot be turned or recolored.
    """
    if config.recipe.distance.kind != "align":
        return None
    if dataset.latent is not None:
        raise ConfigError(
            "recipe.distance.kind = 'align' turns and recolors pictures, and these are latents.",
            "take another distance: --set recipe.distance.kind=pseudo_huber",
        )
    world = world or World()
    network = _fresh(config).to(device)
    tensors = world.gather(_kept(network, config, dataset, device) if world.main else None)[0]
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def _fresh(config: RunConfig) -> Features:
    data = config.data
    with same_dropout(derive(config.train.seed, "features")):
        return Features(data.channels, data.resolution, labels_of(data.channels))


def _file(config: RunConfig, dataset: Dataset) -> Path:
    said = f"{dataset.fingerprint}|{config.data.model_dump_json()}|{config.train.seed}|{config.recipe.distance.lessons}"
    return cache_dir() / "aligned" / f"{hashlib.blake2b(said.encode(), digest_size=8).hexdigest()}.safetensors"


def _kept(network: Features, config: RunConfig, dataset: Dataset, device: torch.device) -> dict[str, Tensor]:
    """Return the trained weights on the CPU, from the cache if they were made before."""
    path = _file(config, dataset)
    try:
        return load_tensors(path)[0]
    except CheckpointError:
        with one_thread():
            train_features(network, config, dataset, device)
    tensors = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    save_model(path, tensors, {"kind": "features", "images": dataset.fingerprint})
    return tensors


def train_features(network: Features, config: RunConfig, dataset: Dataset, device: torch.device) -> None:
    """Teach the network to read from an image how it was changed; everything drawn is a function of the run's seed."""
    seed, steps = derive(config.train.seed, "features"), config.recipe.distance.lessons
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for step in range(steps):
        images = dataset.batch(batch_indices(seed, step, BATCH, len(dataset)), device)[0]
        if config.data.flip:
            flips = flip_mask(seed, step, BATCH).to(device)
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        changed, told = disturbed(images, CHANCE, seed, step)
        loss = (network(changed) - told).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
