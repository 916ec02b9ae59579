"""image-net.org's downsampled ImageNet (32 and 64 pixels): `train_data_batch_1 .. 10` as .npz or pickles."""

from __future__ import annotations

import re
from pathlib import Path

from cmtool.data.sources.arrays import DEVKIT_NOTE, Part, collect, npz_part, pickle_part
from cmtool.data.sources.base import Source, sign_file
from cmtool.errors import DataError

_BATCH = re.compile(r"train_data_batch_(\d+)(\.npz)?")
CLASSES = 1000
SQUASH_NOTE = "images were squashed to squares by the publisher: neither ADM's nor EDM's pixels"


def batch_files(folder: Path) -> list[Path]:
    """Return the training batches in a folder, sorted by number."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _BATCH.fullmatch(path.name))]
    return [path for _number, path in sorted(found)]


def read_class_map(path: Path) -> tuple[list[int], tuple[str, ...]]:
    """Read map_clsloc.txt (lines "n02119789 1 kit_fox") into ranks by sorted WordNet id and the ids themselves.

    Raises:
        DataError: it does not list every number from 1 to 1000 exactly once.
    """
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        wordnet = {int(row[1]): row[0] for row in rows}
    except (IndexError, ValueError):
        raise DataError(f"{path} is not in the form 'n02119789 1 kit_fox' per line.") from None
    if sorted(wordnet) != list(range(1, CLASSES + 1)) or len(set(wordnet.values())) != CLASSES:
        raise DataError(f"{path} does not list each class from 1 to {CLASSES} once.")
    names = tuple(sorted(wordnet.values()))
    rank = {name: index for index, name in enumerate(names)}
    return [rank[wordnet[number]] for number in range(1, CLASSES + 1)], names


def _mapped(part: Part, ranks: list[int]) -> Part:
    if part.labels is None or max(part.labels) >= CLASSES:
        raise DataError(f"{part.path} has labels outside 1 .. {CLASSES}.")
    return Part(part.path, part.count, [ranks[label] for label in part.labels], part.blocks)


def open_downsampled_imagenet(folder: Path) -> Source:
    """Open the batches. Labels 1..1000 become 0..999, in WordNet order if map_clsloc.txt is in the same folder.

    Raises:
        DataError: a batch or the class map is refused or damaged.
    """
    files = batch_files(folder)
    parts = [npz_part(path)[0] if path.suffix == ".npz" else pickle_part(path) for path in files]
    class_map = folder / "map_clsloc.txt"
    if class_map.is_file():
        ranks, names = read_class_map(class_map)
        parts = [_mapped(part, ranks) for part in parts]
        signature = sign_file("imagenet", *files, class_map)
        source = collect("downsampled ImageNet", folder, parts, signature, notes=(SQUASH_NOTE,))
        source.class_names, source.classes = names, CLASSES
        return source
    notes = (SQUASH_NOTE, DEVKIT_NOTE)
    return collect("downsampled ImageNet", folder, parts, sign_file("imagenet", *files), notes=notes)
