"""A model for Python programs: load it by path or name, call it, sample from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool import models
from cmtool.api.choose import check_condition, choose_label
from cmtool.api.find import load_model
from cmtool.api.sample import IMAGES, Wish, weak_model
from cmtool.data import save_folder, save_npz, save_points, save_scatter
from cmtool.data.images import save_pictures
from cmtool.errors import DataError, UserError, unknown
from cmtool.interop.published import resolve_model
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import SamplePlan, plan_sampling

Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]


class Model:
    """A consistency model or a teacher, ready to use.

    `model(x, t, label)` is the estimate of the clean image, see `cmtool.models.Model`; `model.module` is that torch
    module. `model.header` says what it is: preset, recipe, data, sampling times.
    """

    def __init__(self, module: models.Model, path: Path) -> None:
        self.module = module
        self.path = path

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        return f"<cmtool.Model {self.path}: {self.kind}, images {shape}, classes {self.num_classes}>"

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Return the estimate of x0, (B, C, H, W), for noisy x (B, C, H, W) at the noise levels t (B,)."""
        return self.module(x, t, label, r)

    @property
    def header(self) -> dict[str, Any]:
        """What the model file says about itself."""
        return self.module.header

    @property
    def kind(self) -> str:
        """What it is: "consistency" or "diffusion" (a teacher)."""
        return self.module.kind

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return self.module.image_shape

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None: unconditional."""
        return self.module.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, where they have some."""
        return self.header["data"].get("class_names")

    def label(self, name: str | int) -> int:
        """Return the number of a class, by name or number.

        Raises:
            UserError: the model has no classes, or not this one.
        """
        number = choose_label(name, self.header["data"])
        if number is None:
            raise UserError(unknown("label", str(name), self.class_names or []))
        return number

    def plan(
        self, *, steps: int | None = None, times: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplePlan:
        """Return sampler and noise levels, from the model's header where none are given.

        Raises:
            UserError: contradictory or unusable requests.
        """
        return plan_sampling(self.header, sampler=sampler, steps=steps, times=times)

    def sample(
        self,
        num: int | None = None,
        *,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        sampler: str | None = None,
        label: str | int | Sequence[str | int] | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        condition: str | Path | None = None,
        guidance: float | None = None,
        interval: Sequence[float] | None = None,
        weak: str | Path | None = None,
    ) -> Tensor:
        """Return samples (N, C, H, W) on the CPU, float32 (float64 for a float64 model), in [-1, 1] unless points.

        Sample i depends only on its seed (and label). The same numbers come from `cmtool sample` with the same seeds.

        Args:
            num: how many; 64 unless `seeds` is given.
            steps: network evaluations of each image (solver steps of a teacher); usually 1 (18).
            times: noise levels of all evaluations in place of `steps`, including the first, e.g. (80, 0.8).
            sampler: "multistep", or for teachers "heun", "euler", "ancestral", "dpm".
            label: a class by name or number, or several to take in turn; None draws each from its seed.
            seed: `seed=N` means the seeds N * 1,000,000 and up.
            seeds: one seed for each sample in place of `num` and `seed`.
            batch_size: images computed together; changes only speed and memory.
            condition: the picture, or a folder of them, for a model that is conditioned on one; None: those of its own
                data, by seed.
            guidance: scale of guidance, for a teacher or a guided network; None: none.
            interval: the noise levels that are guided, (lower, higher); None: all.
            weak: a worse teacher to be guided away from, in place of the answer to no label.

        Raises:
            UserError: contradictory or unusable requests, or a class that the model does not have.
        """
        labels = [label] if isinstance(label, (str, int)) else label
        count = IMAGES if num is None and seeds is None else num
        wish = Wish(
            num=count, steps=steps, times=times, sampler=sampler, labels=labels, seed=seed or None, seeds=seeds,
            guidance=guidance, interval=interval, weak=None if weak is None else str(weak),
        )  # fmt: skip
        chosen, classes = wish.seeds_and_labels(self.header)
        plan = wish.plan(self.header)
        place = None if condition is None else Path(condition)
        check_condition(self.header, place)
        pictures = None
        if place is not None:
            from cmtool.data.condition import picture_conditions

            pictures = picture_conditions(place, self.header["data"])
        worse = weak_model(plan, self.module, "auto")
        given = self.module, plan, chosen, classes
        batches = generate(*given, batch_size=batch_size, conditions=pictures, weak=worse)
        keep = torch.float64 if self.module.dtype == torch.float64 else torch.float32
        return torch.cat([batch.x0.to("cpu", keep) for batch in batches])


def load(path: str | Path, device: str = "auto", precision: Precision = "auto") -> Model:
    """Load a model.

    Args:
        path: a model file, a run folder, or a name: `demo/avatars`, `demo/shapes` and `demo/digits` are bundled,
            `openai/...` and `hf:owner/name` are fetched (`cmtool models` lists the names).
        device: "auto" (the fastest present), "cpu", "cuda" or "mps".
        precision: "auto" is float32; "bf16" and "fp16" by autocast around the network; "fp64".

    Raises:
        CheckpointError: there is no model there, or it is damaged.
        UserError: unknown name or device, or a download that failed.
    """
    file = resolve_model(str(path))
    return Model(load_model(file, device, precision), file)


def as_model(model: Model | str | Path) -> Model:
    """Return a model that is loaded already, or load it."""
    return model if isinstance(model, Model) else load(model)


def sample(model: Model | str | Path, num: int | None = None, **how: Any) -> Tensor:
    """Return samples (N, C, H, W); the same as `load(model).sample(num, ...)`, whose arguments it takes."""
    return as_model(model).sample(num, **how)


# --- pictures ---------------------------------------------------------------------------------------------------------


Bytes: TypeAlias = NDArray[np.uint8]


def save(images: Tensor | Bytes, path: str | Path) -> Path:
    """Write images and return where.

    Args:
        images: float tensor (N, C, H, W) in [-1, 1] or uint8 array (N, H, W, C); points are a tensor (N, 2, 1, 1).
        path: `.png` is a grid (of one image: just that image), `.npz` the form that evaluators read, a path without
            an ending a folder of PNGs.

    Raises:
        DataError: the images are not images, or the ending is none of these.
        UserError: the place cannot be written.
    """
    path = Path(path)
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[2:] == (1, 1) and images.shape[1] == 2:
        if path.suffix == ".npz":
            return save_points(path, images)
        return save_scatter(images, path)
    if path.suffix == ".png":
        return save_pictures(images, path)
    if path.suffix == ".npz":
        return save_npz(path, images)
    if path.suffix == "":
        return save_folder(images, path)
    raise DataError(f"{path}: images are written as .png, .npz or into a folder.")
