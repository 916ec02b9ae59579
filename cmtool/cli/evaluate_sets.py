"""What `cmtool eval` judges: files as they are, and models through samples that exist or are made and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cmtool.checkpoint import model_hash
from cmtool.errors import CheckpointError, DataError, UserError
from cmtool.samplers.plan import SEED_BLOCK as BLOCK

if TYPE_CHECKING:
    from cmtool.api.find import FoundModel
    from cmtool.api.sample import Wish
    from cmtool.cli.output import Output
    from cmtool.evaluation.samples import ImageSet
    from cmtool.evaluation.verdict import Opened
    from cmtool.machine.world import World
    from cmtool.samplers.plan import SamplePlan

# What a sample file's maker recorded that belongs next to its metrics.
GUIDED = ("guidance", "guidance_interval", "weak")
ABOUT = ("model", "model_hash", "sampler", "nfe", "times", *GUIDED, "seeds", "quantize")


@dataclass(frozen=True)
class Making:
    """How the sets of one command are opened, and how samples that are missing are made.

    `num`: how many images; None: all of a file, the reference's usual number of a model. `seed`: block of seeds of
    samples that are made. `alone`: nothing else is judged, so that samples of any seeds will do. `consistency`: models
    are judged along trajectories of `teacher` too.
    """

    num: int | None
    seed: int
    alone: bool
    batch_size: int | None
    device: str
    precision: str
    consistency: bool
    teacher: str | None
    output: Output
    world: World


@dataclass(frozen=True)
class FileSet:
    """A file or folder of samples."""

    path: Path
    name: str
    making: Making
    found: None = None

    @cached_property
    def images(self) -> ImageSet:
        """The images of the file, opened once."""
        from cmtool.evaluation.samples import open_images

        return open_images(self.path)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        return self.images.shape

    def open(self, usual: int) -> Opened:
        """Return the images, or the requested number of them."""
        num = self.making.num
        images = self.images if num is None else self.images.some(num)
        for note in images.notes:
            self.making.output.say(f"{self.name}: {note}")
        return opened(self.name, images)


@dataclass(frozen=True)
class ModelSet:
    """Samples of a model by a plan: looked for below `samples/`, else made there.

    `any_times`: no times were requested, so the samples made last will do.
    """

    found: FoundModel
    plan: SamplePlan
    any_times: bool
    making: Making

    @property
    def name(self) -> str:
        """The model, its evaluations an image, and how it is guided."""
        return self._named(self.plan.nfe)

    def _named(self, nfe: object) -> str:
        guidance = self.plan.guidance
        return f"{self.found.name}, {nfe} NFE" + ("" if guidance is None else f", guidance {guidance.scale:g}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the samples."""
        from cmtool.evaluation.samples import image_shape

        return image_shape(self.found.header)

    def open(self, usual: int) -> Opened:
        """Find or make `usual` samples, or the requested number."""
        from cmtool.evaluation.samples import open_images

        making, count = self.making, self.making.num or usual
        # Process 0 looks, for all: another might find what is being written.
        here = self._existing(count) if making.world.main else None
        [path, *_] = making.world.gather(None if here is None else Path(here.name))
        if path is not None:
            making.output.say(f"{self.name}: samples in {path}")
        else:
            path = self._make(count)
        images = (here or open_images(path)).first(count)
        about = {"nfe": self.plan.nfe, "times": list(self.plan.times)}
        name = self.name
        if self.any_times and "nfe" in images.meta:
            name = self._named(images.meta["nfe"])
        return opened(name, images, about, self if making.consistency else None)

    def _existing(self, count: int) -> ImageSet | None:
        """Return the newest sample file of this model with enough images of the wanted times (and seeds)."""
        files = [path for path in Path("samples").glob("*.npz") if path.is_file()]
        for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            images = _openable(path)
            if images is not None and images.count >= count and self._fits(images.meta):
                return images
        return None

    def _fits(self, meta: Mapping[str, Any]) -> bool:
        """Whether samples are of this model and guidance, and of these times and seeds where that matters."""
        if meta.get("model_hash") != self.found.digest or meta.get("quantize") == "truncate" or meta.get("labels"):
            return False
        if {key: meta[key] for key in GUIDED if meta.get(key) is not None} != self._guided():
            return False
        alone = self.making.alone
        times_fit = list(self.plan.times) == meta.get("times") and meta.get("sampler") == self.plan.sampler
        seeds_fit = str(meta.get("seeds", "")).split("-")[0] == str(self.making.seed * BLOCK)
        return (times_fit or (self.any_times and alone)) and (seeds_fit or alone)

    def _guided(self) -> dict[str, Any]:
        return {} if self.plan.guidance is None else self.plan.guidance.request()

    def _make(self, count: int) -> Path:
        """Sample the model into `samples/`, in the form of `cmtool sample --out FILE.npz`."""
        from cmtool.api.sample import Job, make
        from cmtool.cli.output import command_line

        making, plan, first = self.making, self.plan, self.making.seed * BLOCK
        kind = "-".join([str(plan.nfe), *([] if plan.guidance is None else plan.guidance.words())])
        out = Path("samples") / f"{self.found.name}-{kind}-{first}-{count}.npz"
        making.output.say(f"{self.name}: making {count:,} samples ({plan.source})")
        seeds = range(first, first + count)
        job = Job(self.found, plan, seeds, None, out, "round", making.precision, command=command_line())
        made = make(job, making.batch_size, making.device, making.output, making.world)
        if made is not None and made.signal:
            raise SystemExit(128 + made.signal)
        [path, *_] = making.world.gather(None if made is None else made.path)
        return Path(path)

    def consistency(self) -> dict[str, float]:
        """Measure how consistent the model is along trajectories of the teacher that was named, or of one that fits."""
        from cmtool.api.evaluate import trajectories
        from cmtool.api.find import find_model, load_model
        from cmtool.api.model import Model
        from cmtool.config.judgments import same_data

        making, data = self.making, self.found.header["data"]
        teacher = find_model(
            making.teacher,
            kinds=("diffusion",),
            fits=lambda header: same_data(header["data"], data),
            wanted="teacher",
            option="--teacher",
        )
        making.output.say(teacher.describe())
        models = [Model(load_model(one, making.device, making.precision), one.path) for one in (self.found, teacher)]
        return trajectories(models[0], models[1], making.num)


