"""Pictures that a network sees beside its noisy input: computed from the images, or from a second source of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from cmtool.config.condition import Condition, condition_of
from cmtool.config.judgments import held_out_data
from cmtool.config.schema import DataConfig
from cmtool.data.builtin import BUILTIN
from cmtool.data.dataset import Dataset
from cmtool.data.decode import fit_image, read_image
from cmtool.data.images import from_uint8
from cmtool.data.listing import list_folder
from cmtool.data.load import load_dataset
from cmtool.errors import DataError

LUMA = (0.299, 0.587, 0.114)
Conditions = Callable[[Sequence[int]], Tensor]


def luma(images: Tensor) -> Tensor:
    """Return the brightness (B, 1, H, W) of images (B, C, H, W): BT.601 of three or four channels, else the first."""
    if images.shape[1] < 3:
        return images[:, :1]
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images[:, :3] * weights).sum(1, keepdim=True)


def derived(images: Tensor, condition: Condition) -> Tensor:
    """Return the condition (B, K, H, W) in [-1, 1] of images (B, C, H, W) in [-1, 1].

    superres: the mean of every block, spread over it. edges: the length of the central differences of the brightness.
    """
    if condition.kind == "superres":
        small = F.avg_pool2d(images, condition.factor)
        return small.repeat_interleave(condition.factor, 2).repeat_interleave(condition.factor, 3)
    if condition.kind == "gray":
        return luma(images)
    padded = F.pad(luma(images), (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return 2 * (across**2 + down**2).sqrt().clamp(max=1.0) - 1


def split(images: Tensor, condition: Condition | None, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return images (B, C, H, W) of a training batch, and their conditions: further channels, or computed; or None."""
    if condition is None:
        return images, None
    if condition.is_derived:
        return images, derived(images, condition)
    return images[:, :channels], images[:, channels:]


_NAMING = ("source", "path", "kind", "resolution", "channels", "condition", "size", "fit", "filter", "small", "holdout")


@lru_cache(maxsize=2)
def _unseen_data(*values: Any) -> Dataset:
    """Return what training held out of the data that these entries of a header name, else all of them.

    Built-in pictures that no run trains on are the kind "heldout"; digits are all trained on unless a kind is named.
    """
    data = dict(zip(_NAMING, values, strict=True))
    table = held_out_data({"data": data})
    if table is None:
        source, kind = data["source"], data["kind"]
        if data["path"] is None and source in BUILTIN and (kind == "train" or (kind is None and source != "digits")):
            kind = "heldout"
        named = {"source": "folder", "path": data["path"]} if data["path"] else {"source": source}
        rest = {"kind": kind, "resolution": data["resolution"], "channels": data["channels"], "holdout": 0.0}
        table = DataConfig.model_validate(named | rest)
    found = load_dataset(table.model_copy(update={"condition": data["condition"]}))
    return found.held_out or found


def own_conditions(data: Mapping[str, Any]) -> Conditions:
    """Return conditions from the model's own data: seed s sees picture s, counted round, of those held out of training.

    `data` is the entry of its header. Raises `DataError` if the data are not here.
    """
    seen = condition_of(data)
    assert seen is not None
    try:
        found = _unseen_data(*(data.get(key) for key in _NAMING))
    except ValidationError:
        raise DataError(
            "the data that the model was trained on are not known here, and it is conditioned on pictures.",
            "name one: cmtool sample --condition FILE",
        ) from None

    def get(seeds: Sequence[int]) -> Tensor:
        index = torch.tensor([seed % len(found) for seed in seeds])
        pairs = found.pairs(index)
        return derived(found.batch(index)[0], seen) if pairs is None else pairs

    return get


def picture_conditions(path: Path, data: Mapping[str, Any]) -> Conditions:
    """Return conditions made of a picture, or of the pictures in a folder in turn, for a model of such data.

    A picture becomes what training made of its images; for superres it may have the small side already, and for pairs
    it is the condition itself.

    Raises:
        DataError: a missing or unreadable file, or a folder without pictures.
    """
    seen, side, channels = condition_of(data), data["resolution"], data["channels"]
    assert seen is not None
    files = [path / name for name in list_folder(path).images] if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no pictures.")
    found = []
    for file in files:
        pixels = read_image(file, channels)
        small = pixels.shape[:2] == (side // seen.factor,) * 2
        fitted = np.array(pixels if small else fit_image(pixels, side))
        image = from_uint8(torch.from_numpy(fitted).permute(2, 0, 1)[None])
        if small and seen.kind == "superres":
            found.append(image.repeat_interleave(seen.factor, 2).repeat_interleave(seen.factor, 3))
        else:
            found.append(derived(image, seen) if seen.is_derived else image)
    bank = torch.cat(found)
    return lambda seeds: bank[torch.tensor([seed % len(bank) for seed in seeds])]
