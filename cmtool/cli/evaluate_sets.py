"""What `cmtool eval` judges: files as they are, and models through samples that exist or are made and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.checkpoint import model_hash
from cmtool.cli.lists import BLOCK
from cmtool.errors import CheckpointError, DataError, UserError

if TYPE_CHECKING:
    from cmtool.cli.find_model import FoundModel
    from cmtool.cli.output import Output
    from cmtool.evaluation.samples import ImageSet
    from cmtool.samplers.plan import SamplePlan
    from cmtool.training.distributed import World


@dataclass(frozen=True)
class Wanted:
    """One set to be judged: a file (`path`), or a model with a plan (its samples are looked for, or made)."""

    name: str
    path: Path | None = None
    found: FoundModel | None = None
    plan: SamplePlan | None = None
    any_times: bool = False  # no times were asked for: the samples made last will do

    @cached_property
    def images(self) -> ImageSet:
        """The images of the file, opened once."""
        from cmtool.evaluation.samples import open_images

        assert self.path is not None
        return open_images(self.path)


@dataclass
class Judged:
    """A set that is open, and what is said about it."""

    name: str
    images: ImageSet
    wanted: Wanted
    made: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def model_file(self) -> Path | None:
        """The model whose samples these are, where that is known: a file names it, and its hash must still fit."""
        if self.wanted.found is not None:
            return self.wanted.found.path
        said = Path(str(self.about.get("model", "")))
        try:
            return said if said.is_file() and model_hash(said) == self.about.get("model_hash") else None
        except CheckpointError:
            return None


def model_for(given: str | None, ref: str | None, kinds: Sequence[str] = ("consistency", "diffusion")) -> FoundModel:
    """Return the model to judge: the one named, else the newest run on the reference's data, else the newest run."""
    from cmtool.cli.find_model import find_model
    from cmtool.config.judgments import reference_of

    def same_data(header: Mapping[str, Any]) -> bool:
        return ref in (reference_of(header), header.get("data", {}).get("source"))

    try:
        return find_model(given, kinds=kinds, fits=same_data if ref else None)
    except UserError:
        return find_model(given, kinds=kinds)


def list_wanted(
    samples: Sequence[str],
    model: str | None,
    ref: str | None,
    steps: Sequence[int],
    times: tuple[float, ...] | None,
    output: Output,
) -> list[Wanted]:
    """Turn the arguments into sets to judge; headers are read, nothing is loaded.

    Raises:
        UserError: there is no model, a path does not exist, or times do not fit a model.
    """
    from cmtool.cli.find_model import find_model

    files = [name for name in samples if not _is_model(name)]
    for name in files:
        if not Path(name).exists():
            raise DataError(
                f"there are no samples at {name}.", "name an .npz, a folder, a zip of images, a model or a run folder"
            )
    found = [find_model(name) for name in samples if _is_model(name)]
    if not samples:
        found = [model_for(model, ref)]
        output.say(found[0].describe())
    sets = [Wanted(name, Path(name)) for name in files]
    for one in found:
        sets += _plans(one, steps, times)
    return sets


