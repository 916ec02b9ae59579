"""`cmtool sample`: images from a model, as a grid, a file or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmtool.cli.options import BatchSize, Device, Json, Model, Out, Precision, Quiet

if TYPE_CHECKING:
    from cmtool.api.find import FoundModel
    from cmtool.cli.output import Output
    from cmtool.data.sample_files import Sink
    from cmtool.models import Model as LoadedModel
    from cmtool.samplers.plan import SamplePlan

IMAGES = 64
# A scatter picture of 64 points shows nothing.
POINTS = 2000
# Values (C x H x W x images) that a batch holds by default: about 64 MiB of activations for the small networks.
BATCH_VALUES = 2**18

Num = Annotated[int | None, typer.Option("--num", "-n", min=1, help="How many; default 64 (2000 points).")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Evaluations (a teacher: solver steps).")]
Times = Annotated[str | None, typer.Option("--times", help="Noise levels of all evaluations, e.g. 80,0.8.")]
Indices = Annotated[str | None, typer.Option("--indices", help="Published grid indices, e.g. 0,22,39.")]
Of = Annotated[int | None, typer.Option("--of", help="Points of the grid that --indices count on, e.g. 40.")]
SamplerName = Annotated[str | None, typer.Option("--sampler", help="multistep; for teachers heun, euler, ...")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", "-l", help="Class by name or number, or all; may be repeated.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of all randomness; default 0.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="One seed for each sample, e.g. 37,40-47.")]
Grid = Annotated[bool, typer.Option("--grid", help="A grid of one sample too; several into a .png are one anyway.")]
Quantize = Annotated[
    Literal["round", "truncate"], typer.Option("--quantize", help="How floats become bytes; papers truncate.")
]


@dataclass(frozen=True)
class Job:
    """All that is decided before torch is imported."""

    found: FoundModel
    plan: SamplePlan
    seeds: Sequence[int]
    labels: list[int] | None
    out: Path
    quantize: Literal["round", "truncate"]
    precision: str
    grid: bool = False

    @property
    def is_points(self) -> bool:
        """Whether samples are points and stay floats."""
        return bool(self.found.header["data"].get("float_samples"))

    def request(self) -> dict[str, Any]:
        """What must agree for a broken-off job to be continued."""
        from cmtool.cli.lists import format_ints

        return {
            "model_hash": self.found.digest,
            "sampler": self.plan.sampler,
            "times": list(self.plan.times),
            "seeds": format_ints(self.seeds),
            "labels": self.labels,
            "quantize": None if self.is_points else self.quantize,
            "precision": self.precision,
        }

    def meta(self) -> dict[str, Any]:
        """What a sample file says of itself."""
        from cmtool.cli.output import command_line
        from cmtool.version import __version__

        return {
            **self.request(),
            "class_names": self.found.header["data"].get("class_names"),
            "model": str(self.found.path),
            "nfe": self.plan.nfe,
            "cmtool": __version__,
            "command": command_line(),
        }


def sample(
    model: Model = None,
    num: Num = None,
    steps: Steps = None,
    times: Times = None,
    indices: Indices = None,
    of: Of = None,
    sampler: SamplerName = None,
    label: Labels = None,
    seed: Seed = None,
    seeds: Seeds = None,
    batch_size: BatchSize = None,
    quantize: Quantize = "round",
    grid: Grid = False,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make images in one or a few steps.

    Sample i depends on its seed alone; --seed N owns the seeds N x 1,000,000 and up. A large .npz or folder that was
    cut off is continued by the same command.

    Examples: cmtool sample --model demo/shapes --label all | cmtool sample --steps 2 --num 50000 --out big.npz
    """
    from cmtool.cli.output import Output

    output = Output.of_rank(json, quiet)
    job = _decide(locals(), output)
    _make(job, batch_size, device, output)


def _decide(given: dict[str, Any], output: Output) -> Job:
    """Settle model, noise levels, seeds, labels and place; every mistake in them is found here."""
    from cmtool.api.find import find_model
    from cmtool.cli.lists import choose_labels, choose_seeds, parse_floats, parse_ints
    from cmtool.cli.sample_out import out_kind
    from cmtool.errors import UsageError
    from cmtool.samplers.plan import check_request, plan_sampling

    times = None if given["times"] is None else parse_floats(given["times"], "--times")
    indices = None if given["indices"] is None else parse_ints(given["indices"], "--indices")
    check_request(given["steps"], times, indices, given["of"])
    found = find_model(given["model"], kinds=_kinds(given["sampler"]), output=output)
    header = found.header
    usual = POINTS if header["data"].get("float_samples") else IMAGES
    seeds = choose_seeds(given["num"], given["seed"], given["seeds"], usual)
    chosen = choose_labels(given["label"], header["data"].get("num_classes"), header["data"].get("class_names"))
    plan = plan_sampling(
        header, sampler=given["sampler"], steps=given["steps"], times=times, indices=indices, of=given["of"]
    )
    labels = None if chosen is None else [chosen[index % len(chosen)] for index in range(len(seeds))]
    first = given["seed"] or 0 if given["seeds"] is None else seeds[0]
    out = given["out"] or Path("samples") / f"{found.name}-{plan.nfe}-{first}.png"
    job = Job(found, plan, seeds, labels, out, given["quantize"], given["precision"], given["grid"])
    kind = out_kind(out, len(seeds), job.is_points)
    if job.grid and (kind != "picture" or job.is_points):
        raise UsageError("--grid is for pictures in a .png.", "e.g. --out grid.png")
    output.say(found.describe())
    output.say(
        f"times {', '.join(f'{level:.4g}' for level in plan.times[:8])}{' ...' * (len(plan.times) > 8)} "
        f"({plan.source}; {plan.sampler}, {plan.nfe} evaluation{'s' * (plan.nfe != 1)} an image)"
    )
    return job


