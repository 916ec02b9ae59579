"""Images kept from training, chosen by their content: the reference of a run on a user's own images.

Every image has a key in [0, 1), a hash of its pixels as training sees them, and is held out if the key lies below the
share. So the choice is the same whether the images come from a folder, an archive, an array or a packed file, in any
order and among any others. An image stays on its side of the split when others are added, as do its exact duplicates.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.data.dataset import Dataset
from cmtool.errors import UserError
from cmtool.files.atomic import atomic_write
from cmtool.files.cache import cache_dir

MOST = 2000  # images held out
LEAST = 10  # images that figures need
# From this many pixels on, keys are kept in the cache: hashing a gigabyte takes a second or two, and reading it more.
LARGE = 2**30
_BLOCK = 4096


def content_keys(images: Tensor) -> NDArray[np.float64]:
    """Return the key of each image (N, C, H, W): 53 bits of the BLAKE2b of its bytes, as a number in [0, 1)."""
    keys = np.empty(len(images), np.uint64)
    for start in range(0, len(images), _BLOCK):
        for row, image in enumerate(images[start : start + _BLOCK].contiguous().numpy(), start):
            keys[row] = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _known_keys(data: Dataset) -> NDArray[np.float64]:
    """Return the keys of a data set; those of a large one are kept, since hashing reads every pixel."""
    images = data.images
    if images.numel() * images.element_size() < LARGE:
        return content_keys(images)
    path = cache_dir() / "keys" / f"{data.fingerprint}.npy"
    with suppress(OSError, ValueError, EOFError):
        kept = np.load(path, allow_pickle=False)
        if kept.shape == (len(data),) and kept.dtype == np.float64:
            return kept
    keys = content_keys(images)
    with suppress(OSError, UserError), atomic_write(path) as temporary:  # a full disk costs time, not the run
        np.save(temporary, keys)
    return keys


def hold_out(data: Dataset, share: float) -> Dataset:
    """Return the images to train on, with the others as their `held_out`; all of them where too few would be held out.

    At most `MOST` are held out, those with the smallest keys: more images lower the bound, so that none that was
    trained on is ever held out because some were added.

    Args:
        data: all images.
        share: of them, in [0, 1); 0 holds nothing out.
    """
    if share <= 0:
        return data
    keys = _known_keys(data)
    bound = share_of(keys, share)
    chosen = keys < bound
    count = int(chosen.sum())
    if count < LEAST or len(data) - count < LEAST:
        return replace(data, info=replace(data.info, notes=(*data.info.notes, _too_few(len(data), share, count))))
    note = f"{count:,} of {len(data):,} images are held out of training, to judge by (data.holdout = {share:g})"
    train, held = (_part(data, torch.from_numpy(np.flatnonzero(rows))) for rows in (~chosen, chosen))
    info = replace(train.info, notes=(*train.info.notes, note))
    return replace(train, held_out=held, held_below=bound, info=info)


def share_of(keys: NDArray[np.float64], share: float) -> float:
    """Return the bound below which keys of held-out images lie: `share`, or less where that means more than `MOST`."""
    below = np.sort(keys[keys < share])
    return share if len(below) <= MOST else float(below[MOST])


def _part(data: Dataset, rows: Tensor) -> Dataset:
    """Return the images in the ascending `rows`, which stay where they are stored."""
    digest = hashlib.blake2b(f"{data.fingerprint} part".encode(), digest_size=16)
    digest.update(rows.numpy().tobytes())
    labels = None if data.labels is None else data.labels[rows]
    within = rows if data.rows is None else data.rows[rows]
    info = replace(data.info, used=len(rows))
    return replace(data, rows=within, labels=labels, fingerprint=digest.hexdigest(), info=info)


def _too_few(count: int, share: float, held: int) -> str:
    """Say why nothing is held out, and how many images it would take."""
    if count < 2 * LEAST:
        return f"{count:,} images are too few to hold any out: there are no figures (at least {2 * LEAST} are needed)"
    needed = min(0.5, 2 * LEAST / count)  # twice the least, because the number varies by chance
    return (
        f"no images are held out: {share:g} of {count:,} came to {held}, figures need at least {LEAST} on both sides; "
        f"--set data.holdout={needed:.2g} holds out enough"
    )