def _is_model(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        return (path / "model.safetensors").exists() or (path / "config.toml").exists()
    return path.suffix == ".safetensors" and path.is_file()


def _plans(found: FoundModel, steps: Sequence[int], times: tuple[float, ...] | None) -> Iterator[Wanted]:
    from cmtool.samplers.plan import plan_sampling

    for count in steps or (None,):
        plan = plan_sampling(found.header, steps=count, times=times)
        yield Wanted(f"{found.name}, {plan.nfe} NFE", None, found, plan, any_times=count is None and times is None)


def open_set(
    wanted: Wanted,
    num: int | None,
    usual: int,
    seed: int,
    alone: bool,
    given: dict[str, Any],
    output: Output,
    world: World,
) -> Judged:
    """Open a file, or find or make the samples of a model.

    Args:
        wanted: what to judge.
        num: how many images; None: all of a file, `usual` of a model.
        usual: the reference's usual number of samples.
        seed: block of seeds of the samples that are made.
        alone: nothing else is judged, so samples of any seeds will do.
        given: the command's device, precision and batch_size.
        output: for talk and progress.
        world: processes that make the samples together; all must call this.
    """
    from cmtool.evaluation.samples import open_images

    if wanted.path is not None:
        images = wanted.images if num is None else wanted.images.some(num)
        for note in images.notes:
            output.say(f"{wanted.name}: {note}")
        return _judged(wanted, images)
    assert wanted.found is not None and wanted.plan is not None
    count = num or usual
    # Process 0 looks, for all: another might find what is being written.
    [path, *_] = world.gather(_existing(wanted, count, seed, alone) if world.main else None)
    if path is not None:
        output.say(f"{wanted.name}: samples in {path}")
    else:
        path = _make(wanted, count, seed, given, output, world)
    return _judged(wanted, open_images(path).first(count), path)


def _judged(wanted: Wanted, images: ImageSet, made: Path | None = None) -> Judged:
    keys = ("model", "model_hash", "sampler", "nfe", "times", "seeds", "quantize")
    about = {key: images.meta[key] for key in keys if key in images.meta}
    if wanted.plan is not None:
        about = {"nfe": wanted.plan.nfe, "times": list(wanted.plan.times), **about}
    name = wanted.name
    if wanted.any_times and wanted.found is not None and "nfe" in about:
        name = f"{wanted.found.name}, {about['nfe']} NFE"
    return Judged(name, images, wanted, made, about)


def _existing(wanted: Wanted, count: int, seed: int, alone: bool) -> Path | None:
    """The newest sample file of this model that holds enough images of the wanted times (and seeds)."""
    assert wanted.found is not None and wanted.plan is not None
    files = [path for path in Path("samples").glob("*.npz") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        meta = _meta(path)
        if meta.get("model_hash") != wanted.found.digest or meta.get("quantize") == "truncate" or meta.get("labels"):
            continue
        times_fit = list(wanted.plan.times) == meta.get("times") and meta.get("sampler") == wanted.plan.sampler
        seeds_fit = str(meta.get("seeds", "")).split("-")[0] == str(seed * BLOCK)
        if (times_fit or (wanted.any_times and alone)) and (seeds_fit or alone) and meta["count"] >= count:
            return path
    return None


def _meta(path: Path) -> dict[str, Any]:
    from cmtool.evaluation.samples import open_images

    try:
        images = open_images(path)
    except DataError:
        return {}
    return {**images.meta, "count": images.count}


def _make(wanted: Wanted, count: int, seed: int, given: dict[str, Any], output: Output, world: World) -> Path:
    """Sample the model into `samples/`, in the form of `cmtool sample --out FILE.npz`."""
    from cmtool.cli.run_model import load_model
    from cmtool.cli.sample import Job, write_samples
    from cmtool.cli.sample_together import make_in

    assert wanted.found is not None and wanted.plan is not None
    plan, first = wanted.plan, seed * BLOCK
    out = Path("samples") / f"{wanted.found.name}-{plan.nfe}-{first}-{count}.npz"
    output.say(f"{wanted.name}: making {count:,} samples ({plan.source})")
    job = Job(wanted.found, plan, range(first, first + count), None, out, "round", given["precision"])
    if world.size > 1:
        [made, *_] = world.gather(make_in(world, job, given["batch_size"], given["device"]))
        return Path(made)
    model = load_model(wanted.found, given["device"], given["precision"])
    return write_samples(job, model, given["batch_size"], output)


def same_seeds(first: Judged, second: Judged) -> bool:
    """Whether sample i of both sets was made from the same seed."""
    seeds = first.about.get("seeds")
    if first.images.count != second.images.count or not seeds:
        return False
    return str(seeds).split("-")[0] == str(second.about.get("seeds", "")).split("-")[0]


def append_row(judged: Judged, row: dict[str, Any], output: Output) -> None:
    """Append a row to `evaluations.jsonl` of the run whose model this is; a model that lies elsewhere keeps no rows.

    A run folder that cannot be written is said and passed over.
    """
    if judged.model_file is None or not is_run(judged.model_file.parent):
        return
    path = judged.model_file.parent / "evaluations.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, default=str) + "\n")
    except OSError as error:
        output.warn(f"{path} could not be written ({error.strerror}); --out FILE keeps the results elsewhere.")


def is_run(folder: Path) -> bool:
    """Whether training made this folder: it holds the settings of a run, and not some other program's config.toml."""
    from cmtool.config.toml import read_toml

    try:
        return {"data", "network", "train", "recipe"} <= read_toml(folder / "config.toml").keys()
    except (UserError, OSError):
        return False