Wanted: TypeAlias = FileSet | ModelSet


def opened(
    name: str, images: ImageSet, about: Mapping[str, Any] | None = None, model: ModelSet | None = None
) -> Opened:
    """Put together what is known of a set; what its file says wins over `about`."""
    from cmtool.evaluation.verdict import Opened

    said = {key: images.meta[key] for key in ABOUT if key in images.meta}
    consistent = model is not None and model.found.header.get("kind") == "consistency"
    measure = model.consistency if model is not None and consistent else None
    return Opened(name, images, {**(about or {}), **said}, measure)


def _openable(path: Path) -> ImageSet | None:
    from cmtool.evaluation.samples import open_images

    try:
        return open_images(path)
    except DataError:
        return None


def model_for(given: str | None, ref: str | None, kinds: Sequence[str] = ("consistency", "diffusion")) -> FoundModel:
    """Return the model to judge: the one named, else the newest run on the reference's data, else the newest run."""
    from cmtool.api.find import find_model
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
    wishes: Sequence[Wish],
    making: Making,
) -> list[Wanted]:
    """Turn the arguments into sets to judge; headers are read, nothing is loaded.

    `wishes`: how each model is sampled.

    Raises:
        UserError: there is no model, a path does not exist, or times or guidance do not fit a model.
    """
    from cmtool.api.find import find_model
    from cmtool.api.sample import kinds_for

    files = [name for name in samples if not _is_model(name)]
    for name in files:
        if not Path(name).exists():
            raise DataError(
                f"there are no samples at {name}.", "name an .npz, a folder, a zip of images, a model or a run folder"
            )
    found = [find_model(name) for name in samples if _is_model(name)]
    if not samples:
        found = [model_for(model, ref, kinds_for(wishes[0]))]
        making.output.say(found[0].describe())
    sets: list[Wanted] = [FileSet(Path(name), name, making) for name in files]
    sets += [one for model_file in found for one in _plans(model_file, wishes, making)]
    alone = replace(making, alone=len(sets) == 1)
    return [replace(one, making=alone) for one in sets]


def _is_model(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        return (path / "model.safetensors").exists() or (path / "config.toml").exists()
    return path.suffix == ".safetensors" and path.is_file()


def _plans(found: FoundModel, wishes: Sequence[Wish], making: Making) -> Iterator[ModelSet]:
    for wish in wishes:
        yield ModelSet(found, wish.plan(found.header, making.output), wish.steps is None and wish.times is None, making)


def append_row(model: Path | None, row: Mapping[str, Any], output: Output) -> None:
    """Append a row to `evaluations.jsonl` of the run whose model this is; a model that lies elsewhere keeps no rows.

    A run folder that cannot be written is reported and skipped.
    """
    if model is None or not is_run(model.parent):
        return
    path = model.parent / "evaluations.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, default=str) + "\n")
    except OSError as error:
        output.warn(f"{path} could not be written ({error.strerror}); --out FILE keeps the results elsewhere.")


def model_file(wanted: Wanted, about: Mapping[str, Any]) -> Path | None:
    """Return the model whose samples these are, where that is known: a file names it, and its hash must still fit."""
    if wanted.found is not None:
        return wanted.found.path
    said = Path(str(about.get("model", "")))
    try:
        return said if said.is_file() and model_hash(said) == about.get("model_hash") else None
    except CheckpointError:
        return None


def is_run(folder: Path) -> bool:
    """Whether training made this folder: it holds the settings of a run, and not some other program's config.toml."""
    from cmtool.config.toml import read_toml

    try:
        return {"data", "network", "train", "recipe"} <= read_toml(folder / "config.toml").keys()
    except (UserError, OSError):
        return False
