"""The data sources by name: one row says all that is known of one before it is opened.

A new source is its name and row here, and its reader in the data room: a loader in `builtin.BUILTIN`, an address in
`sources.known.KNOWN`, or a form that `sources.sniff` recognizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

SourceName = Literal[
    "digits",
    "avatars",
    "shapes",
    "toy2d",
    "folder",
    "cifar10",
    "imagenet32",
    "imagenet64",
    "lsun",
    "celeba64",
    "npz",
    "packed",
]
DATA_SOURCES: tuple[SourceName, ...] = get_args(SourceName)


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source by its name.

    `usual` is (resolution, channels) of a built-in source, which needs no file; `points` says that its samples are
    floats in the plane and not pictures; `ending` marks a source that is a kind of file and needs a path ("": any).
    """

    usual: tuple[int, int] | None = None
    points: bool = False
    ending: str | None = None

    @property
    def built_in(self) -> bool:
        """Whether it needs no file."""
        return self.usual is not None

    @property
    def needs_path(self) -> bool:
        """Whether it is a kind of file, of which one must be named."""
        return self.ending is not None


SOURCES: dict[str, SourceInfo] = {
    "digits": SourceInfo(usual=(8, 1)),
    "avatars": SourceInfo(usual=(16, 3)),
    "shapes": SourceInfo(usual=(16, 3)),
    "toy2d": SourceInfo(usual=(1, 2), points=True),
    "folder": SourceInfo(ending=""),
    "cifar10": SourceInfo(),
    "imagenet32": SourceInfo(),
    "imagenet64": SourceInfo(),
    "lsun": SourceInfo(),
    "celeba64": SourceInfo(),
    "npz": SourceInfo(ending=".npz"),
    "packed": SourceInfo(ending=".cmdata"),
}


def named_source(path: str | None) -> SourceName | None:
    """Return the source that a word means where a path is allowed; None if it is a path, or no source has that name."""
    if path is None or Path(path).exists():
        return None
    return next((name for name in DATA_SOURCES if name == path), None)


def is_own(source: object, path: object) -> bool:
    """Whether a source is a user's own files, of which nothing is known in advance: no reference, no sampling times."""
    if isinstance(path, str) and named_source(path):
        return False
    row = SOURCES.get(str(source))
    return row is not None and (row.needs_path or (source == "lsun" and path is not None))


def source_of_path(path: str) -> str:
    """Return the kind of source that a path leads to, by its ending."""
    if path.startswith("lsun:"):
        return "lsun"
    suffix = Path(path).suffix
    return next((name for name, row in SOURCES.items() if row.ending and row.ending == suffix), "folder")
