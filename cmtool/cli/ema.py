"""`cmtool ema`: computes a moving average of another width after training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Json, Quiet

# A combination further than this from the requested profile is a different average.
LARGE_ERROR = 0.1


@dataclass(frozen=True, kw_only=True)
class EmaCommand:
    """The options of `cmtool ema`."""

    run: Annotated[Path, typer.Argument(help="Run folder that kept snapshots (train.snapshot_every).")]
    std: Annotated[float, typer.Option("--std", help="Relative width of the average, e.g. 0.05.")]
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Model file; default RUN/ema-STD.safetensors.")] = None
    json: Json = False
    quiet: Quiet = False


@command
def ema(given: EmaCommand) -> None:
    """Make the moving average of another width from the snapshots that a run kept.

    Example: cmtool train-ct --preset digits --set train.ema.kind=power --set train.snapshot_every=100 --name kept,
    then: cmtool ema runs/kept --std 0.05
    """
    from cmtool.cli.output import Output
    from cmtool.training.posthoc import reconstruct

    output = Output(given.json, given.quiet)
    made = reconstruct(given.run, given.std, given.out or given.run / f"ema-{given.std:g}.safetensors")
    if made["error"] > LARGE_ERROR:
        output.warn(
            f"the snapshots make this average only to {made['error']:.0%}: keep more of them, or two averages "
            "of different widths (train.extra_emas)."
        )
    output.say(f"power average of width {given.std:g} at step {made['step']} from {made['snapshots']} snapshots")
    output.result(made["model"])
    output.json(made)
