"""The path of a training image: which images a step sees, mirrored or augmented, with which label, on which device.

All of this depends only on (seed, step), so a run can resume without saving any of it. On a GPU the next step's
images are prepared while it computes this one's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from cmtool.config.schema import RunConfig
from cmtool.data.augment import augmented
from cmtool.data.dataset import Dataset
from cmtool.errors import DataError
from cmtool.rng import batch_normal, batch_uniform, generator, moved

T = TypeVar("T")
# Images, their labels or None, and what networks are told of their augmentation or None.
Rows = tuple[Tensor, Tensor | None, Tensor | None]
Key = tuple[int, int, int]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Order of the whole data set in one epoch; a batch may span two epochs, hence the small cache."""
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> Tensor:
    """Return the indices of the global batch of `step`, shape (batch_size,), int64 in [0, size).

    They are positions step * batch_size + i of an endless sequence of shuffled epochs: every image is seen once per
    epoch, batches may span two epochs, and a batch may be larger than the data set.

    Raises:
        DataError: the data set is empty.
    """
    if size < 1:
        raise DataError("the data set is empty: there is nothing to draw batches from.")
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // size, (last - 1) // size + 1):
        begin, end = max(first - epoch * size, 0), min(last - epoch * size, size)
        parts.append(_permutation(seed, epoch, size)[begin:end])
    return torch.cat(parts)


def flip_mask(seed: int, step: int, batch_size: int) -> Tensor:
    """Return which images of the global batch of `step` are mirrored: (batch_size,) bool, each with probability 1/2."""
    return batch_uniform((batch_size,), seed, "flip", step) < 0.5


def some_images(config: RunConfig, dataset: Dataset, device: torch.device, limit: int) -> tuple[Tensor, Tensor | None]:
    """Return `limit` images (0: all) drawn by the seed, followed by their mirror images where training mirrors.

    Labels are included if training uses them.
    """
    count = len(dataset)
    if 0 < limit < count:
        chosen = torch.randperm(count, generator=generator(config.train.seed, "reference"))[:limit]
    else:
        chosen = torch.arange(count)
    images, labels = dataset.batch(chosen)
    labels = labels if config.data.labels else None
    if config.data.flip:
        images = torch.cat([images, images.flip(-1)])
        labels = None if labels is None else torch.cat([labels, labels])
    return images.to(device), None if labels is None else labels.to(device)


class Batches:
    """Images and labels of a run's steps.

    `ahead` prepares each step's rows in a thread while the previous step is computed.
    """

    def __init__(
        self, config: RunConfig, dataset: Dataset, device: torch.device, dtype: torch.dtype, ahead: bool = False
    ) -> None:
        self.config, self.dataset, self.device, self.dtype = config, dataset, device, dtype
        self._ahead = Ahead(self._make) if ahead else None

    def take(self, step: int, start: int, count: int) -> Rows:
        """Return `count` rows of a step's global batch, from row `start` on.

        Images are (count, C, H, W) in [-1, 1], followed by the channels of pairs if there are any; labels are
        (count,), -1 where they are dropped, or None; augmentation labels are (count, L), or None where nothing is
        augmented.
        """
        return self._make(step, start, count) if self._ahead is None else self._ahead.take(step, start, count)

    def settle(self) -> None:
        """Wait until nothing is being prepared."""
        if self._ahead is not None:
            self._ahead.settle()

    def _make(self, step: int, start: int, count: int) -> Rows:
        train, rows = self.config.train, slice(start, start + count)
        chosen = batch_indices(train.seed, step, train.batch_size, len(self.dataset))[rows]
        images, labels = self.dataset.batch(chosen)
        if self.dataset.latent is not None:
            shape = (train.batch_size, *images.shape[1:])
            noise = batch_normal(shape, train.seed, "latents", step, start=start, count=len(images))
            images = self.dataset.drawn(chosen, noise)
        pairs = self.dataset.pairs(chosen)
        images = images if pairs is None else torch.cat([images, pairs], dim=1)
        if self.config.data.flip:
            flips = flip_mask(train.seed, step, train.batch_size)[rows]
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        images, told = augmented(
            self.config.recipe.augment,
            moved(images, self.device).to(self.dtype),
            train.seed,
            step,
            train.batch_size,
            start,
        )
        if not self.config.data.labels or labels is None:
            return images, None, told
        if train.label_dropout > 0:
            u = batch_uniform((train.batch_size,), train.seed, "label-dropout", step, start=start, count=count)
            labels = torch.where(u < train.label_dropout, torch.full_like(labels, -1), labels)
        return images, moved(labels, self.device), told


class Ahead(Generic[T]):
    """Answers `make(step, start, count)`, and meanwhile makes the same rows of the next step in a thread.

    `make` must depend only on its arguments. If a run goes back to a checkpoint, rows made too early are
    dropped; only time is lost.
    """

    def __init__(self, make: Callable[[int, int, int], T]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._waiting: dict[Key, Future[T]] = {}

    def settle(self) -> None:
        """Wait until the thread has made everything that was requested."""
        wait(self._waiting.values())

    def take(self, step: int, start: int, count: int) -> T:
        """Return make(step, start, count) and begin with the next step's."""
        made = self._waiting.pop((step, start, count), None)
        found = self._make(step, start, count) if made is None else made.result()
        late = [key for key in self._waiting if key[0] not in (step, step + 1)]
        for key in late:
            self._waiting.pop(key).cancel()
        self._waiting[step + 1, start, count] = self._pool.submit(self._make, step + 1, start, count)
        return found
