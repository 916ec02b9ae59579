"""From a configuration to a trainer: networks, teacher, starting weights, what the recipe needs, precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtool.checkpoint import load_tensors, resolve_file, save_model
from cmtool.config.combinations import leaves_one_alone, splits_groups
from cmtool.config.headers import which_latents
from cmtool.config.parts import CouplingPart, DirectionPart
from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset
from cmtool.errors import CheckpointError, ConfigError, DataError
from cmtool.files.cache import cache_dir, file_digest
from cmtool.losses.assemble import Supplies, build_objective, direction_of
from cmtool.losses.coupling import Pairs
from cmtool.losses.diagnose import level_density
from cmtool.losses.direction import Reference
from cmtool.machine.world import World
from cmtool.models import Model, build_model, load, model_header, placed
from cmtool.networks.truncated import TruncatedNetwork, doubled
from cmtool.rng import batch_normal, generator
from cmtool.samplers.generate import bind
from cmtool.samplers.plan import misfit
from cmtool.samplers.solvers import Denoise, dpmpp_2m, heun, no_noise
from cmtool.samplers.times import solver_times
from cmtool.schedules.times import LevelDensity, grid_of
from cmtool.training.batches import some_images
from cmtool.training.classes import check_same_classes
from cmtool.training.compiling import compile_all, fuse, put_in_step
from cmtool.training.loop import Trainer
from cmtool.training.precision import settle_precision
from cmtool.training.sharding import Sharding, check_derivative, check_shardable
from cmtool.training.state import TrainState

# Only some recipes use these: a student without them may still start from a model that has them. A model that is never
# told of augmentation is the same without the map of its labels.
OPTIONAL = ("log_variance_head.", "map_augment.", "augment_gain")
# Images computed at once when pairs are made, and images that the discrepancy is measured with.
CHUNK, MEASURED = 256, 2048


def load_teacher(path: str | Path, config: RunConfig, device: torch.device) -> Model:
    """Load the diffusion model that a distillation follows.

    Raises:
        CheckpointError: if it is missing, not a diffusion model, or of another shape.
    """
    teacher = load(path, device)
    if teacher.kind != "diffusion":
        raise CheckpointError(
            f"{path} is a {teacher.kind} model; a teacher must be a diffusion model.",
            f"cmtool train-edm --preset {config.preset} makes one",
        )
    return teacher


def weak_teacher(config: RunConfig, dataset: Dataset, student: Model, device: torch.device) -> Model | None:
    """Load the worse model that a student's teacher is guided away from; None if the recipe names none.

    Raises:
        CheckpointError: if it is missing, or no diffusion model of the same images and classes.
    """
    path = config.recipe.direction.weak
    if path is None:
        return None
    weak = load(path, device)
    if reason := misfit(weak.header, student.header["data"]):
        raise CheckpointError(f"{path} cannot be the weak model: {reason}.", "name a smaller or earlier teacher")
    check_same_classes(dataset, weak.header["data"], f"the weak model {path}")
    return weak


def fresh_student(config: RunConfig, dataset: Dataset) -> Model:
    """Build the student with weights that are a function of the seed.

    Raises:
        DataError: if the preset wants labels and the data has none.
    """
    classes = dataset.num_classes if config.data.labels else None
    if config.data.labels and classes is None:
        raise DataError("the preset wants class labels and the data has none.", "--set data.labels=false")
    names = list(dataset.class_names) if classes and dataset.class_names else None
    found = {"fingerprint": dataset.fingerprint, "source": dataset.info.source}
    header = model_header(config, num_classes=classes, class_names=names, holdout=dataset.held_below, **found)
    if dataset.latent is not None:
        if config.recipe.augment.p > 0:
            raise ConfigError("recipe.augment turns pictures, and these are latents.", "--set recipe.augment.p=0")
        header["data"]["latent"] = dict(dataset.latent)
    return build_model(header)


def check_same_latents(own: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, name: str | Path) -> None:
    """Refuse a model that works on pictures where the data are latents, or on other latents, and the reverse.

    Raises:
        CheckpointError: one sentence.
    """
    if which_latents(own) != which_latents(theirs):
        what = [
            "pictures" if latent is None else f"latents of {latent['autoencoder']} ({latent['norm']}, {latent['hash']})"
            for latent in (theirs, own)
        ]
        hint = "name another model, or with --data what that one was trained on"
        raise CheckpointError(f"the model {name} works on {what[0]}, and the data are {what[1]}.", hint)


def start_from(student: Model, source: Model) -> None:
    """Copy the weights of `source` into `student`; parts that `source` lacks keep their fresh weights.

    Raises:
        CheckpointError: if a tensor's shape differs, or `source` holds tensors that the student lacks.
    """
    theirs, own = source.network.state_dict(), student.network.state_dict()
    if isinstance(student.network, TruncatedNetwork) and not isinstance(source.network, TruncatedNetwork):
        theirs = doubled(theirs)
    theirs = {
        name: tensor
        for name, tensor in theirs.items()
        if name in own or not name.removeprefix("early.").removeprefix("late.").startswith(OPTIONAL)
    }
    wrong = [name for name, tensor in theirs.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"the model to start from has another network: {len(wrong)} tensors differ, first {wrong[0]}."
        )
    student.network.load_state_dict(theirs, strict=False)


def fake_network(config: RunConfig, teacher: Model | None) -> Model | None:
    """Return the fake network of score distillation as it starts: the teacher, to be trained; None if there is none.

    If samples are made at several noise levels, it takes theirs as a second time.
    """
    score = config.recipe.score
    if score.kind == "none" or teacher is None:
        return None
    network = teacher.header["network"] | {"two_time": len(score.levels) > 1}
    fake = build_model(teacher.header | {"network": network})
    start_from(fake, teacher)
    return fake


def prepare(config: RunConfig, dataset: Dataset, device: torch.device, world: World | None = None) -> Trainer:
    """Build everything that `config` describes and return a trainer at step 0.

    `config` names the teacher and the starting weights that its recipe needs (`training.inherit.check_needs`).

    Raises:
        UserError: for anything that a user can get wrong about teacher, starting weights, labels or precision.
    """
    check_rows(config, world or World())
    sharding = _sharding(config, device, world)
    precision = settle_precision(config, device)
    student = fresh_student(config, dataset)
    teacher = load_teacher(config.teacher, config, device) if config.teacher else None
    source = load(config.init) if config.init else teacher
    for model, name in ((teacher, config.teacher), (source, config.init)):
        if model is not None and name is not None:
            check_same_classes(dataset, model.header["data"], f"the model {name}")
            check_same_latents(dataset.latent, model.latent, name)
    if source is not None:
        start_from(student, source)
    # A network that will be split stays in main memory until then: it may not fit the device in one piece.
    student = precision.apply(student if sharding else placed(student, device, config.train.compile))
    fake = fake_network(config, teacher)
    if fake is not None:
        fake = precision.apply(fake if sharding else placed(fake, device, config.train.compile))
    if teacher is not None:
        teacher = placed(precision.apply_to_teacher(teacher), device, config.train.compile)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision.tf32
    weak = weak_teacher(config, dataset, student, device)
    if weak is not None:
        weak = placed(precision.apply_to_teacher(weak), device, config.train.compile)
    frozen = [model for model in (teacher, weak) if model is not None]
    fused = fuse(config, device, [model for model in (student, fake, *frozen) if model is not None])
    objective = build_objective(config, supplies=gather(config, dataset, device, teacher, weak))
    if sharding is not None:
        for model in frozen:
            sharding.apply(model.network)
    state = TrainState(config, student, sharding, precision.name, fake)
    trainer = Trainer(config, state, objective, dataset, teacher, world)
    passes = min(trainer.micro, max(trainer.world.rows(config.train.batch_size)[1], 1))
    compiled = compile_all(config, state, frozen, passes)
    told = [precision.describe(), *fused, *put_in_step(config, student), *compiled]
    trainer.notes = [*told, *_said(config, trainer.world)]
    trainer.nets = replace(trainer.nets, frozen=frozen_predictor(config.recipe.coupling, dataset, device))
    return trainer


def level_law(config: RunConfig, dataset: Dataset, device: torch.device) -> LevelDensity | None:
    """Return the law of noise levels measured on the images; None if the recipe uses another one."""
    part = config.recipe.times
    if part.kind != "discrepancy":
        return None
    return level_density(
        some_images(config, dataset, device, MEASURED)[0], config.process, part.floor, config.train.seed
    )


def reference_images(config: RunConfig, dataset: Dataset, device: torch.device) -> Reference | None:
    """Return the images that a posterior mean runs over, all or as many as the recipe says; None if there is none.

    They include mirrored copies if training mirrors images.
    """
    part = direction_of(config)
    if part.kind != "posterior_mean" or part.pool == "batch":
        return None
    images, labels = some_images(config, dataset, device, part.reference)
    return Reference(images, labels, whole=not 0 < part.reference < len(dataset))


def gather(
    config: RunConfig, dataset: Dataset, device: torch.device, teacher: Model | None, weak: Model | None = None
) -> Supplies:
    """Return everything that the recipe's parts need besides settings.

    Raises:
        ConfigError: for guidance that the teacher cannot give.
    """
    recipe = config.recipe
    check_guidance(recipe.direction, teacher)
    check_augment(config, teacher)
    density = level_law(config, dataset, device)
    reference = reference_images(config, dataset, device)
    return Supplies(teacher, reference, stored_pairs(recipe.coupling, config, teacher), density, weak)


def check_guidance(part: DirectionPart, teacher: Model | None) -> None:
    """Refuse guidance by a teacher that never saw an image without its label.

    Raises:
        ConfigError: names the setting that trains a suitable teacher.
    """
    if part.weak is None and part.guidance != 1 and teacher is not None and not teacher.header.get("label_dropout"):
        raise ConfigError(
            "guidance needs a teacher trained with dropped labels, and this one was not.",
            "cmtool train-edm ... --set train.label_dropout=0.1",
        )


def check_augment(config: RunConfig, teacher: Model | None) -> None:
    """Refuse to augment a student's images if its teacher cannot be told how.

    Raises:
        ConfigError: names the setting that trains a suitable teacher, and the one that does without.
    """
    wanted, knows = config.recipe.augment.labels, getattr(teacher and teacher.network, "augment_labels", 0)
    if teacher is not None and wanted and knows != wanted:
        has = f"knows {knows} labels of another one" if knows else "was trained without"
        raise ConfigError(
            f"recipe.augment changes the student's images, and the teacher {has}: it would be led astray.",
            "leave it out with --set recipe.augment.p=0, or train the teacher with the same recipe.augment",
        )


def _pairs_file(part: CouplingPart, config: RunConfig) -> Path:
    solved = f"{config.recipe.times.kind} {config.recipe.curriculum.s1}" if part.path else f"{part.solver_steps} steps"
    given = f"{config.teacher}|{config.train.seed}|{part.pairs}|{solved}|{config.train.precision}"
    key = hashlib.blake2b(given.encode(), digest_size=8)
    key.update(file_digest(resolve_file(str(config.teacher)), "blake2b").encode())
    return cache_dir() / "pairs" / f"{key.hexdigest()}.safetensors"


@torch.no_grad()
def make_pairs(part: CouplingPart, config: RunConfig, teacher: Model) -> dict[str, Tensor]:
    """Solve the teacher's ODE from `part.pairs` draws of noise; return the tensors of `Pairs` by name.

    Paths are solved along the grid of the times, from sigma_max to sigma_min, and stored above that end.
    """
    seed, count, shape = config.train.seed, part.pairs, teacher.image_shape
    noisy = teacher.sigma_max * batch_normal((count, *shape), seed, "pairs-noise")
    labels = None
    if teacher.num_classes is not None:
        labels = torch.randint(teacher.num_classes, (count,), generator=generator(seed, "pairs-labels"))
    times = solver_times(part.solver_steps, teacher.sigma_min, teacher.sigma_max, teacher.rho)
    if part.path:
        times = tuple(grid_of(config.recipe.times, config.recipe.curriculum.s1, config.process).flip(0).tolist())
    stored = times[:-1] if part.path else times[:1]
    clean, points = [], []
    for first in range(0, count, CHUNK):
        x = noisy[first : first + CHUNK].to(teacher.device, teacher.dtype)
        label = None if labels is None else labels[first : first + CHUNK].to(teacher.device)
        solver = _Watched(bind(teacher, label, clamp=teacher.clamps))
        clean.append((dpmpp_2m if part.path else heun)(solver, x, (*times, 0.0), no_noise).float().cpu())
        points.append(torch.stack(solver.seen[: len(stored)], 1).float().cpu())
    found = {"noisy": torch.cat(points), "clean": torch.cat(clean), "levels": torch.tensor(stored)}
    return found if labels is None else {**found, "labels": labels}


class _Watched:
    """A denoiser that keeps the points it is asked about: those of the path, if its solver asks once a step."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        self.seen.append(x)
        return self._denoise(x, t, r)


