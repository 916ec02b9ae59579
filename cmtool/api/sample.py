"""Samples of a model: decided without torch, made in memory or into a file, by one process or several together.

Sample i depends on its seed and label alone, so that neither batches nor processes change it. What goes to a folder or
an .npz survives a kill, and the same request continues it.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from cmtool.api.choose import check_condition, choose_labels, choose_seeds, is_latent
from cmtool.api.find import FoundModel, find_model, load_model
from cmtool.errors import UsageError, UserError, unknown
from cmtool.files.atomic import check_place
from cmtool.machine.launch import in_world
from cmtool.samplers.plan import SAMPLERS, SamplePlan, check_request, plan_guidance, plan_sampling
from cmtool.talk import SILENCE, Talk
from cmtool.units import format_ints

if TYPE_CHECKING:
    from cmtool.data.sample_files import Sink
    from cmtool.machine.world import World
    from cmtool.models import Model
    from cmtool.samplers.generate import Conditions

IMAGES = 64
# A scatter picture of 64 points shows nothing.
POINTS = 2000
# Values (C x H x W x images) that a batch holds by default: about 64 MiB of activations for the small networks.
BATCH_VALUES = 2**18
# A grid of more pictures than this is larger than programs open or eyes can take in.
LARGEST_GRID = 10_000
OutKind = Literal["picture", "npz", "folder"]
Quantize = Literal["round", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Which samples are wanted.

    Attributes:
        num: how many; None: as many as `seeds`, else 64 (2000 points).
        steps: evaluations of an image (a teacher: solver steps); or `times` names the noise levels of all of them, or
            `indices` those of a published grid `of` so many points.
        sampler: None: the usual one of the model.
        labels: classes by name or number that take turns, or "all"; None: each is drawn from its seed.
        seed: `seed=N` means the seeds N * 1,000,000 and up; None is 0.
        seeds: one for each sample, in place of `num` and `seed`.
        guidance: scale of guidance, for a teacher or a guided network; None: none.
        interval: the noise levels that are guided; None: all.
        weak: a worse teacher that a teacher is guided away from, in place of its answer to no label.
    """

    num: int | None = None
    steps: int | None = None
    times: Sequence[float] | None = None
    indices: Sequence[int] | None = None
    of: int | None = None
    sampler: str | None = None
    labels: Sequence[str | int] | None = None
    seed: int | None = None
    seeds: Sequence[int] | None = None
    guidance: float | None = None
    interval: Sequence[float] | None = None
    weak: str | None = None

    def plan(self, header: Mapping[str, Any], talk: Talk | None = None) -> SamplePlan:
        """Return sampler, noise levels and guidance for the model of a header; raises `UserError`."""
        plan = plan_sampling(
            header, sampler=self.sampler, steps=self.steps, times=self.times, indices=self.indices, of=self.of
        )
        weak = None
        if self.weak is not None:
            found = find_model(self.weak, wanted="weak model", option="--weak", output=talk)
            weak = str(found.path), found.header
        return replace(plan, guidance=plan_guidance(header, self.guidance, self.interval, weak))

    def seeds_and_labels(self, header: Mapping[str, Any]) -> tuple[Sequence[int], list[int] | None]:
        """Return a seed, and a class where some are named, for each sample; raises `UserError`."""
        data = header["data"]
        points = data.get("float_samples") and not is_latent(header)
        seeds = choose_seeds(self.num, self.seed, self.seeds, POINTS if points else IMAGES)
        chosen = choose_labels(self.labels, data.get("num_classes"), data.get("class_names"))
        return seeds, None if chosen is None else [chosen[index % len(chosen)] for index in range(len(seeds))]


