"""`cmtool interpolate`: a path of pictures between samples, or between two pictures of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cmtool.api.interpolate import INVERSION_STEPS
from cmtool.cli.app import command
from cmtool.cli.options import Device, Json, Model, Precision, Quiet, parse_floats, parse_ints
from cmtool.errors import UsageError, UserError
from cmtool.files.atomic import check_place

if TYPE_CHECKING:
    from cmtool.api.interpolate import Frames, Route, Walk

Seeds = Annotated[str, typer.Option("--seeds", help="Samples to pass through, two or more, e.g. 1,2,3.")]
Pictures = Annotated[
    list[Path] | None, typer.Option("--images", help="Pictures to pass through; give the option once for each.")
]
More = Annotated[list[Path] | None, typer.Argument(help="With --images: the other pictures.", metavar="IMAGE")]
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="With --images: the diffusion model whose ODE finds their noise.")
]
Num = Annotated[int, typer.Option("--num", "-n", min=2, max=10_000, help="Frames, both ends included.")]
Label = Annotated[str | None, typer.Option("--label", "-l", help="Class of all frames, by name or number.")]
Loop = Annotated[bool, typer.Option("--loop", help="Come back to the first sample, for endless play.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Evaluations of each frame.")]
Times = Annotated[str | None, typer.Option("--times", help="Noise levels of each frame's evaluations.")]
Fps = Annotated[float, typer.Option("--fps", min=0.5, max=50, help="Frames a second of a .gif.")]
Solver = Annotated[int, typer.Option("--inversion-steps", min=2, help="Solver steps from a picture to its noise.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="A .png (grid), a .gif, or a folder of frames.")]


@dataclass(frozen=True, kw_only=True)
class InterpolateOptions:
    """The options of `cmtool interpolate`."""

    more: More = None
    model: Model = None
    seeds: Seeds = "0,1"
    images: Pictures = None
    teacher: Teacher = None
    num: Num = 24
    label: Label = None
    loop: Loop = False
    steps: Steps = None
    times: Times = None
    inversion_steps: Solver = INVERSION_STEPS
    fps: Fps = 12.0
    out: Out = None
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False

    @property
    def pictures(self) -> tuple[Path, ...]:
        """All pictures to pass through."""
        return (*(self.images or ()), *(self.more or ()))

    def check(self) -> None:
        """Refuse options that contradict each other."""
        if self.more and not self.images:
            raise UsageError("pictures are named with --images.", "e.g. --images a.png b.png")
        if self.images and len(self.pictures) < 2:
            raise UsageError("--images names one picture, and a path needs two.", "e.g. --images a.png b.png")
        if self.teacher and not self.pictures:
            raise UsageError("--teacher is for --images: samples already have their noise.")


@command
def interpolate(options: InterpolateOptions) -> None:
    """Walk between samples on the sphere of noise, or between pictures through a teacher's ODE.

    Examples: cmtool interpolate --model demo/avatars --seeds 1,2,3 --loop --out clip.gif |
    cmtool interpolate --images a.png b.png --teacher runs/digits-edm
    """
    from cmtool.api.interpolate import Route, decide, make
    from cmtool.cli.output import Output

    output = Output(options.json, options.quiet)
    options.check()
    pictures = options.pictures
    route = Route(
        seeds=() if pictures else parse_ints(options.seeds, "--seeds"),
        pictures=pictures,
        teacher=options.teacher,
        num=options.num,
        loop=options.loop,
        label=options.label,
        steps=options.steps,
        times=None if options.times is None else parse_floats(options.times, "--times"),
        inversion_steps=options.inversion_steps,
        device=options.device,
        precision=options.precision,
    )
    walk = decide(options.model, route, output)
    out = options.out or Path("samples") / f"{walk.found.name}-path-{_name(route)}.png"
    kind = _kind(out)
    check_place(out / "x" if kind == "frames" else out)
    frames = make(walk, output)
    _write(walk, frames, out, kind, options.fps)
    output.result(str(out))
    output.json(
        {
            "path": str(out),
            "frames": len(frames.images),
            "model": str(walk.found.path),
            "times": list(walk.plan.times),
            "seeds": list(route.seeds),
            "label": frames.label,
            "images": [str(picture) for picture in pictures],
            "reconstruction_rmse": list(frames.errors),
        }
    )


def _name(route: Route) -> str:
    """What a path is called that is not named: the first things that it passes through."""
    return "-".join([path.stem for path in route.pictures[:2]] or map(str, route.seeds[:4]))


def _kind(out: Path) -> Literal["grid", "gif", "frames"]:
    suffix = out.suffix.lower()
    if out.is_dir() or suffix == "":
        if out.is_file():
            raise UserError(f"--out {out} is a file, not a folder.", "choose another folder, .png or .gif")
        return "frames"
    if suffix in (".png", ".gif"):
        return "grid" if suffix == ".png" else "gif"
    raise UserError(f"--out {out}: '{suffix}' is not written here; use .png (a grid), .gif, or a folder of frames.")


def _write(walk: Walk, frames: Frames, out: Path, kind: Literal["grid", "gif", "frames"], fps: float) -> None:
    from cmtool.cli.output import command_line
    from cmtool.data.images import save_folder, save_gif, save_pictures

    text = {"model": str(walk.found.path), "model_hash": walk.found.digest, "command": command_line()}
    if kind == "gif":
        save_gif(frames.images, out, 1 / fps)
    elif kind == "frames":
        save_folder(frames.images, out, text=text)
    else:
        save_pictures(frames.images, out, text=text)
