"""A data set, in memory or memory-mapped: index -> (image in [-1, 1], label), and a summary of where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.data.images import from_uint8
from cmtool.errors import DataError


@dataclass(frozen=True)
class Summary:
    """What a source held: files found, images used, files skipped by reason, and exact duplicates among the used."""

    source: str
    found: int
    used: int
    duplicates: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    path: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "source": self.source,
            "path": self.path,
            "found": self.found,
            "used": self.used,
            "skipped": dict(self.skipped),
            "duplicates": self.duplicates,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W), uint8 or (toy data) float32, with labels if the run is conditioned on them.

    `fingerprint` is a hash of the content: images, labels and shape. `storage` may hold more images than belong to the
    set: `rows` are those that do, in order (None: all), so that a part of a memory-mapped file stays in its file.
    `held_out` are the images of the same source that were kept from training, to judge by: those whose keys lie below
    `held_below` (see `cmtool.data.holdout`). `beside` (N, C', H, W) are the pictures of pairs that a network is
    conditioned on, stored as the images are. `latent` says how the latents of an autoencoder, float16 (N, 2C, H, W)
    with means before deviations, were made.
    """

    storage: Tensor
    labels: Tensor | None
    fingerprint: str
    info: Summary
    class_names: tuple[str, ...] | None = None
    classes: int | None = None
    beside: Tensor | None = None
    rows: Tensor | None = None
    held_out: Dataset | None = None
    held_below: float = 0.0
    latent: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.storage if self.rows is None else self.rows)

    @property
    def images(self) -> Tensor:
        """All images at once, (N, C, H, W); a copy where they are a part of the storage."""
        return self.storage if self.rows is None else self.storage.index_select(0, self.rows)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        return None if self.labels is None else self.classes

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.storage.shape[1]) // (1 if self.latent is None else 2)

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return int(self.storage.shape[2])

    @property
    def float_samples(self) -> bool:
        """Whether samples are points, which stay floats, rather than pictures, which are quantized."""
        return self.storage.is_floating_point() and self.latent is None

    @property
    def summary(self) -> dict[str, Any]:
        """Plain values about the source: found, used, skipped by reason, duplicates, classes."""
        names = None if self.class_names is None else list(self.class_names)
        return {**self.info.as_dict(), "classes": self.num_classes, "class_names": names}

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """Return float32 images in [-1, 1] or mean latents, (B, C, H, W), and int64 labels (B,) or None, on `device`.

        Bytes are copied to the device and become floats there, which takes a quarter of the traffic.
        """
        images = self.take(indices).to(device)
        labels = None if self.labels is None else self.labels.index_select(0, indices).to(device)
        if self.latent is not None:
            return images[:, : self.channels].float(), labels
        return (images if images.is_floating_point() else from_uint8(images)), labels

    def drawn(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Return latents (B, C, H, W) of these images: mean plus deviation times unit noise."""
        mean, deviation = self.take(indices).float().chunk(2, dim=1)
        return torch.addcmul(mean, deviation, noise)

    def pairs(self, indices: Tensor) -> Tensor | None:
        """Return the pictures beside these images as floats in [-1, 1], (B, C', H, W); None: there are none."""
        return None if self.beside is None else from_uint8(self.beside.index_select(0, self._places(indices)))

    def take(self, indices: Tensor) -> Tensor:
        """Return some images as they are stored, (B, C, H, W)."""
        # Several times faster than storage[indices].
        return self.storage.index_select(0, self._places(indices))

    def _places(self, indices: Tensor) -> Tensor:
        """Return where images are in the storage."""
        return indices if self.rows is None else self.rows[indices]

    def subset(self, indices: Tensor) -> Dataset:
        """Return the data set of the given rows (copied), with a fingerprint of its own."""
        images, labels = self.take(indices), None if self.labels is None else self.labels[indices]
        info = replace(self.info, used=len(images), duplicates=count_duplicates(images))
        beside = None if self.beside is None else self.beside.index_select(0, self._places(indices))
        own = fingerprint(images, labels)
        return replace(self, storage=images, rows=None, labels=labels, beside=beside, info=info, fingerprint=own)

    def renumbered(self, places: Sequence[int], names: Sequence[str]) -> Dataset:
        """Return the data set with its class i called number `places[i]`; `names` are all classes in the new order."""
        if self.labels is None:
            return self
        labels = torch.tensor(places, dtype=self.labels.dtype)[self.labels]
        held_out = None if self.held_out is None else self.held_out.renumbered(places, names)
        return replace(self, labels=labels, class_names=tuple(names), held_out=held_out)


class Fingerprint:
    """Hashes image bytes as they stream by, then labels, type and shape, into 32 hexadecimal digits."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def update(self, images: NDArray[Any]) -> None:
        """Add the next images, in order."""
        self._digest.update(np.ascontiguousarray(images).tobytes())

    def finish(self, dtype: str, shape: tuple[int, ...], labels: NDArray[np.int64] | None) -> str:
        """Return the digits for everything added."""
        if labels is not None:
            self._digest.update(labels.tobytes())
        self._digest.update(f"{dtype} {tuple(shape)}".encode())
        return self._digest.hexdigest()


def fingerprint(images: Tensor, labels: Tensor | None) -> str:
    """Return 32 hexadecimal digits that identify the content: bytes, labels, type and shape."""
    made = Fingerprint()
    for start in range(0, len(images), 4096):
        made.update(images[start : start + 4096].numpy())
    dtype = str(images.dtype).removeprefix("torch.")
    return made.finish(dtype, tuple(images.shape), None if labels is None else labels.numpy())


def count_duplicates(images: Tensor) -> int:
    """Return how many images repeat an earlier one exactly."""
    rows = {hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest() for image in images}
    return len(images) - len(rows)


def from_tensors(
    images: Tensor,
    labels: Tensor | None,
    source: str,
    class_names: tuple[str, ...] | None = None,
    classes: int | None = None,
) -> Dataset:
    """Make a data set from tensors in memory; `classes` defaults to the number of names, else the largest label + 1."""
    if not len(images):
        raise DataError(f"{source}: there is no image to use.")
    if labels is not None and classes is None:
        classes = len(class_names) if class_names else int(labels.max()) + 1
    info = Summary(source, len(images), len(images), count_duplicates(images))
    return Dataset(images, labels, fingerprint(images, labels), info, class_names, classes)


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def describe(data: Dataset) -> list[str]:
    """Return the lines shown at start-up: images and their size, classes, duplicates, and files skipped by reason."""
    info, names = data.info, data.class_names
    kind = "points" if data.float_samples else "images"
    if data.latent is not None:
        kind = f"latents of {data.latent['pixels'][1]}-pixel images"
    size = "in the plane" if data.float_samples else f"of {data.resolution} x {data.resolution} x {data.channels}"
    lines = [f"{info.source}: {_plural(len(data), kind.removesuffix('s'))} {size}"]
    if data.labels is not None:
        counts = torch.bincount(data.labels, minlength=data.classes or 0)
        lines.append(
            f"{_plural(len(counts), 'class', 'classes')}, {int(counts.min()):,} to {int(counts.max()):,} {kind} each"
        )
        empty = [
            names[i] if names and i < len(names) else str(i) for i in torch.nonzero(counts == 0).flatten().tolist()
        ]
        if empty:
            lines.append(f"without any image: {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}")
    if info.duplicates:
        lines.append(f"{_plural(info.duplicates, 'exact duplicate')} among them (kept)")
    if info.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(info.skipped.items()))
        lines.append(f"skipped {sum(info.skipped.values()):,} of {info.found:,} files: {reasons}")
    return [*lines, *info.notes]