@dataclass(frozen=True)
class Job:
    """Samples to be made into a file: all that is decided before torch is imported.

    `grid` frames a single picture too; `command` is what the files say of how they were asked for.
    """

    found: FoundModel
    plan: SamplePlan
    seeds: Sequence[int]
    labels: list[int] | None
    out: Path
    quantize: Quantize
    precision: str
    grid: bool = False
    command: str = ""
    condition: Path | None = None

    @property
    def is_points(self) -> bool:
        """Whether samples are points and stay floats."""
        return bool(self.found.header["data"].get("float_samples"))

    def request(self) -> dict[str, Any]:
        """What must agree for an interrupted job to be continued."""
        return {
            "model_hash": self.found.digest,
            "sampler": self.plan.sampler,
            "times": list(self.plan.times),
            "seeds": format_ints(self.seeds),
            "labels": self.labels,
            "quantize": None if self.is_points else self.quantize,
            "precision": self.precision,
            **({"condition": str(self.condition)} if self.condition else {}),
            **({} if self.plan.guidance is None else self.plan.guidance.request()),
        }

    def conditions(self) -> Conditions | None:
        """The pictures that were named for a conditioned model; None: those of its own data, or it takes none."""
        if self.condition is None:
            return None
        from cmtool.data.condition import picture_conditions

        return picture_conditions(self.condition, self.found.header["data"])

    def meta(self) -> dict[str, Any]:
        """What a sample file says of itself."""
        from cmtool.version import __version__

        return {
            **self.request(),
            "class_names": self.found.header["data"].get("class_names"),
            "model": str(self.found.path),
            "nfe": self.plan.nfe,
            "cmtool": __version__,
            "command": self.command,
        }


@dataclass(frozen=True)
class Made:
    """Where the samples of a job are, how many were there before, and the seconds that the others took.

    `signal` is the one that ended the work early, 0 where all is done.
    """

    path: Path
    start: int
    seconds: float
    signal: int = 0


def decide(
    model: str | None,
    wish: Wish,
    out: Path | None,
    talk: Talk,
    *,
    quantize: Quantize = "round",
    precision: str = "auto",
    grid: bool = False,
    command: str = "",
    condition: Path | None = None,
) -> Job:
    """Settle model, noise levels, seeds, labels and place; every mistake in them is found here.

    Raises:
        UserError: contradictory or unusable requests, or no model that fits.
    """
    check_request(wish.steps, wish.times, wish.indices, wish.of)
    found = find_model(model, kinds=kinds_for(wish), output=talk)
    seeds, labels = wish.seeds_and_labels(found.header)
    plan = wish.plan(found.header, talk)
    first = wish.seed or 0 if wish.seeds is None else seeds[0]
    latent = is_latent(found.header)
    place = out or Path("samples") / f"{found.name}-{plan.nfe}-{first}.{'npz' if latent else 'png'}"
    if latent and place.suffix.lower() != ".npz":
        raise UserError("samples of this model are latents, which no picture can hold.", "use --out latents.npz")
    check_condition(found.header, condition)
    job = Job(found, plan, seeds, labels, place, quantize, precision, grid, command, condition)
    kind = out_kind(place, len(seeds), job.is_points)
    if grid and (kind != "picture" or job.is_points):
        raise UsageError("--grid is for pictures in a .png.", "e.g. --out grid.png")
    talk.say(found.describe())
    if condition is None and found.header["data"].get("condition"):
        talk.say("conditioned on the pictures of its own data, by seed; --condition FILE names others")
    talk.say(
        f"times {', '.join(f'{level:.4g}' for level in plan.times[:8])}{' ...' * (len(plan.times) > 8)} "
        f"({plan.source}; {plan.sampler}, {plan.nfe} evaluation{'s' * (plan.nfe != 1)} an image)"
    )
    return job


def kinds_for(wish: Wish) -> tuple[str, ...]:
    """Return the kinds of model to look for: that of the sampler if one is named, a teacher if it is to be guided."""
    kinds = ("consistency", "diffusion")
    if wish.sampler is None:
        return kinds if wish.guidance is None else kinds[::-1]
    if wish.sampler not in SAMPLERS:
        raise UsageError(unknown("sampler", wish.sampler, SAMPLERS))
    first = SAMPLERS[wish.sampler].kind
    return (first, *(kind for kind in kinds if kind != first))


