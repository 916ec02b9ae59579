"""`cmtool edit`: inpaint, colorize, superres, deblur, stroke, denoise: a person's own pictures, without retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmtool.cli.app import command
from cmtool.cli.edit_options import (
    DeblurOptions,
    DenoiseOptions,
    EditOptions,
    InpaintOptions,
    StrokeOptions,
    SuperresOptions,
    TunedOptions,
)
from cmtool.cli.options import parse_floats, parse_ints, sub_app
from cmtool.errors import UserError
from cmtool.files.atomic import check_place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cmtool.api.edit import How
    from cmtool.api.edits import Edited, Edits
    from cmtool.cli.output import Output

USUAL_FOLDER = Path("edits")

app = sub_app(
    "Edit pictures with a consistency model, without retraining.\n\n"
    "Example: cmtool edit inpaint --mask mask.png photo.png --model demo/avatars --num 6 --grid --out strip.png"
)


@app.command()
@command
def inpaint(options: InpaintOptions) -> None:
    """Fill what the mask paints white; every other pixel keeps its bytes.

    Without --mask: what is transparent in the picture. Levels up to 24 are black, from 231 on white; two alone are
    the two, whatever they are.

    Example: cmtool edit inpaint --mask mask.png photo.png --model demo/avatars --paste --out done.png
    """
    _run("inpaint", options, replace(_tuned(options), mask=options.mask, invert_mask=options.invert_mask))


@app.command()
@command
def colorize(options: TunedOptions) -> None:
    """Give a gray picture colors; the luma of every pixel stays.

    Example: cmtool edit colorize gray.png --model demo/avatars --num 8 --out grid.png
    """
    _run("colorize", options, _tuned(options))


@app.command()
@command
def superres(options: SuperresOptions) -> None:
    """Enlarge a small picture; each of its pixels stays the mean of its patch.

    --kernel bicubic is for pictures that image programs made small. With --paste a picture of any size is enlarged
    whole, in overlapping windows.

    Example: cmtool edit superres small.png --model demo/avatars --factor 2
    """
    how = replace(_tuned(options), factor=options.factor, kernel=options.kernel, noise=options.noise)
    _run("superres", options, how)


@app.command()
@command
def deblur(options: DeblurOptions) -> None:
    """Undo a Gaussian blur; where it left something, that is kept.

    Example: cmtool edit deblur blurred.png --sigma 1.5 --model demo/shapes --out sharp.png
    """
    _run("deblur", options, replace(_tuned(options), sigma=options.sigma, noise=options.noise))


@app.command()
@command
def stroke(options: StrokeOptions) -> None:
    """Turn a rough drawing into a picture; a larger first --t frees it more from the drawing.

    Example: cmtool edit stroke scribble.png --model demo/avatars --t 5.38,2.24
    """
    _run("stroke", options, _leveled(options))


@app.command()
@command
def denoise(options: DenoiseOptions) -> None:
    """Remove Gaussian noise of a known strength in one evaluation.

    Example: cmtool edit denoise noisy.png --model demo/avatars --sigma 0.3
    """
    _run("denoise", options, replace(_how(options), sigma=options.sigma))


def _how(options: EditOptions) -> How:
    """The request as far as all edits share it."""
    from cmtool.api.edit import How

    return How(
        label=options.label,
        fit=options.fit,
        paste=options.paste,
        batch_size=options.batch_size,
        device=options.device,
        precision=options.precision,
    )


def _leveled(options: StrokeOptions | InpaintOptions | SuperresOptions | DeblurOptions | TunedOptions) -> How:
    """Add noise levels, variations and their seed to a request."""
    return replace(
        _how(options),
        times=options.times if options.times in (None, "paper") else parse_floats(options.times, "--times"),
        steps=options.steps,
        indices=None if options.indices is None else parse_ints(options.indices, "--indices"),
        of=options.of,
        num=options.num,
        uncertainty=options.uncertainty,
        seed=options.seed,
    )


def _tuned(options: InpaintOptions | SuperresOptions | DeblurOptions | TunedOptions) -> How:
    return replace(
        _leveled(options),
        guidance=options.guidance,
        fresh=options.fresh,
        best_of=options.best_of,
        metric=options.metric,
    )


def _run(task: str, options: EditOptions, how: How) -> None:
    """Carry out an edit, and write and show what was made."""
    from cmtool.api.edit import perform
    from cmtool.cli.output import Output

    output = Output(options.json, options.quiet)
    place = _place(task, options, how)
    edits = perform(task, options.model, options.images, how, output)
    documents = _write(task, edits, place, how.uncertainty, output)
    output.json(
        {
            "task": task,
            "model": str(edits.model.path),
            "nfe": edits.plan.nfe,
            "times": list(edits.plan.times),
            "guidance": edits.plan.guidance,
            "candidates": edits.plan.candidates,
            "edits": documents,
        }
    )


# --- where edits go ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """What is written: each edit in a folder of its own name, one picture, or one grid; `alone`: of one picture."""

    kind: Literal["single", "grid", "folder"]
    path: Path
    alone: bool

    def of(self, task: str, edited: Edited, number: str = "") -> Path:
        """The file of one edit."""
        return self.path if self.kind != "folder" else self.path / f"{Path(edited.name).stem}-{task}{number}.png"

    def of_map(self, task: str, edited: Edited) -> Path:
        """The file of the map of how far a picture's variations differ."""
        if self.kind != "folder" and self.alone:
            return self.path.with_name(f"{self.path.stem}-uncertainty.png")
        folder = self.path if self.kind == "folder" else self.path.parent
        return folder / f"{Path(edited.name).stem}-{task}-uncertainty.png"