def _kinds(sampler: str | None) -> tuple[str, ...]:
    """The kinds of model to look for: that of the sampler if one is named."""
    from cmtool.errors import UsageError, unknown
    from cmtool.samplers.plan import SAMPLERS

    if sampler is None:
        return ("consistency", "diffusion")
    if sampler not in SAMPLERS:
        raise UsageError(unknown("sampler", sampler, SAMPLERS))
    first = SAMPLERS[sampler].kind
    return (first, *(kind for kind in ("consistency", "diffusion") if kind != first))


def open_sink(job: Job) -> Sink:
    """Open what takes the samples of a job: a picture, an .npz file or a folder."""
    from cmtool.cli.sample_out import out_kind
    from cmtool.data.sample_files import FolderSink, NpzSink, PictureSink, check_place

    kind = out_kind(job.out, len(job.seeds), job.is_points)
    check_place(job.out)
    if kind == "npz":
        return NpzSink(job.out, job.request(), job.meta())
    text = {key: str(value) for key, value in job.meta().items() if value is not None}
    if kind == "picture":
        distinct = len(set(job.labels)) if job.labels else 0
        return PictureSink(job.out, text, job.seeds, distinct if 1 < distinct <= 32 else None, job.grid)
    return FolderSink(job.out, job.request(), text, job.seeds)


def _make(job: Job, batch_size: int | None, device: str, output: Output) -> None:
    from time import perf_counter

    from cmtool.machine.launch import in_world

    began, start = perf_counter(), 0
    if in_world():
        from cmtool.cli.sample_together import make_together

        together = make_together(job, batch_size, device)
        if together is None:
            return
        path = together
    else:
        from cmtool.api.find import load_model

        sink = open_sink(job)
        model = load_model(job.found, device, job.precision)
        began, start = perf_counter(), sink.start
        path = write_samples(job, model, batch_size, output, sink)
    seconds = perf_counter() - began
    rate = (len(job.seeds) - start) / max(seconds, 1e-9)
    output.say(f"{len(job.seeds)} samples in {seconds:.1f} s ({rate:.4g} a second)")
    output.result(str(path))
    document = {**job.meta(), "path": str(path), "num": len(job.seeds), "continued_at": start}
    output.json({**document, "seconds": round(seconds, 3), "samples_per_second": round(rate, 3)})


def write_samples(
    job: Job, model: LoadedModel, batch_size: int | None, output: Output, sink: Sink | None = None
) -> Path:
    """Make the samples of a job that are missing, write them and return where they are; exits when stopped."""
    sink = sink or open_sink(job)
    if sink.start:
        output.say(f"{sink.start} of {len(job.seeds)} samples are there already; going on")
    signal = _fill(job, model, sink, batch_size or _usual_batch(model), output)
    if signal:
        kept = "what was made is kept, the same command goes on" if job.out.suffix != ".png" else "nothing is written"
        output.say(f"stopped; {kept}")
        raise typer.Exit(128 + signal)
    return sink.finish()


def _usual_batch(model: LoadedModel) -> int:
    channels, height, width = model.image_shape
    return max(1, min(1024, BATCH_VALUES // (channels * height * width)))


def _fill(job: Job, model: LoadedModel, sink: Sink, batch_size: int, output: Output) -> int:
    """Make the samples that are missing and hand them to the sink; returns the signal that ended it, or 0."""
    from cmtool.data.images import to_uint8
    from cmtool.data.sample_files import in_background
    from cmtool.machine.stopping import stoppable
    from cmtool.samplers.generate import generate

    batches = generate(model, job.plan, job.seeds, job.labels, batch_size=batch_size, start=sink.start)
    with (
        output.progress(len(job.seeds), "sampling") as update,
        stoppable() as stop,
        in_background(sink) as writer,
    ):
        update(completed=sink.start)
        for batch in batches:
            x0 = batch.x0.float()
            samples = x0 if job.is_points else to_uint8(x0, job.quantize).permute(0, 2, 3, 1)
            labels = None if batch.labels is None else batch.labels.cpu().numpy()
            writer.append(samples.cpu().numpy(), labels)
            update(completed=batch.start + len(samples))
            if stop.now:
                return stop.signal
    return 0
