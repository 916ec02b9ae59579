"""From a configuration to a trainer: networks, teacher, starting weights, reference images, precision."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cmtool.config.combinations import leaves_one_alone
from cmtool.config.schema import RunConfig, TrainConfig
from cmtool.data.dataset import Dataset
from cmtool.errors import CheckpointError, ConfigError, DataError, UserError
from cmtool.losses.recipes import build_objective
from cmtool.memory import keep_freed_memory
from cmtool.models import Model, build_model, load, model_header, placed
from cmtool.networks.convolution import hold_in
from cmtool.networks.truncated import TruncatedNetwork, doubled
from cmtool.training.classes import check_same_classes
from cmtool.training.compiling import compile_all
from cmtool.training.distributed import World
from cmtool.training.inherit import check_needs
from cmtool.training.loop import Trainer
from cmtool.training.precision import HALF, settle_precision
from cmtool.training.sharding import Sharding, check_derivative, check_shardable
from cmtool.training.state import TrainState
from cmtool.training.supplies import frozen_predictor, gather

# A head that only some recipes use: a student without it starts from a model with it all the same.
OPTIONAL = "log_variance_head."


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that `name` means: "auto" takes cuda, then mps, then cpu; of several GPUs the `local_rank`-th.

    Raises:
        UserError: for an unknown device, or one that this machine lacks.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind = name.split(":")[0]
    if kind not in there:
        raise UserError(f"unknown device '{name}'; choose auto, cpu, cuda or mps.")
    if not there[kind]:
        raise UserError(f"this machine has no usable {kind} device.", "use --device cpu, or leave --device out")
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    return torch.device(name)


def set_up_torch(train: TrainConfig) -> None:
    """Apply the settings of the whole process: CPU threads, deterministic algorithms, memory that is kept."""
    keep_freed_memory()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def apply_precision(model: Model, precision: str) -> Model:
    """Set how a model computes: fp64 in double, bf16 and fp16 by autocast around the network, else float32.

    The scalings, the time embedding, the first and the last convolution stay in float32 for half precisions. For
    models that are used, not trained: a half rounds their weights for good.
    """
    if precision == "fp64":
        return model.double()
    half = HALF.get(precision)
    model.autocast = half
    if half is not None:
        hold_in(model.network, half)
    return model


def load_teacher(path: str | Path, config: RunConfig, device: torch.device) -> Model:
    """Load the diffusion model that a distillation follows.

    Raises:
        CheckpointError: if it is missing, no diffusion model, or of another shape.
    """
    teacher = load(path, device)
    if teacher.kind != "diffusion":
        raise CheckpointError(
            f"{path} is a {teacher.kind} model; a teacher must be a diffusion model.",
            f"cmtool train-edm --preset {config.preset} makes one",
        )
    return teacher


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
    header = model_header(config, num_classes=classes, class_names=names, **found)
    return build_model(header)


def start_from(student: Model, source: Model) -> None:
    """Copy the weights of `source` into `student`; parts that `source` lacks keep their fresh weights.

    Raises:
        CheckpointError: if a tensor's shape differs, or `source` holds tensors that the student lacks.
    """
    theirs, own = source.network.state_dict(), student.network.state_dict()
    if isinstance(student.network, TruncatedNetwork) and not isinstance(source.network, TruncatedNetwork):
        theirs = doubled(theirs)
    theirs = {name: tensor for name, tensor in theirs.items() if name in own or not name.startswith(OPTIONAL)}
    wrong = [name for name, tensor in theirs.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"the model to start from has another network: {len(wrong)} tensors differ, first {wrong[0]}."
        )
    student.network.load_state_dict(theirs, strict=False)


def prepare(config: RunConfig, dataset: Dataset, device: torch.device, world: World | None = None) -> Trainer:
    """Build everything that `config` describes and return a trainer at step 0.

    Raises:
        UserError: whatever a user can have got wrong about teacher, starting weights, labels or precision.
    """
    check_needs(config)
    check_rows(config, world or World())
    sharding = _sharding(config, device, world)
    precision = settle_precision(config, device)
    student = fresh_student(config, dataset)
    teacher = load_teacher(config.teacher, config, device) if config.teacher else None
    source = teacher if teacher is not None else load(config.init) if config.init else None
    if source is not None:
        check_same_classes(dataset, source.header["data"], f"the model {config.teacher or config.init}")
        start_from(student, source)
    # What is to be split stays in the machine's memory until then: whole, it may not fit the device.
    student = precision.apply(student if sharding else placed(student, device, config.train.compile))
    if teacher is not None:
        teacher = placed(precision.apply_to_teacher(teacher), device, config.train.compile)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision.tf32
    objective = build_objective(config, supplies=gather(config, dataset, device, teacher))
    if sharding is not None and teacher is not None:
        sharding.apply(teacher.network)
    state = TrainState(config, student, sharding, precision.name)
    trainer = Trainer(config, state, objective, dataset, teacher, world)
    passes = min(trainer.micro, max(trainer.world.rows(config.train.batch_size)[1], 1))
    trainer.notes = [precision.describe(), *compile_all(config, state, teacher, passes), *_said(config, trainer.world)]
    frozen = frozen_predictor(config.recipe.coupling, device)
    if frozen is not None:
        check_same_classes(dataset, frozen.header["data"], f"the predictor {config.recipe.coupling.model}")
    trainer.nets = replace(trainer.nets, frozen=frozen)
    return trainer


def check_rows(config: RunConfig, world: World) -> None:
    """Refuse a batch that leaves a process without images, or optimal transport a pass with a single one.

    Raises:
        ConfigError: with a batch that fits.
    """
    batch, size = config.train.batch_size, world.size
    if batch < size:
        raise ConfigError(
            f"train.batch_size = {batch} leaves some of the {size} processes without an image.",
            f"use --batch-size {size} or more, or fewer processes",
        )
    least, most = batch // size, -(-batch // size)
    micro = config.train.micro_batch if isinstance(config.train.micro_batch, int) else most
    if config.recipe.coupling.kind == "ot" and any(leaves_one_alone(n, micro) for n in (least, most)):
        raise ConfigError(
            f"optimal transport needs at least 2 images in every forward pass: {batch} over {size} "
            f"{'processes' if size > 1 else 'process'} by {micro} leave one alone.",
            f"use --batch-size {2 * size * -(-batch // (2 * size))}, or another --micro-batch",
        )


def _sharding(config: RunConfig, device: torch.device, world: World | None) -> Sharding | None:
    """Return what splits the networks of a run over its processes; None where nothing is split."""
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
    direction = config.recipe.direction
    among = config.recipe.coupling.kind == "ot" or (direction.kind, direction.pool) == ("posterior_mean", "batch")
    if among and world.size > 1:
        notes.append(
            "this recipe looks at the images that share a forward pass: another number of processes trains otherwise."
        )
    return notes


def spread(images: Tensor) -> float:
    """Standard deviation over a batch (B, ...), averaged over the values of an image: how much images differ."""
    return float(images.float().std(dim=0).mean())


def collapsed(samples: Tensor, real: Tensor) -> bool:
    """Whether samples differ from one another far less than real images do: a loss cannot show this."""
    return spread(samples) < 0.3 * spread(real)
