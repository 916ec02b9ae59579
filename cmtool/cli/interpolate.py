"""`cmtool interpolate`: a path of pictures between samples, or between two pictures of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmtool.cli.options import Device, Json, Model, Precision, Quiet
from cmtool.errors import UsageError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.api.find import FoundModel
    from cmtool.cli.output import Output
    from cmtool.models import Model as LoadedModel
    from cmtool.samplers.plan import SamplePlan

# Solver steps that take a picture to its noise; the error falls with their square.
INVERSION_STEPS = 40
BATCH = 64

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


@dataclass(frozen=True)
class Walk:
    """A path as decided from the command line, before torch is imported."""

    found: FoundModel
    teacher: FoundModel | None
    plan: SamplePlan
    seeds: tuple[int, ...]
    pictures: tuple[Path, ...]
    label: int | None
    out: Path
    kind: Literal["grid", "gif", "frames"]
    given: dict[str, Any]


def interpolate(
    more: More = None,
    model: Model = None,
    seeds: Seeds = "0,1",
    images: Pictures = None,
    teacher: Teacher = None,
    num: Num = 24,
    label: Label = None,
    loop: Loop = False,
    steps: Steps = None,
    times: Times = None,
    inversion_steps: Solver = INVERSION_STEPS,
    fps: Fps = 12.0,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Walk between samples on the sphere of noise, or between pictures through a teacher's ODE.

    Examples: cmtool interpolate --model demo/shapes --seeds 1,2,3 --loop --out clip.gif |
    cmtool interpolate --images a.png b.png --teacher runs/digits-edm
    """
    from cmtool.cli.output import Output

    output = Output(json, quiet)
    walk = _decide(locals(), output)
    _make(walk, output)


def _decide(given: dict[str, Any], output: Output) -> Walk:
    from cmtool.api.find import find_model
    from cmtool.cli.lists import choose_label, parse_floats, parse_ints
    from cmtool.samplers.plan import plan_sampling

    pictures = (*(given["images"] or ()), *(given["more"] or ()))
    _check(given, pictures)
    levels = None if given["times"] is None else parse_floats(given["times"], "--times")
    found = find_model(
        given["model"],
        kinds=("consistency",),
        fits=lambda header: not header["data"].get("float_samples"),
        wanted="consistency model of images",
        output=output,
    )
    data = found.header["data"]
    if data.get("float_samples"):
        raise UserError(f"{found.path} makes points, not pictures.", "name another with --model")
    label = choose_label(given["label"], data)
    plan = plan_sampling(found.header, steps=given["steps"], times=levels)
    teacher = _teacher(given["teacher"], found) if pictures else None
    output.say(found.describe())
    if teacher:
        output.say(f"teacher: {teacher.describe()}")
    seeds = () if pictures else parse_ints(given["seeds"], "--seeds")
    if not pictures and len(seeds) < 2:
        raise UsageError("--seeds names one sample, and a path needs two.", "e.g. --seeds 1,2")
    name = "-".join(path.stem for path in pictures[:2]) if pictures else "-".join(map(str, seeds[:4]))
    out = given["out"] or Path("samples") / f"{found.name}-path-{name}.png"
    return Walk(found, teacher, plan, seeds, pictures, label, out, _kind(out), given)


def _check(given: dict[str, Any], pictures: tuple[Path, ...]) -> None:
    if given["more"] and not given["images"]:
        raise UsageError("pictures are named with --images.", "e.g. --images a.png b.png")
    if given["images"] and len(pictures) < 2:
        raise UsageError("--images names one picture, and a path needs two.", "e.g. --images a.png b.png")
    if given["teacher"] and not pictures:
        raise UsageError("--teacher is for --images: samples already have their noise.")
    for path in pictures:
        if not path.is_file():
            raise UserError(f"{path}: no such file.")


def _kind(out: Path) -> Literal["grid", "gif", "frames"]:
    suffix = out.suffix.lower()
    if out.is_dir() or suffix == "":
        if out.is_file():
            raise UserError(f"--out {out} is a file, not a folder.", "choose another folder, .png or .gif")
        return "frames"
    if suffix in (".png", ".gif"):
        return "grid" if suffix == ".png" else "gif"
    raise UserError(f"--out {out}: '{suffix}' is not written here; use .png (a grid), .gif, or a folder of frames.")


