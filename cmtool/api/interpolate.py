"""Walks between samples on the sphere of noise, or between pictures through a teacher's ODE; decided without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.api.choose import choose_label
from cmtool.api.find import FoundModel, find_model, load_model
from cmtool.config.judgments import same_data
from cmtool.errors import UsageError, UserError
from cmtool.samplers.plan import SamplePlan, plan_sampling
from cmtool.talk import Talk

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.models import Model

# Solver steps that take a picture to its noise; the error falls with their square.
INVERSION_STEPS = 40
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a walk leads and in how many frames.

    Attributes:
        seeds: samples to pass through; or `pictures`, files whose noise the ODE of the `teacher` finds in
            `inversion_steps`.
        num: frames, both ends included; a `loop` comes back to the first.
        label: class of all frames, by name or number; None: that of the first sample.
        steps: evaluations of each frame; or `times` names their noise levels.
    """

    seeds: Sequence[int] = ()
    pictures: Sequence[Path] = ()
    teacher: str | None = None
    num: int = 24
    loop: bool = False
    label: str | None = None
    steps: int | None = None
    times: Sequence[float] | None = None
    inversion_steps: int = INVERSION_STEPS
    device: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True)
class Walk:
    """A route, and the models that walk it."""

    route: Route
    found: FoundModel
    teacher: FoundModel | None
    plan: SamplePlan
    label: int | None


@dataclass(frozen=True)
class Frames:
    """Frames (N, C, H, W) in [-1, 1] on the CPU, their class, and the reconstruction error of each given picture."""

    images: Tensor
    label: int | None
    errors: tuple[float, ...] = ()


def decide(model: str | None, route: Route, talk: Talk) -> Walk:
    """Settle the models, the noise levels and the class; every mistake in the request is found here.

    Raises:
        UserError: fewer than two places to pass through, or no model that fits.
    """
    for path in route.pictures:
        if not path.is_file():
            raise UserError(f"{path}: no such file.")
    found = find_model(
        model,
        kinds=("consistency",),
        fits=lambda header: not header["data"].get("float_samples"),
        wanted="consistency model of images",
        output=talk,
    )
    if found.header["data"].get("latent") and route.pictures:
        raise UserError(f"{found.path} works on latents, and pictures have no way back through its teacher.")
    if found.header["data"].get("float_samples"):
        raise UserError(f"{found.path} makes points, not pictures.", "name another with --model")
    label = choose_label(route.label, found.header["data"])
    plan = plan_sampling(found.header, steps=route.steps, times=route.times)
    teacher = _teacher(route.teacher, found) if route.pictures else None
    talk.say(found.describe())
    if teacher:
        talk.say(f"teacher: {teacher.describe()}")
    if not route.pictures and len(route.seeds) < 2:
        raise UsageError("--seeds names one sample, and a path needs two.", "e.g. --seeds 1,2")
    return Walk(route, found, teacher, plan, label)


def _teacher(given: str | None, found: FoundModel) -> FoundModel:
    data = found.header["data"]

    def same(header: Mapping[str, Any]) -> bool:
        return same_data(header["data"], data)

    teacher = find_model(given, kinds=("diffusion",), fits=same, wanted="teacher for --images", option="--teacher")
    shape = [(header["data"]["channels"], header["data"]["resolution"]) for header in (teacher.header, found.header)]
    if shape[0] != shape[1]:
        raise UserError(f"{teacher.path} works on pictures of another shape than {found.path}.")
    return teacher


def make(walk: Walk, talk: Talk) -> Frames:
    """Make the frames of a walk."""
    from cmtool.samplers.interpolation import key_noise, path

    route, model = walk.route, load_model(walk.found, walk.route.device, walk.route.precision)
    label = first_label(model, route.seeds) if walk.label is None else walk.label
    errors: tuple[float, ...] = ()
    if walk.teacher is not None:
        teacher = load_model(walk.teacher, route.device, route.precision)
        keys, errors = _inverted(walk, model, teacher, walk.teacher.path, label, talk)
    else:
        keys = key_noise(route.seeds, model.image_shape)
    return Frames(decoded(model, path(keys, route.num, route.loop), walk.plan, label, talk), label, errors)


def first_label(model: Model, seeds: Sequence[int]) -> int | None:
    """The class of all frames where none is named: that of the first sample; pictures have none."""
    from cmtool.samplers.generate import streams_for

    if model.num_classes is None or not seeds:
        return None
    return int(streams_for(model, seeds[:1]).labels(model.num_classes)[0])


def decoded(model: Model, points: Tensor, plan: SamplePlan, label: int | None, talk: Talk) -> Tensor:
    """Return the picture at each point (N, C, H, W) of a path, on the CPU."""
    import torch

    from cmtool.samplers.generate import to_pictures
    from cmtool.samplers.interpolation import decode

    frames = []
    with talk.progress(len(points), "frames") as update:
        for part in points.to(model.device, model.dtype).split(BATCH):
            labels = None if label is None else torch.full((len(part),), label, device=part.device)
            clean = decode(model, part, plan.times, labels, clamp=model.clamps)
            frames.append(to_pictures(model, clean).float().cpu())
            update(len(part))
    return torch.cat(frames)


def _inverted(
    walk: Walk, model: Model, teacher: Model, name: Path, label: int | None, talk: Talk
) -> tuple[Tensor, tuple[float, ...]]:
    """Take the pictures to their noise by the teacher's ODE, and say how well the model brings them back."""
    import torch

    from cmtool.config.classes import class_map
    from cmtool.data.images import fit_image, read_image
    from cmtool.data.profiles import converted_note
    from cmtool.editing.subject import tensor
    from cmtool.samplers.interpolation import DITHER, decode, dithered, encode
    from cmtool.samplers.times import solver_times

    channels, side, _ = model.image_shape
    pictures = walk.route.pictures
    converted: list[str] = []
    read = [read_image(file, channels, converted=converted) for file in pictures]
    for note in converted_note(converted, len(read)):
        talk.say(note)
    x0 = torch.cat([tensor(fit_image(image, side)) for image in read]).to(model.device, model.dtype)
    lowest = max(teacher.sigma_min, DITHER)
    levels = solver_times(walk.route.inversion_steps, lowest, teacher.sigma_max, teacher.rho)
    labels = None if label is None else torch.full((len(x0),), label, device=x0.device)
    places = class_map(model.header["data"], teacher.header["data"], f"the teacher {name}")
    known = labels if places is None or labels is None or label is None else torch.full_like(labels, places[label])
    noise = encode(teacher, dithered(x0, lowest), levels, known if teacher.num_classes is not None else None)
    back = decode(model, noise, walk.plan.times[:1], labels)
    errors = (back - x0).square().flatten(1).mean(1).sqrt().tolist()
    for file, error in zip(pictures, errors, strict=True):
        talk.say(f"{file}: comes back with a root mean square error of {error:.3f} on the scale of [-1, 1]")
    return noise.float().cpu(), tuple(round(error, 6) for error in errors)
