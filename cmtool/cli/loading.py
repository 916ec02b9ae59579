"""Loading a data set with its progress shown: used wherever a command needs the data themselves."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from cmtool.cli.output import Output, ProgressUpdate

if TYPE_CHECKING:
    from cmtool.config.schema import DataConfig
    from cmtool.data.dataset import Dataset

_SAID = {
    "packing": "packing {total:,} image{s} into the cache; the next start reads that copy",
    "fetching": "fetching the data set, {total:,} bytes; an interrupted download is resumed",
}


def load_data(table: DataConfig, output: Output) -> Dataset:
    """Load the data of a run; a first-time packing or download is said once and shown as a bar on stderr.

    Raises:
        UserError: see `cmtool.data.load.load_dataset`.
    """
    from cmtool.data.load import load_dataset

    with ExitStack() as stack:
        bars: dict[str, ProgressUpdate] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in bars:
                stack.close()  # a terminal shows one bar at a time
                output.say(_SAID[stage].format(total=total or 0, s="s" * (total != 1)))
                bars[stage] = stack.enter_context(output.progress(total, stage))
            bars[stage](completed=done)

        return load_dataset(table, progress)
