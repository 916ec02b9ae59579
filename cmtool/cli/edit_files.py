"""Where edits go: one picture, a folder of pictures, or a grid of what was given and what was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cmtool.cli.output import command_line
from cmtool.data.images import save_grid, save_png
from cmtool.data.sample_files import check_place
from cmtool.editing.regions import resize
from cmtool.editing.tasks import uncertainty_map

if TYPE_CHECKING:
    from cmtool.cli.edit_run import Request, Result
    from cmtool.cli.output import Output

USUAL_FOLDER = Path("edits")


@dataclass(frozen=True)
class Place:
    """What is written: each edit in a folder of its own name, one picture, or one grid."""

    kind: Literal["single", "grid", "folder"]
    path: Path


def check_outputs(request: Request) -> Place:
    """Decide what is written where, and refuse places that cannot be written before any work."""
    given, images = request.given, request.given["images"]
    several = request.keep > 1
    out = given["out"]
    if out is None:
        alone = USUAL_FOLDER / f"{images[0].stem}-{request.task}.png"
        kind: Literal["single", "grid"] = "grid" if several or given["grid"] else "single"
        place = Place(kind, alone) if len(images) == 1 or given["grid"] else Place("folder", USUAL_FOLDER)
    elif out.is_dir() or out.suffix == "":
        place = Place("folder", out)
    else:
        place = Place("grid" if several or len(images) > 1 or given["grid"] else "single", out)
    check_place(place.path / "x" if place.kind == "folder" else place.path)
    return place


def write_results(request: Request, results: Sequence[Result], place: Place, output: Output) -> list[dict[str, Any]]:
    """Write all results, print their paths, and return one document for each picture."""
    text = {
        "task": request.task,
        "model": str(request.found.path),
        "model_hash": request.found.digest,
        "times": ",".join(f"{level:.9g}" for level in request.plan.times),
        "guidance": f"{request.guidance:g}",
        "command": command_line(),
    }
    paths = [_write_one(request, result, place, text) for result in results]
    for result in results:
        _say_unchanged(result, output)
    if place.kind == "grid":
        _write_grid(results, place.path, text)
        paths = [[place.path] for _ in results]
    for path in dict.fromkeys(path for group in paths for path in group):
        output.result(str(path))
    return [_document(request, result, group, place) for result, group in zip(results, paths, strict=True)]


def _write_one(request: Request, result: Result, place: Place, text: dict[str, str]) -> list[Path]:
    """Write what belongs to one picture; returns the paths of its edits."""
    if request.given.get("uncertainty"):
        save_png(uncertainty_map(result.images), _uncertainty_path(request, result, place), text)
    if place.kind == "grid":
        return []
    paths = []
    for row, seed in enumerate(result.seeds):
        number = f"-{row}" if len(result.seeds) > 1 else ""
        path = place.path
        if place.kind == "folder":
            path = place.path / f"{result.name.stem}-{request.task}{number}.png"
        edited, photo = result.edited(row), result.subject.photo
        dpi = photo.dpi if edited.shape == photo.pixels.shape else None
        save_png(edited, path, {**text, "seed": str(seed)}, profile=photo.profile, dpi=dpi)
        paths.append(path)
    return paths


def _say_unchanged(result: Result, output: Output) -> None:
    same = [str(seed) for row, seed in enumerate(result.seeds) if result.subject.unchanged(result.edited(row))]
    if same:
        where = "in the hole " if result.subject.mask is not None else ""
        output.warn(f"{result.name}: the edit changes nothing {where}(seed {', '.join(same)})")


def _uncertainty_path(request: Request, result: Result, place: Place) -> Path:
    folder = place.path if place.kind == "folder" else place.path.parent
    stem = (
        place.path.stem
        if place.kind != "folder" and len(request.given["images"]) == 1
        else f"{result.name.stem}-{request.task}"
    )
    return folder / f"{stem}-uncertainty.png"


def _write_grid(results: Sequence[Result], path: Path, text: dict[str, str]) -> None:
    """One row a picture: what was given, then its variations, all at the first picture's size and in sRGB."""
    rows: list[NDArray[np.uint8]] = []
    for result in results:
        row = [result.subject.shown, *map(result.edited, range(len(result.seeds)))]
        rows.extend(map(result.subject.photo.to_srgb, row))
    height, width = rows[1].shape[:2]
    # Every row holds the given picture and as many variations, so that a wide row needs no wrapping up to 16.
    per_row = 1 + len(results[0].seeds)
    save_grid(np.stack([resize(row, height, width) for row in rows]), path, per_row if per_row <= 17 else None, text)


def _document(request: Request, result: Result, paths: list[Path], place: Place) -> dict[str, Any]:
    document: dict[str, Any] = {
        "image": str(result.name),
        "out": [str(path) for path in paths],
        "seeds": list(result.seeds),
        "residuals": [round(value, 6) for value in result.residuals],
        "notes": list(result.subject.notes),
    }
    if request.given.get("uncertainty"):
        document["uncertainty"] = str(_uncertainty_path(request, result, place))
    return document
