"""The published data sets by name: where they are looked for, and where they come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cmtool.config.schema import DataConfig
from cmtool.errors import DataError
from cmtool.files.cache import cache_dir
from cmtool.files.download import Download, Progress, download

CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"


@dataclass(frozen=True)
class Known:
    """A published data set: its names on disk, its address, and whether that address answers without a login."""

    names: tuple[str, ...]
    url: str
    md5: str | None = None
    size: int = 0


KNOWN = {
    "cifar10": Known(
        ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        CIFAR10_MD5,
        170_498_071,
    ),
    "imagenet64": Known(("imagenet64", "Imagenet64_train"), "https://image-net.org/download-images.php"),
    "imagenet32": Known(("imagenet32", "Imagenet32_train"), "https://image-net.org/download-images.php"),
    "lsun": Known(("lsun", "bedroom_train_lmdb", "cat"), "http://dl.yf.io/lsun/"),
    "celeba64": Known(("celeba", "img_align_celeba"), "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"),
}


def data_dir() -> Path:
    """Return where published data sets are looked for: `$CMTOOL_DATA`, else `data` in the cache folder."""
    given = os.environ.get("CMTOOL_DATA")
    return Path(given).expanduser() if given else cache_dir() / "data"


def locate(cfg: DataConfig, progress: Progress | None = None) -> Path:
    """Return where the data of a [data] table lies; CIFAR-10 is fetched when it is not there.

    Raises:
        DataError: it is not there; the sentence names the place and the address.
        OfflineError: it would have to be fetched and cannot be.
    """
    if cfg.path is not None:
        return Path(cfg.path.removeprefix("lsun:")).expanduser()
    if cfg.source not in KNOWN:
        raise DataError(f"the data source '{cfg.source}' needs a path.", "name a folder or file with --data")
    known = KNOWN[cfg.source]
    for name in known.names:
        if (data_dir() / name).exists():
            return data_dir() / name
    if known.md5:
        target = data_dir() / known.names[-1]
        return download(Download(known.url, target, size=known.size, digest=f"md5:{known.md5}"), progress)
    raise DataError(
        f"{cfg.source} is not at {data_dir() / known.names[0]}; it comes from {known.url} and cannot be fetched here.",
        f"put it there, or name its place with --data PATH (CMTOOL_DATA moves {data_dir()})",
    )
