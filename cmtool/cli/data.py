"""`cmtool data make` and `cmtool data show`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Json, Quiet, sub_app
from cmtool.cli.output import Output

if TYPE_CHECKING:
    from cmtool.data.survey import Survey

app = sub_app("Make data sets and look at them.\n\nExample: cmtool data show photos/")

_MOST_CLASSES = 30  # rows of the table of classes; --json has all
LabelRule = Literal["folders", "prefix", "train", "test"]

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder, zip, npz, parquet, lmdb, .cmdata or a name such as cifar10.")
]
Kind = Annotated[
    LabelRule | None,
    typer.Option("--labels", help="Labels of a folder (its folders, or file-name prefixes); part of cifar10."),
]


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """Options of `cmtool data make`."""

    source: Source
    resolution: Annotated[int, typer.Option("--resolution", min=1, max=1024, help="Side of the squares in pixels.")]
    out: Annotated[Path, typer.Option("--out", "-o", help="The packed file.")]
    channels: Annotated[int, typer.Option("--channels", help="1 gray, 3 RGB, 4 RGB with alpha.")] = 3
    fit: Annotated[Literal["crop", "pad", "stretch"], typer.Option("--fit", help="How other shapes become square.")] = (
        "crop"
    )
    filter: Annotated[
        Literal["adm", "edm", "bicubic", "box", "lanczos"],
        typer.Option("--filter", help="adm: OpenAI's pixels (box halving, bicubic); edm: NVlabs' (Lanczos)."),
    ] = "adm"
    small: Annotated[
        Literal["skip", "upscale"], typer.Option("--small", help="Images smaller than the resolution.")
    ] = "skip"
    labels: Kind = None
    encode: Annotated[
        str | None, typer.Option("--encode", help="Write latents: an AutoencoderKL's folder or hub name.")
    ] = None
    norm: Annotated[
        Literal["edm2", "imf", "sd"],
        typer.Option("--norm", help="Of latents: deviation .5 or 1, or the autoencoder's own factor."),
    ] = "edm2"
    json: Json = False
    quiet: Quiet = False


@app.command(epilog="Example: cmtool data make photos/ --resolution 64 --out photos.cmdata")
@command
def make(options: MakeOptions) -> None:
    """Pack any data set into one memory-mapped file of equal squares."""
    from cmtool.data.packed import Rules
    from cmtool.data.survey import make as make_packed
    from cmtool.errors import UsageError

    if options.channels not in (1, 3, 4):
        raise UsageError(f"--channels is 1, 3 or 4, not {options.channels}.")
    output = Output(options.json, options.quiet)
    rules = Rules(options.resolution, options.channels, options.fit, options.filter, options.small)
    latents = None if options.encode is None else (options.encode, options.norm)
    header = make_packed(options.source, options.out, rules, options.labels, output, latents)
    for line in _packed_lines(header):
        output.say(line)
    output.result(str(options.out))
    output.json({"out": str(options.out), **header})


def _packed_lines(header: dict[str, Any]) -> list[str]:
    count, channels, side, _ = header["shape"]
    done = "packed as"
    if header.get("latent"):
        done, channels = "encoded as latents of", channels // 2
    lines = [f"{count:,} of {header['found']:,} files {done} {side} x {side} x {channels}"]
    lines += [f"skipped: {number:,} {reason}" for reason, number in header["skipped"].items()]
    if header["duplicates"]:
        lines.append(f"{header['duplicates']:,} exact duplicates (kept)")
    if header["labels"]:
        lines.append(f"{header['classes']:,} classes")
    return lines + header["notes"]


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options of `cmtool data show`."""

    source: Source
    grid: Annotated[Path | None, typer.Option("--grid", help="Write a picture of images spread over the set.")] = None
    num: Annotated[int, typer.Option("--num", min=1, max=4096, help="Images in the grid.")] = 64
    labels: Kind = None
    json: Json = False
    quiet: Quiet = False


@app.command(epilog="Example: cmtool data show photos.cmdata --grid photos.png")
@command
def show(options: ShowOptions) -> None:
    """Show what a data set holds: counts, sizes, classes, and a grid of images."""
    from cmtool.data.survey import survey

    output, grid = Output(options.json, options.quiet), options.grid
    found = survey(options.source, options.labels, options.num if grid else 0)
    if grid is not None:
        _save_grid(found, grid, options.source)
    _tables(output, found.facts)
    if grid is not None:
        output.say(f"grid: {grid}")
    output.json({**found.facts, "grid": None if grid is None else str(grid)})


def _save_grid(found: Survey, grid: Path, source: str) -> None:
    from cmtool.data import save_grid, save_scatter
    from cmtool.errors import DataError

    if found.points is not None:
        save_scatter(found.points, grid, text={"data": source})
    elif found.pictures is not None:
        save_grid(found.pictures, grid, text={"data": source})
    else:
        raise DataError(f"none of the images looked at in {source} can be decoded, so there is no grid.")


def _tables(output: Output, facts: dict[str, Any]) -> None:
    from cmtool.units import human_bytes

    names = ("source", "path", "images", "found", "duplicates", "resolution", "channels", "classes", "fingerprint")
    rows = [[name, _number(facts[name])] for name in names if facts.get(name) is not None]
    if latent := facts.get("latent"):
        rows += [["latents of", f"{latent['pixels'][1]}-pixel images"], ["autoencoder", latent["autoencoder"]]]
        rows += [["norm", latent["norm"]]]
    if facts.get("bytes"):
        rows.append(["size", human_bytes(facts["bytes"])])
    for title in ("skipped", "unusable", "sizes"):
        rows += [[f"{title}: {key}", _number(value)] for key, value in facts.get(title, {}).items()]
    rows += [["note", note] for note in facts.get("notes", [])]
    output.table("", ["property", "value"], rows)
    counts = facts.get("class_counts")
    if counts:
        shown = [[row["label"], row["name"], row["images"]] for row in counts[:_MOST_CLASSES]]
        output.table("", ["label", "name", "images"], shown)
        if len(counts) > _MOST_CLASSES:
            output.say(f"and {len(counts) - _MOST_CLASSES:,} more classes (see --json)")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
