"""Evaluation in one call: samples of a model, of files or in memory against a reference; and the search for times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.api.model import Model, as_model, load
from cmtool.checkpoint import load_tensors, save_model
from cmtool.config.judgments import own_reference
from cmtool.data import to_uint8
from cmtool.errors import UsageError, UserError
from cmtool.evaluation.closing_search import descending_grid
from cmtool.evaluation.consistency import measure_consistency
from cmtool.evaluation.judge import Judge, Shape
from cmtool.evaluation.make_reference import check_place
from cmtool.evaluation.make_reference import make_reference as write_reference
from cmtool.evaluation.metrics import check_metrics
from cmtool.evaluation.models import BATCH, TimesScore, make_images
from cmtool.evaluation.references import resolve_reference
from cmtool.evaluation.samples import ImageSet, from_array, image_shape, open_images
from cmtool.evaluation.verdict import Candidate, Judging, Opened, judge_sets
from cmtool.machine.device import choose_device
from cmtool.samplers.plan import SEED_BLOCK
from cmtool.samplers.time_search import Memo
from cmtool.samplers.time_search import search_times as find_times
from cmtool.talk import SILENCE, Talk

Samples: TypeAlias = "Model | str | Path | Tensor | NDArray[np.uint8]"
TRAJECTORIES = 256  # at most, for the consistency of a model


def evaluate(
    samples: Samples,
    reference: str | None = None,
    *,
    num: int | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    metrics: Sequence[str] | None = None,
    features: str | None = None,
    mode: str | None = None,
    teacher: Model | str | Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    talk: Talk = SILENCE,
) -> dict[str, float]:
    """Judge samples and return the metrics that apply: "fid", "kid", "precision", "recall", ...

    Args:
        samples: a model (its samples are made in memory), the path or name of one, a sample file or folder, images
            (N, C, H, W) as floats in [-1, 1], or uint8 (N, H, W, C).
        reference: what to compare with: a name such as "digits" or "cifar10", an .npz, a folder of images, a preset, or
            a run (the images that its training held out); None: a model's own.
        num: how many samples; None: all of a file, or the reference's usual number for a model.
        steps: evaluations per image, for a model's samples.
        times: noise levels in place of `steps`.
        metrics: some of "fid", "sfid", "is", "kid", "pr", "dc", "classes", "copies", "memorization", "consistency";
            None: all usual ones that apply.
        features: the feature network; None: the reference's usual one. Only "inception" makes "fid" a FID.
        mode: Inception's resizing rule; None: the reference's.
        teacher: the diffusion model whose trajectories "consistency" follows.
        seed: for a model's samples: `seed=N` means the sample seeds N * 1,000,000 and up.
        batch_size: images at once.
        device: "auto", "cpu", "cuda" or "mps".
        talk: told what is done and how far it is.

    Raises:
        UserError: unknown names, no reference, images of another size than the reference's, a reference that cannot be
            fetched.
    """
    chosen = check_metrics(metrics)
    model, images = _opened(samples, device)
    if model is not None:
        one: Candidate = _Made(model, num, steps, times, seed, teacher)
    else:
        assert images is not None
        one = _Given(images if num is None else images.some(num))
    reference = reference or (None if model is None else own_reference(model.header, model.path))
    if reference is None:
        raise UserError("there is nothing to compare the samples with.", "name a reference, e.g. 'digits' or a folder")
    how = Judging(metrics=chosen, features=features, mode=mode, batch_size=batch_size, device=device)
    return judge_sets([one], reference, how, talk).sets[0].found.known


def _opened(samples: Samples, device: str) -> tuple[Model | None, ImageSet | None]:
    if isinstance(samples, Model):
        return samples, None
    if isinstance(samples, (Tensor, np.ndarray)):
        return None, from_array(_bytes(samples), "the images")
    path = Path(samples)
    is_run = path.is_dir() and ((path / "model.safetensors").exists() or (path / "config.toml").exists())
    if path.exists() and not is_run and path.suffix != ".safetensors":
        return None, open_images(path)
    return load(samples, device), None


def _bytes(images: Tensor | NDArray[np.uint8]) -> NDArray[Any]:
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.dtype != np.uint8:
            raise UserError(f"an array of {images.dtype} {images.shape} is no batch of uint8 images (N, H, W, C).")
        return images
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(f"a tensor {tuple(images.shape)} of {images.dtype} is no batch (N, C, H, W) in [-1, 1].")
    if images.shape[2:] == (1, 1):
        return images.float().cpu().numpy()  # points stay floats
    low, high = float(images.min()), float(images.max())
    if 0 <= low < high <= 1:
        raise UserError(
            f"the images lie in [{low:.3g}, {high:.3g}], which can be read in [0, 1] and in [-1, 1].",
            "give uint8 (N, H, W, C), or scale by 2 x - 1 what lies in [0, 1]",
        )
    return np.ascontiguousarray(to_uint8(images.to(torch.float32)).permute(0, 2, 3, 1).cpu().numpy())


# --- what is judged ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """Images that exist already."""

    images: ImageSet

    @property
    def shape(self) -> Shape:
        return self.images.shape

    def open(self, usual: int) -> Opened:
        return Opened(self.images.name, self.images)


@dataclass(frozen=True)
class _Made:
    """Samples of a model, made in memory."""

    model: Model
    num: int | None
    steps: int | None
    times: Sequence[float] | None
    seed: int
    teacher: Model | str | Path | None

    @property
    def shape(self) -> Shape:
        return image_shape(self.model.header)

    def open(self, usual: int) -> Opened:
        first = self.seed * SEED_BLOCK
        plan = self.model.plan(steps=self.steps, times=self.times)
        images = make_images(self.model.module, plan, range(first, first + (self.num or usual)))
        return Opened("samples", images, trajectories=self._consistency if self.teacher is not None else None)

    def _consistency(self) -> dict[str, float]:
        assert self.teacher is not None
        return trajectories(self.model, as_model(self.teacher), self.num)


def trajectories(model: Model, teacher: Model, num: int | None) -> dict[str, float]:
    """Return the consistency of a model along `num` (at most 256) trajectories of a teacher."""
    count = min(TRAJECTORIES, num or TRAJECTORIES)
    return measure_consistency(model.module, teacher.module, count).figures()


# --- the best times --------------------------------------------------------------------------------------------------

# The seeds that decide between the candidates: a block that the search itself does not touch.
FRESH = 1000


@dataclass(frozen=True)
class FoundTimes:
    """The best noise levels for a number of evaluations, and what the search saw.

    `value` is their distance on fresh seeds, `method` how they were found, `candidates` the distance on fresh seeds of
    all times that were compared in the end, `trace` every (times, distance) of the search in order, `count` the
    samples of each, and `distance` what the distance is called with the feature network `features`.
    """

    times: tuple[float, ...]
    value: float
    method: str
    candidates: dict[tuple[float, ...], float]
    trace: tuple[tuple[tuple[float, ...], float], ...]
    count: int
    distance: str
    features: str


def search_times(
    model: Model | str | Path,
    reference: str | None = None,
    *,
    steps: int = 2,
    num: int | None = None,
    grid: int = 40,
    joint: bool = True,
    features: str | None = None,
    mode: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    talk: Talk = SILENCE,
) -> FoundTimes:
    """Find the best noise levels of a consistency model for several evaluations per image.

    A ternary search finds one level after another (Song et al. 2023), then all move together. The results are
    compared with the model's present times on seeds that the search did not see, and the best times are returned.

    Args:
        model: a consistency model, or its path.
        reference: what samples are compared with; None: the reference of the model's training.
        steps: evaluations per image, at least 2.
        num: samples for each candidate; None: the reference's usual number.
        grid: points of the grid of candidate levels.
        joint: whether all levels also move together, starting from the greedy answer.
        features: the feature network; None: the reference's usual one.
        mode: Inception's resizing rule; None: the reference's.
        seed: of the samples.
        batch_size: images at once.
        talk: told what is done and how far it is.

    Raises:
        UserError: not a consistency model, no reference, or a grid that is too coarse.
    """
    loaded = as_model(model)
    reference = reference or own_reference(loaded.header, loaded.path)
    if loaded.kind != "consistency":
        raise UserError(f"{loaded.path} is no consistency model, and only those have times to search for.")
    if reference is None:
        raise UserError(f"{loaded.path} has no reference of its own.", "name one, e.g. search_times(model, 'digits')")
    device, shape = str(loaded.module.device), image_shape(loaded.header)
    judge = Judge.of(reference, shape, features, mode, device, talk, batch_size=batch_size or 64)
    count, size = num or judge.reference.count, batch_size or BATCH
    starts = seed * SEED_BLOCK, (seed + FRESH) * SEED_BLOCK
    score, last = (TimesScore(loaded.module, judge, range(first, first + count), size) for first in starts)
    fresh, levels = Memo(last), descending_grid(loaded.module, grid)
    present = loaded.plan(steps=steps).times
    with talk.progress(None, f"{steps} steps, {count:,} samples each") as update:

        def report(times: Sequence[float], value: float) -> None:
            update(1, note=f"{', '.join(f'{t:.3g}' for t in times)}: {value:.4g}")

        found = find_times(score, steps, levels, joint=joint, fresh=fresh, candidates=[present], report=report)
    network = judge.network
    return FoundTimes(
        found.times, found.value, found.method, dict(fresh.known), found.trace, count, network.distance, network.name
    )


def write_times(path: Path, times: Sequence[float]) -> None:
    """Put times for their number of evaluations into a model's header; the whole file is replaced."""
    tensors, header = load_tensors(path)
    header["times"] = dict(header.get("times") or {}) | {str(len(times)): list(times)}
    save_model(path, tensors, header)