def stored_pairs(part: CouplingPart, config: RunConfig, teacher: Model | None) -> Pairs | None:
    """Return the teacher's pairs, from the cache if they were made before; None if the coupling needs none."""
    if part.kind != "teacher" or teacher is None:
        return None
    path = _pairs_file(part, config)
    try:
        tensors = load_tensors(path)[0]
    except CheckpointError:
        tensors = make_pairs(part, config, teacher)
        save_model(path, tensors, {"kind": "pairs", "teacher": str(config.teacher)})
    on = {name: tensor.to(teacher.device) for name, tensor in tensors.items()}
    return Pairs(on["noisy"], on["clean"], on.get("labels"), on["levels"])


def frozen_predictor(part: CouplingPart, dataset: Dataset, device: torch.device) -> Model | None:
    """Return the frozen model that the generator coupling needs, of the classes of the data; None if it needs none."""
    if part.kind != "generator" or part.predictor != "frozen" or part.model is None:
        return None
    predictor = load(part.model, device)
    check_same_classes(dataset, predictor.header["data"], f"the predictor {part.model}")
    return predictor


def check_rows(config: RunConfig, world: World) -> None:
    """Refuse a batch that leaves a process without images or parts a group, or optimal transport of a single image.

    Raises:
        ConfigError: names a batch that fits.
    """
    batch, size = config.train.batch_size, world.size
    if batch < size:
        raise ConfigError(
            f"train.batch_size = {batch} leaves some of the {size} processes without an image.",
            f"use --batch-size {size} or more, or fewer processes",
        )
    least, most = batch // size, -(-batch // size)
    micro = config.train.micro_batch if isinstance(config.train.micro_batch, int) else most
    group = config.recipe.times.group
    if any(splits_groups(World(rank, size).rows(batch)[1], micro, group) for rank in range(size)):
        raise ConfigError(
            f"recipe.times.group = {group} images stay in one process: {batch} over {size} processes by {micro} part "
            "a group.",
            f"use --batch-size {group * size * -(-batch // (group * size))}, with --micro-batch a multiple of {group}",
        )
    if config.recipe.coupling.kind == "ot" and any(leaves_one_alone(n, micro) for n in (least, most)):
        raise ConfigError(
            f"optimal transport needs at least 2 images in every forward pass: {batch} over {size} "
            f"{'processes' if size > 1 else 'process'} by {micro} leave one alone.",
            f"use --batch-size {2 * size * -(-batch // (2 * size))}, or another --micro-batch",
        )


