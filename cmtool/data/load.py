"""From a preset's [data] table to a data set."""

from __future__ import annotations

from cmtool.config.schema import DataConfig
from cmtool.data.builtin import BUILTIN
from cmtool.data.dataset import Dataset
from cmtool.errors import DataError


def load_dataset(cfg: DataConfig) -> Dataset:
    """Load the data set of a run.

    Raises:
        DataError: the source is missing, empty, unreadable or of another shape than the configuration says.
    """
    if cfg.path is None and cfg.source in BUILTIN:
        return BUILTIN[cfg.source](cfg)
    raise DataError(f"{cfg.source}: no path given.")