# --- references of your own ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeReference:
    """A written reference: the file, the number of images that it describes, and the feature network."""

    path: Path
    count: int
    features: str


def make_reference(
    path: str | Path,
    data: str,
    *,
    features: str | None = None,
    mode: str | None = None,
    num: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    talk: Talk = SILENCE,
) -> MadeReference:
    """Describe images in an .npz that `evaluate` takes as a reference: statistics, and images for precision and KID.

    Args:
        path: the .npz to write.
        data: the images: a folder, .npz, zip, preset or name.
        features: the feature network; None: the usual one for the data.
        mode: Inception's resizing rule; None: the usual one.
        num: how many images; None: all.
        batch_size: images at once.
        device: "auto", "cpu", "cuda" or "mps".
        talk: told what is done and how far it is.

    Raises:
        UserError: another ending than .npz, unknown names, or data that hold no images.
    """
    check_place(Path(path))
    source = resolve_reference(data, None, mode, talk.say)
    if source.images is None:
        raise UsageError(f"{data} holds statistics only; a reference is made from images.", "name a folder or an .npz")
    said, source = len(source.images.notes), source.own(num, mode)
    assert source.images is not None
    for note in source.images.notes[said:]:
        talk.say(f"{data}: {note}")
    judge = Judge.of(source, None, features, None, str(choose_device(device)), talk, batch_size=batch_size)
    made = write_reference(Path(path), judge, features or source.features)
    return MadeReference(made, source.images.count, judge.network.name)
