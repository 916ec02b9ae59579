"""Which reader a path needs, told from what lies there."""

from __future__ import annotations

from pathlib import Path

from cmtool.config.schema import DataConfig
from cmtool.data.sources.base import Source
from cmtool.data.sources.folder import open_folder
from cmtool.errors import DataError


def open_source(path: str | Path, cfg: DataConfig | None = None) -> Source:
    """Open any data set that is read here; the reader is chosen by what lies at `path`.

    Raises:
        DataError: nothing is there, it is empty, or it is in no known form.
    """
    place = Path(path).expanduser()
    kind = cfg.kind if cfg else None
    if not place.exists():
        raise DataError(f"there is no data at {place}.", "give a folder of images or a data file with --data")
    return open_folder(place, kind)
