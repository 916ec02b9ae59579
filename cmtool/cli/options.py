"""Options that several commands share, so that each has one name, one meaning and one help text; and lists as typed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cmtool.cli import complete
from cmtool.errors import UsageError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "fp64"]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Model file, run folder or published name; default: $CMTOOL_MODEL or the newest run.",
        autocompletion=complete.models,
    ),
]
Device = Annotated[DeviceName, typer.Option("--device", help="Where to compute; auto takes the fastest present.")]
Precision = Annotated[PrecisionName, typer.Option("--precision", help="Number format; auto suits the device.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all randomness.")]


def images_at_once(text: str, option: str = "--batch-size") -> int | None:
    """Return a number of images, None for "auto".

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"{option} '{text}' must be a number of images from 1 up, or auto.")
    return int(text)


BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        parser=images_at_once,
        metavar="N|auto",
        help="Images computed together, or auto; changes speed alone.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; the path is printed.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No talk and no progress on stderr.")]
Preset = Annotated[
    str,
    typer.Option(
        "--preset", "-p", help="Name of a preset (see cmtool presets) or a TOML file.", autocompletion=complete.presets
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", help="Recipe of the preset, or any method by name.", autocompletion=complete.recipes
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, e.g. --set train.lr=1e-4; may be repeated.", metavar="KEY=VALUE"),
]
Guidance = Annotated[float | None, typer.Option("--guidance", min=0, help="Guidance scale; 1: none.")]
Interval = Annotated[str | None, typer.Option("--guidance-interval", help="Noise levels that are guided, e.g. 0.2,5.")]
Weak = Annotated[str | None, typer.Option("--weak", help="A worse teacher to be guided away from (autoguidance).")]


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """How a command's samples are guided; a base, which stands in the help behind the bases named after it."""

    guidance: Guidance = None
    guidance_interval: Interval = None
    weak: Weak = None

    def guided(self) -> dict[str, Any]:
        """Return the options as fields of a `Wish` (`cmtool.api.sample`)."""
        interval = self.guidance_interval
        levels = None if interval is None else parse_floats(interval, "--guidance-interval")
        return {"guidance": self.guidance, "interval": levels, "weak": self.weak}


def sub_app(help: str) -> typer.Typer:
    """Return a group of commands (`cmtool edit inpaint`) with plain help, shown when nothing is asked."""
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None, no_args_is_help=True)


# A list of seeds typed by hand; a larger one is a slip of the keyboard and would only fill memory.
MOST_SEEDS = 10_000_000


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """Return the numbers of a comma-separated list.

    Raises:
        UsageError: if an entry is no number.
    """
    return tuple(_number(entry, option) for entry in _entries(text, option))


def _entries(text: str, option: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise UsageError(f"{option} '{text}' has an empty entry; write numbers with commas between them.")
    return entries


def _number(entry: str, option: str) -> float:
    try:
        return float(entry)
    except ValueError:
        raise UsageError(f"{option}: '{entry}' is no number.") from None


def parse_ints(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of a comma-separated list with ranges: "37,40-43" is 37, 40, 41, 42, 43.

    Raises:
        UsageError: if an entry is neither a whole number nor a rising range.
    """
    values: list[int] = []
    for entry in _entries(text, option):
        low, dash, high = entry.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise UsageError(f"{option}: '{entry}' is neither a whole number nor a range such as 40-47.")
        first, last = int(low), int(high or low)
        if last < first:
            raise UsageError(f"{option}: the range '{entry}' runs backwards.")
        if len(values) + last - first >= MOST_SEEDS:
            raise UsageError(f"{option} names more than {MOST_SEEDS:,} numbers.")
        values.extend(range(first, last + 1))
    return tuple(values)
