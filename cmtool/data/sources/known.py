"""Published data sets by name: where they are looked for, and where they can be downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cmtool.config.schema import DataConfig
from cmtool.errors import DataError
from cmtool.files.cache import cache_dir
from cmtool.files.download import Download, download
from cmtool.talk import SILENCE, Talk

CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"


@dataclass(frozen=True)
class Known:
    """A published data set: its names on disk and its address, with MD5 and size if no login is needed to fetch it."""

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
    """Return the folder for published data sets: `$CMTOOL_DATA`, else `data` in the cache folder."""
    given = os.environ.get("CMTOOL_DATA")
    return Path(given).expanduser() if given else cache_dir() / "data"


def _fetch(file: Download, talk: Talk) -> Path:
    """Download a data set; `talk` hears of it once the first bytes are there."""
    with talk.progress(file.size, "fetching") as update:
        said = False

        def progress(done: int, total: int | None) -> None:
            nonlocal said
            if not said:
                talk.say(f"fetching the data set, {file.size:,} bytes; an interrupted download is resumed")
            said = True
            update(completed=done)

        return download(file, progress)


def locate(cfg: DataConfig, talk: Talk = SILENCE) -> Path:
    """Return the path of the data that a [data] table names; CIFAR-10 is downloaded if it is missing.

    Raises:
        DataError: the data are missing; the message names the expected path and the address.
        OfflineError: the data have to be downloaded and cannot be.
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
        file = Download(known.url, data_dir() / known.names[-1], size=known.size, digest=f"md5:{known.md5}")
        return _fetch(file, talk)
    raise DataError(
        f"{cfg.source} is not at {data_dir() / known.names[0]}; it comes from {known.url} and cannot be fetched here.",
        f"put it there, or name its place with --data PATH (CMTOOL_DATA moves {data_dir()})",
    )