def _teacher(given: str | None, found: FoundModel) -> FoundModel:
    from cmtool.api.find import find_model
    from cmtool.config.judgments import same_data

    data = found.header["data"]

    def same(header: Any) -> bool:
        return same_data(header["data"], data)

    teacher = find_model(given, kinds=("diffusion",), fits=same, wanted="teacher for --images", option="--teacher")
    shape = [(header["data"]["channels"], header["data"]["resolution"]) for header in (teacher.header, found.header)]
    if shape[0] != shape[1]:
        raise UserError(f"{teacher.path} works on pictures of another shape than {found.path}.")
    return teacher


def _make(walk: Walk, output: Output) -> None:
    import torch

    from cmtool.api.find import load_model
    from cmtool.data.sample_files import check_place
    from cmtool.samplers.interpolation import decode, key_noise, path

    check_place(walk.out / "x" if walk.kind == "frames" else walk.out)
    model = load_model(walk.found, walk.given["device"], walk.given["precision"])
    label = _label(walk, model)
    errors: list[float] = []
    if walk.pictures:
        keys, errors = _invert(walk, model, label, output)
    else:
        keys = key_noise(walk.seeds, model.image_shape)
    points = path(keys, walk.given["num"], walk.given["loop"]).to(model.device, model.dtype)
    frames = []
    with output.progress(len(points), "frames") as update:
        for part in points.split(BATCH):
            labels = None if label is None else torch.full((len(part),), label, device=part.device)
            frames.append(decode(model, part, walk.plan.times, labels).float().cpu())
            update(len(part))
    _write(walk, torch.cat(frames))
    output.result(str(walk.out))
    output.json(
        {
            "path": str(walk.out),
            "frames": len(points),
            "model": str(walk.found.path),
            "times": list(walk.plan.times),
            "seeds": list(walk.seeds),
            "label": label,
            "images": [str(picture) for picture in walk.pictures],
            "reconstruction_rmse": errors,
        }
    )


def _label(walk: Walk, model: LoadedModel) -> int | None:
    """The class of all frames: the one named, else that of the first sample; pictures have none."""
    from cmtool.samplers.generate import streams_for

    if model.num_classes is None or walk.label is not None or not walk.seeds:
        return walk.label
    return int(streams_for(model, walk.seeds[:1]).labels(model.num_classes)[0])


def _invert(walk: Walk, model: LoadedModel, label: int | None, output: Output) -> tuple[Tensor, list[float]]:
    """Take the pictures to their noise by the teacher's ODE, and say how well the model brings them back."""
    import torch

    from cmtool.api.find import load_model
    from cmtool.config.classes import class_map
    from cmtool.data.images import fit_image, read_image
    from cmtool.editing.tasks import tensor
    from cmtool.samplers.interpolation import DITHER, decode, dithered, encode
    from cmtool.samplers.times import solver_times

    if walk.teacher is None:
        raise AssertionError("pictures were accepted without a teacher")
    teacher = load_model(walk.teacher, walk.given["device"], walk.given["precision"])
    channels, side, _ = model.image_shape
    x0 = torch.cat([tensor(fit_image(read_image(file, channels), side)) for file in walk.pictures])
    x0 = x0.to(model.device, model.dtype)
    lowest = max(teacher.sigma_min, DITHER)
    levels = solver_times(walk.given["inversion_steps"], lowest, teacher.sigma_max, teacher.rho)
    labels = None if label is None else torch.full((len(x0),), label, device=x0.device)
    places = class_map(model.header["data"], teacher.header["data"], f"the teacher {walk.teacher.path}")
    known = labels if places is None or labels is None or label is None else torch.full_like(labels, places[label])
    noise = encode(teacher, dithered(x0, lowest), levels, known if teacher.num_classes is not None else None)
    back = decode(model, noise, walk.plan.times[:1], labels)
    errors = (back - x0).square().flatten(1).mean(1).sqrt().tolist()
    for file, error in zip(walk.pictures, errors, strict=True):
        output.say(f"{file}: comes back with a root mean square error of {error:.3f} on the scale of [-1, 1]")
    return noise.float().cpu(), [round(error, 6) for error in errors]


def _write(walk: Walk, frames: Tensor) -> None:
    from cmtool.cli.output import command_line
    from cmtool.data.images import save_folder, save_gif, save_pictures

    text = {"model": str(walk.found.path), "model_hash": walk.found.digest, "command": command_line()}
    if walk.kind == "gif":
        save_gif(frames, walk.out, 1 / walk.given["fps"])
    elif walk.kind == "frames":
        save_folder(frames, walk.out, text=text)
    else:
        save_pictures(frames, walk.out, text=text)