def _sharding(config: RunConfig, device: torch.device, world: World | None) -> Sharding | None:
    """Return the object that splits a run's networks over its processes; None if nothing is split."""
    if not config.train.shard or world is None or world.size == 1:
        return None
    check_shardable(config.train.batch_size, world)
    check_derivative(config.recipe.target)
    return Sharding(world, device)


def _said(config: RunConfig, world: World) -> list[str]:
    notes = []
    if config.train.shard and world.size == 1:
        notes.append("train.shard: a single process has nobody to share with; the run is an ordinary one.")
    elif config.train.shard:
        notes.append(f"weights, averages and optimizer are split over {world.size} processes.")
    direction = direction_of(config)
    if direction != config.recipe.direction:
        notes.append("only an image itself has its picture of data.condition: the mean over images is that image.")
    among = config.recipe.coupling.kind == "ot" or (direction.kind, direction.pool) == ("posterior_mean", "batch")
    if among and world.size > 1:
        notes.append(
            "this recipe looks at the images that share a forward pass: another number of processes trains otherwise."
        )
    return notes


def spread(images: Tensor) -> float:
    """Return how much images (B, ...) differ: the standard deviation over the batch, averaged over all values."""
    return float(images.float().std(dim=0).mean())


def collapsed(samples: Tensor, real: Tensor) -> bool:
    """Whether samples differ far less from one another than real images do, which no loss shows."""
    return spread(samples) < 0.3 * spread(real)
