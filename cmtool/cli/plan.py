"""`cmtool plan`: what training on these pictures would be in several times and at several resolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Device, Json, Quiet

Data = Annotated[str, typer.Option("--data", help="Folder or file of images, or the name of a data set.")]
Times = Annotated[
    str | None, typer.Option("--times", help="Times to compare, e.g. 10m,1h,8h; usually 5 min to a night.")
]
Anyway = Annotated[bool, typer.Option("--anyway", help="Plan for fewer than 50 pictures too.")]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `cmtool plan`, in the order of the help."""

    data: Data
    times: Times = None
    device: Device = "auto"
    anyway: Anyway = False
    json: Json = False
    quiet: Quiet = False


@command
def plan(options: PlanOptions) -> None:
    """Say what training on your pictures would be in several times and at several sizes, and what to expect of it.

    Pictures are looked at and this machine is timed for some seconds. cmtool train-ct --data takes what is marked.

    Example: cmtool plan --data photos/
    """
    from cmtool.api.plan_run import plan as compare
    from cmtool.cli.output import Output
    from cmtool.config.laws import TIMES

    output = Output(options.json, options.quiet)
    times = TIMES if options.times is None else _times(options.times)
    found = compare(options.data, times=times, device=options.device, talk=output, anyway=options.anyway)
    _show(found, list(times), options.data, output)
    output.json(found)


def _times(text: str) -> dict[str, float]:
    from cmtool.machine.stopping import parse_span
    from cmtool.units import human_time

    return {human_time(seconds): seconds for seconds in map(parse_span, text.split(","))}


def _show(found: dict[str, Any], times: list[str], data: str, output: Any) -> None:
    import shlex

    from cmtool.config.laws import EXPECT

    cells = {(row["resolution"], row["time"]): row for row in found["rows"]}
    sides = sorted({side for side, _ in cells})
    rows = [[f"{side} px", *(_cell(cells.get((side, name))) for name in times)] for side in sides]
    machine, pictures = found["machine"], found["pictures"]
    threads = machine["threads"]
    where = f"{threads} thread{'s' * (threads != 1)}" if machine["device"] == "cpu" else machine["device"]
    title = f"{pictures['count']:,} pictures on {where}: network, steps of the last stage, what to expect"
    output.table(title, ["size", *times], rows)
    words = {row["expect"] for row in found["rows"]}
    output.table("", ["", "expect"], [[word, sentence] for _, word, sentence in EXPECT if word in words])
    output.say(f"* is what cmtool train-ct --data {shlex.quote(data)} --time ... takes; --resolution takes another.")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    mark = "*" if row["chosen"] else ""
    return f"{row['network']}, {_short(row['stages'][-1]['steps'])}: {row['expect']}{mark}"


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"