def _place(task: str, options: EditOptions, how: How) -> _Place:
    """Decide what is written where, and refuse places that cannot be written before any work."""
    out, images = options.out, options.images
    if out is not None and not out.is_dir():
        if out.suffix.lower() not in ("", ".png"):
            raise UserError(f"--out {out}: edits are written as .png or into a folder.", f"--out {out.stem}.png")
        if out.suffix == "" and out.exists():
            raise UserError(f"--out {out} is a file, not a folder.", "choose another folder, or a name ending in .png")
    kind: Literal["single", "grid"] = "grid" if how.kept > 1 or options.grid else "single"
    if out is None and (len(images) == 1 or options.grid):
        place = _Place(kind, USUAL_FOLDER / f"{images[0].stem}-{task}.png", len(images) == 1)
    elif out is None or out.is_dir() or out.suffix == "":
        place = _Place("folder", out or USUAL_FOLDER, len(images) == 1)
    else:
        place = _Place("grid" if len(images) > 1 else kind, out, len(images) == 1)
    check_place(place.path / "x" if place.kind == "folder" else place.path)
    return place


def _write(task: str, edits: Edits, place: _Place, spread: bool, output: Output) -> list[dict[str, Any]]:
    """Write all edits, print their paths, and return one document for each picture."""
    from cmtool.cli.output import command_line
    from cmtool.data.images import save_png
    from cmtool.editing.subject import uncertainty_map

    text = {
        "task": task,
        "model": str(edits.model.path),
        "model_hash": edits.model.digest,
        "times": ",".join(f"{level:.9g}" for level in edits.plan.times),
        "guidance": f"{edits.plan.guidance:g}",
        "command": command_line(),
    }
    if spread:
        for edited in edits.pictures:
            save_png(uncertainty_map(edited.images), place.of_map(task, edited), text)
    if place.kind == "grid":
        _write_grid(edits.pictures, place.path, text, output)
        paths = [[place.path] for _ in edits.pictures]
    else:
        paths = [_write_apart(task, edited, place, text, output) for edited in edits.pictures]
    for path in dict.fromkeys(path for group in paths for path in group):
        output.result(str(path))
    return [
        _document(edited, group, place.of_map(task, edited) if spread else None)
        for edited, group in zip(edits.pictures, paths, strict=True)
    ]


def _write_apart(task: str, edited: Edited, place: _Place, text: dict[str, str], output: Output) -> list[Path]:
    """Write each variation of a picture in its color space, and with its resolution where it has the same size."""
    from cmtool.data.images import save_png

    photo, paths = edited.subject.photo, []
    for row, made in enumerate(edited.pictures(output)):
        path = place.of(task, edited, f"-{row}" if len(edited.seeds) > 1 else "")
        dpi = photo.dpi if made.shape == photo.pixels.shape else None
        paths.append(save_png(made, path, {**text, "seed": str(edited.seeds[row])}, profile=photo.profile, dpi=dpi))
    return paths


def _write_grid(pictures: Sequence[Edited], path: Path, text: dict[str, str], output: Output) -> None:
    """One row a picture: what was given, then its variations, all at the first picture's size and in sRGB."""
    import numpy as np

    from cmtool.data.images import save_grid
    from cmtool.editing.regions import resize

    rows: list[NDArray[np.uint8]] = []
    for edited in pictures:
        row = [edited.subject.shown, *edited.pictures(output)]
        rows.extend(map(edited.subject.photo.to_srgb, row))
    height, width = rows[1].shape[:2]
    # Every row holds the given picture and as many variations, so that a wide row needs no wrapping up to 16.
    per_row = 1 + len(pictures[0].seeds)
    save_grid(np.stack([resize(row, height, width) for row in rows]), path, per_row if per_row <= 17 else None, text)


def _document(edited: Edited, paths: list[Path], spread: Path | None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "image": edited.name,
        "out": [str(path) for path in paths],
        "seeds": list(edited.seeds),
        "residuals": [round(value, 6) for value in edited.residuals],
        "notes": list(edited.subject.notes),
    }
    return document if spread is None else {**document, "uncertainty": str(spread)}
