"""Evaluation as one call: samples of a model, files, or images in memory against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.api.model import BLOCK, Model, load
from cmtool.data import to_uint8
from cmtool.errors import UserError
from cmtool.evaluation.features import build_features
from cmtool.evaluation.figures import compute_figures
from cmtool.evaluation.measure import measure, measure_reference
from cmtool.evaluation.models import make_images
from cmtool.evaluation.names import check_metrics
from cmtool.evaluation.references import Reference, resolve_reference
from cmtool.evaluation.samples import ImageSet, from_array, open_images
from cmtool.training.setup import choose_device

Shape = tuple[int, int, int]


def evaluate(
    samples: Model | str | Path | Tensor | NDArray[np.uint8],
    reference: str,
    *,
    num: int | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    metrics: Sequence[str] | None = None,
    features: str | None = None,
    mode: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> dict[str, float]:
    """Judge samples and return the figures that apply: "fid", "kid", "precision", "recall", ...

    Args:
        samples: a model (its samples are made in memory), the path or name of one, a sample file or folder, images
            (N, C, H, W) as floats in [-1, 1], or uint8 (N, H, W, C).
        reference: what to compare with: a name such as "digits" or "cifar10", an .npz, a folder of images, a preset.
        num: how many samples; None: all of a file, the reference's usual number of a model.
        steps: evaluations an image, of a model's samples.
        times: noise levels in place of `steps`.
        metrics: some of "fid", "sfid", "is", "kid", "pr", "dc", "classes"; None: all that apply.
        features: the feature network; None: the reference's usual one. Only "inception" makes "fid" a FID.
        mode: Inception's resizing rule; None: the reference's.
        seed: of a model's samples.
        batch_size: images at once.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: unknown names, images of another size than the reference's, a reference that cannot be fetched.
    """
    chosen = check_metrics(metrics)
    model, images = _opened(samples, device)
    shape = _shape(model) if images is None else images.shape
    against = resolve_reference(reference, shape, mode)
    _same_size(shape, against)
    if images is None:
        assert model is not None
        seeds = range(seed * BLOCK, seed * BLOCK + (num or against.count))
        images = make_images(model.module, model.plan(steps=steps, times=times), seeds)
    elif num is not None:
        images = images.some(num)
    rule = mode or against.mode
    network = build_features(features or against.features, images.shape, rule, str(choose_device(device)))
    side = measure_reference(against, network, batch_size)
    figures = compute_figures(measure(images, network, batch_size), side, network, chosen, images.labels)
    return {key: value for key, value in figures.values.items() if value is not None}


def _opened(
    samples: Model | str | Path | Tensor | NDArray[np.uint8], device: str
) -> tuple[Model | None, ImageSet | None]:
    if isinstance(samples, Model):
        return samples, None
    if isinstance(samples, (Tensor, np.ndarray)):
        return None, from_array(_bytes(samples), "the images")
    path = Path(samples)
    is_run = path.is_dir() and ((path / "model.safetensors").exists() or (path / "config.toml").exists())
    if path.exists() and not is_run and path.suffix != ".safetensors":
        return None, open_images(path)
    return load(samples, device), None


def _bytes(images: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
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


def _shape(model: Model | None) -> Shape:
    assert model is not None
    channels, height, width = model.image_shape
    return (channels, 1, 1) if model.module.float_samples else (height, width, channels)


def _same_size(shape: Shape, reference: Reference) -> None:
    if reference.images is not None and reference.images.shape != shape:
        theirs = reference.images.shape
        raise UserError(
            f"images of {shape[1]} x {shape[0]} with {shape[2]} channel(s) against a reference of "
            f"{theirs[1]} x {theirs[0]} with {theirs[2]}.",
            "compare images of one size",
        )