def make(job: Job, batch_size: int | None, device: str, talk: Talk, world: World | None = None) -> Made | None:
    """Make the samples of a job; None in all processes but the first of several.

    `world`: the processes, if they have met already; None: they meet here, if there are several.
    """
    began = perf_counter()
    if (world is None and in_world()) or (world is not None and world.size > 1):
        path = make_together(job, batch_size, device) if world is None else make_in(world, job, batch_size, device)
        return None if path is None else Made(path, 0, perf_counter() - began)
    sink = open_sink(job)
    model = load_model(job.found, device, job.precision)
    began, start = perf_counter(), sink.start
    signal = write_samples(job, model, batch_size, talk, sink)
    path = job.out if signal else sink.finish()
    return Made(path, start, perf_counter() - began, signal)


def out_kind(path: Path, num: int, points: bool = False) -> OutKind:
    """Return what an output path asks for, by its suffix.

    Args:
        path: as given.
        num: number of samples.
        points: whether samples are points, which no folder of pictures can hold.

    Raises:
        UserError: for a suffix that is not written, a file where a folder is meant, a folder for points, or a grid too
            large to open.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == "":
        if path.is_file():
            raise UserError(f"{path} is a file; an output without .png or .npz is a folder.", "choose another --out")
        if points:
            raise UserError(
                "points are no pictures: a folder of PNGs cannot hold them.", "use --out points.npz or points.png"
            )
        return "folder"
    if suffix == ".png":
        if num > LARGEST_GRID and not points:
            raise UserError(f"{num:,} images are too many for one grid.", "use --out samples.npz or a folder")
        return "picture"
    if suffix == ".npz":
        return "npz"
    raise UserError(
        f"--out {path}: '{suffix}' is not written here.",
        "use .png (one picture, or a grid of several), .npz (arrays), or a name without a dot (a folder of pictures)",
    )


def open_sink(job: Job) -> Sink:
    """Open what takes the samples of a job: a picture, an .npz file or a folder."""
    from cmtool.data.sample_files import FolderSink, NpzSink, PictureSink

    kind = out_kind(job.out, len(job.seeds), job.is_points)
    check_place(job.out)
    if kind == "npz":
        return NpzSink(job.out, job.request(), job.meta())
    text = {key: str(value) for key, value in job.meta().items() if value is not None}
    if kind == "picture":
        distinct = len(set(job.labels)) if job.labels else 0
        return PictureSink(job.out, text, job.seeds, distinct if 1 < distinct <= 32 else None, job.grid)
    return FolderSink(job.out, job.request(), text, job.seeds)


def write_samples(job: Job, model: Model, batch_size: int | None, talk: Talk, sink: Sink) -> int:
    """Hand a job's missing samples to a sink; returns the signal that ended it early, or 0."""
    if sink.start:
        talk.say(f"{sink.start} of {len(job.seeds)} samples are there already; going on")
    channels, height, width = (model.latent or {}).get("pixels") or model.image_shape
    usual = max(1, min(1024, BATCH_VALUES // (channels * height * width)))
    signal = _fill(job, model, sink, batch_size or usual, talk)
    if signal:
        kept = "what was made is kept, the same command goes on" if job.out.suffix != ".png" else "nothing is written"
        talk.say(f"stopped; {kept}")
    return signal


def weak_model(plan: SamplePlan, model: Model, precision: str) -> Model | None:
    """Return the weak model that a plan names, on the model's device; None if it names none."""
    guidance = plan.guidance
    if guidance is None or guidance.weak is None:
        return None
    return load_model(Path(guidance.weak), str(model.device), precision).to(model.dtype)


def _fill(job: Job, model: Model, sink: Sink, batch_size: int, talk: Talk) -> int:
    from cmtool.data.images import to_uint8
    from cmtool.data.sample_files import in_background
    from cmtool.machine.stopping import stoppable
    from cmtool.samplers.generate import generate

    weak, pictures = weak_model(job.plan, model, job.precision), job.conditions()
    given = model, job.plan, job.seeds, job.labels
    batches = generate(*given, batch_size=batch_size, start=sink.start, conditions=pictures, weak=weak)
    with (
        talk.progress(len(job.seeds), "sampling") as update,
        stoppable() as stop,
        in_background(sink) as writer,
    ):
        update(completed=sink.start)
        # A signal ends the batch that is being made: it can be made again, and a large one takes minutes.
        while (batch := stop.unless_stopped(lambda: next(batches, None))) is not None:
            x0 = batch.x0.float()
            samples = x0 if job.is_points else to_uint8(x0, job.quantize).permute(0, 2, 3, 1)
            labels = None if batch.labels is None else batch.labels.cpu().numpy()
            writer.append(samples.cpu().numpy(), labels)
            update(completed=batch.start + len(samples))
    return stop.signal


# --- several processes ------------------------------------------------------------------------------------------------


def place_of_share(out: Path, rank: int, size: int) -> Path:
    """Return where process `rank` of `size` keeps its samples until all are there."""
    return out.with_name(f".{out.name}.share-{rank}-of-{size}")


def share_of(job: Job, first: int, count: int, place: Path) -> Job:
    """Return the job of the samples `first` .. `first + count` alone."""
    labels = None if job.labels is None else job.labels[first : first + count]
    return replace(job, seeds=job.seeds[first : first + count], labels=labels, out=place)


def device_here(name: str, local_rank: int) -> str:
    """The GPU of this process; anything else is the same for all."""
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    return name


def make_together(job: Job, batch_size: int | None, device: str) -> Path | None:
    """Make this process's share and, in process 0, the whole; sample i is the one that a single process makes.

    A share survives a kill, also while shares are put together: the same command in as many processes goes on with it.

    Returns:
        Where the samples are, in process 0; None in the others.
    """
    from cmtool.machine.world import join_world

    # Nothing but flags travels between these processes: no GPU is needed for it.
    with join_world("cpu") as world:
        return make_in(world, job, batch_size, device)


def make_in(world: World, job: Job, batch_size: int | None, device: str) -> Path | None:
    """Do what `make_together` does among processes that have met already."""
    import torch

    from cmtool.data.sample_files import ShareSink

    sink = open_sink(job) if world.main else None
    done = world.any(sink is not None and sink.start == len(job.seeds), torch.device("cpu"))
    first, count = world.rows(len(job.seeds))
    place = place_of_share(job.out, world.rank, world.size)
    if count and not done:
        share = share_of(job, first, count, place)
        kept = ShareSink(place, share.request())
        if kept.start < count:
            model = load_model(job.found, device_here(device, world.local_rank), job.precision)
            if signal := write_samples(share, model, batch_size, SILENCE, kept):
                raise SystemExit(128 + signal)
            kept.finish()
    world.wait()
    return None if sink is None else _assemble(job, sink, world.size)


def _assemble(job: Job, sink: Sink, size: int) -> Path:
    """Hand the shares to the sink shard by shard, after what it already has, and remove all of them."""
    from cmtool.data.shards import ShardStore

    first, skip = 0, sink.start
    for rank in range(size):
        count = len(job.seeds) * (rank + 1) // size - first
        place = place_of_share(job.out, rank, size)
        request = share_of(job, first, count, place).request()
        first += count
        for samples, labels in ShardStore(place, request).blocks() if count else ():
            late = min(skip, len(samples))
            skip -= late
            if late < len(samples):
                sink.append(samples[late:], None if labels is None else labels[late:])
    path = sink.finish()
    # Those of another number of processes too, which nobody will continue.
    for folder in job.out.parent.glob(f".{glob.escape(job.out.name)}.share-*-of-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)
    return path
