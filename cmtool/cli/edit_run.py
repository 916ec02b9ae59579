"""What the five edit commands share: decide everything, prepare the pictures, run the loop, write the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.errors import UsageError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from cmtool.api.find import FoundModel
    from cmtool.cli.output import Output
    from cmtool.editing.masks import Mask
    from cmtool.editing.tasks import Subject
    from cmtool.models import Model
    from cmtool.samplers.plan import SamplePlan

# An uncertainty map of fewer variations is mostly its own noise.
UNCERTAINTY_NUM = 32
MASK_HINT = "a mask is a picture of its own: white where something is to be made, black elsewhere"


@dataclass(frozen=True)
class Request:
    """An edit as decided from the command line, before torch is imported."""

    task: str
    found: FoundModel
    plan: SamplePlan
    guidance: float
    candidates: int
    seeds: Sequence[int]
    keep: int
    label: int | None
    given: dict[str, Any]

    @property
    def side(self) -> int:
        """The model's side in pixels."""
        return int(self.found.header["data"]["resolution"])

    @property
    def channels(self) -> int:
        """The model's channels."""
        return int(self.found.header["data"]["channels"])


@dataclass(frozen=True)
class Result:
    """One picture's kept variations: legal tensors (K, C, H, W), their seeds, and how far each misses what is known."""

    name: Path
    subject: Subject
    images: Tensor
    seeds: tuple[int, ...]
    residuals: tuple[float, ...]

    def edited(self, row: int) -> NDArray[Any]:
        """The bytes (H, W, C) of one variation, in the color space of its picture."""
        return self.subject.back(self.images[row : row + 1])


def decide(task: str, given: dict[str, Any], output: Output) -> Request:
    """Settle the model, the noise levels, seeds and label; every mistake in the arguments is found here."""
    from cmtool.cli.lists import choose_label, choose_seeds
    from cmtool.editing.levels import usual_help

    _check_pictures(given)
    made, kept = _counts(given)
    found = _find(task, given, output)
    label = choose_label(given["label"], found.header["data"])
    plan = _plan(task, found.header, given)
    usual, candidates = usual_help(found.header, task, plan)
    guidance = usual if given.get("guidance") is None else given["guidance"]
    if given.get("best_of"):
        candidates = 1
    shown = ", ".join(f"{level:.4g}" for level in plan.times[:6]) + " ..." * (len(plan.times) > 6)
    output.say(found.describe())
    chosen = f"; each the most consistent of {candidates}" if candidates > 1 else ""
    output.say(f"times {shown} ({plan.source}{chosen})")
    seeds = choose_seeds(made, given.get("seed") or 0, None, 1)
    return Request(task, found, plan, guidance, candidates, seeds, kept, label, given)


def _counts(given: dict[str, Any]) -> tuple[int, int]:
    """How many variations of a picture are made, and how many are kept."""
    num, best_of, spread = given.get("num"), given.get("best_of"), given.get("uncertainty")
    if best_of and num and num > best_of:
        raise UsageError(f"--num {num} of --best-of {best_of} variations cannot be kept.")
    made = best_of or num or (UNCERTAINTY_NUM if spread else 1)
    kept = (num or 1) if best_of else made
    if spread and kept < 2:
        raise UsageError("--uncertainty needs at least two variations.", f"e.g. --num {UNCERTAINTY_NUM}")
    return made, kept


def _find(task: str, given: dict[str, Any], output: Output) -> FoundModel:
    from cmtool.api.find import find_model

    needed = 3 if task == "colorize" else None
    found = find_model(
        given["model"],
        kinds=("consistency",),
        fits=lambda header: _refusal(header, needed) is None,
        wanted="consistency model of images" + (" in color" if needed else ""),
        output=output,
        preset="shapes" if needed else "digits",
    )
    refusal = _refusal(found.header, needed)
    if refusal:
        raise UserError(f"{found.path} {refusal}.", "name another with --model")
    return found


def _check_pictures(given: dict[str, Any]) -> None:
    out = given["out"]
    for image in given["images"]:
        if not image.exists():
            raise UserError(f"{image}: no such file.", _lookalike(image))
        if image.is_dir():
            raise UserError(f"{image} is a folder; name the pictures in it.", f"e.g. {image}/*.png")
        if given.get("mask") is not None and image.resolve() == given["mask"].resolve():
            raise UserError(f"{image} is given as the picture and as its mask.", MASK_HINT)
    mask = given.get("mask")
    if mask is None and given.get("invert_mask"):
        raise UsageError("--invert-mask turns a --mask round; what is transparent is always what is generated.")
    if mask is not None and not mask.exists():
        raise UserError(f"--mask {mask}: no such file.", _lookalike(mask))
    if out is not None and not out.is_dir():
        if out.suffix.lower() not in ("", ".png"):
            raise UserError(f"--out {out}: edits are written as .png or into a folder.", f"--out {out.stem}.png")
        if out.suffix == "" and out.exists():
            raise UserError(f"--out {out} is a file, not a folder.", "choose another folder, or a name ending in .png")


def _lookalike(missing: Path) -> str:
    """Name the nearest file beside one that is not there, else how to see what is."""
    from cmtool.errors import nearest

    beside = [path.name for path in missing.parent.iterdir()] if missing.parent.is_dir() else []
    close = nearest(missing.name, beside, count=1)
    return f"did you mean {missing.parent / close[0]}?" if close else f"ls {missing.parent} shows what there is"


def _refusal(header: Mapping[str, Any], channels: int | None) -> str | None:
    """Say why a model cannot edit pictures, None if it can."""
    data = header["data"]
    if data.get("float_samples"):
        return "makes points, not pictures"
    if channels is not None and data["channels"] != channels:
        return f"works in {data['channels']} channel(s), and colors need three"
    return None if data["channels"] in (1, 3, 4) else f"works in {data['channels']} channels"


def _plan(task: str, header: dict[str, Any], given: dict[str, Any]) -> SamplePlan:
    from cmtool.cli.lists import parse_floats, parse_ints
    from cmtool.editing.levels import plan_edit
    from cmtool.samplers.plan import SamplePlan
    from cmtool.samplers.times import header_range

    if task == "denoise":
        low, high, _ = header_range(header)
        if not low <= given["sigma"] <= high:
            raise UserError(
                f"--sigma {given['sigma']:g} is outside the model's range [{low:g}, {high:g}].",
                "it is the noise's standard deviation on the scale of [-1, 1]: 0.3 is 38 of 255 levels",
            )
        return SamplePlan("multistep", (given["sigma"],), "the noise's own level")
    text = given["times"]
    times = text if text in (None, "paper") else parse_floats(text, "--times")
    indices = None if given["indices"] is None else parse_ints(given["indices"], "--indices")
    return plan_edit(header, task, steps=given["steps"], times=times, indices=indices, of=given["of"])


def run_edit(task: str, given: dict[str, Any], output: Output) -> None:
    """Carry out one edit command."""
    from cmtool.api.find import load_model
    from cmtool.cli.edit_files import check_outputs, write_results

    request = decide(task, given, output)
    painted = _mask(given, output)
    subjects = [(path, prepare(request, path, painted, output)) for path in given["images"]]
    place = check_outputs(request)
    model = load_model(request.found, given["device"], given["precision"])
    results = [_result(request, model, path, subject, output) for path, subject in subjects]
    documents = write_results(request, results, place, output)
    output.json(
        {
            "task": task,
            "model": str(request.found.path),
            "nfe": len(request.plan.times) * request.candidates,
            "times": list(request.plan.times),
            "guidance": request.guidance,
            "candidates": request.candidates,
            "edits": documents,
        }
    )


def prepare(request: Request, path: Path, painted: Mask | None, output: Output) -> Subject:
    """Read one picture and make it ready; says what was done to it."""
    from cmtool.editing import tasks as editing
    from cmtool.editing.photos import read_photo

    given, side, task = request.given, request.side, request.task
    options = editing.Options(given["fit"] or ("pad" if given["paste"] else "crop"), given["paste"])
    photo = read_photo(path, request.channels, see_through=task == "inpaint" and painted is None)
    if task == "inpaint":
        subject = editing.prepare_inpaint(photo, painted, side, options, str(path))
    elif task == "colorize":
        subject = editing.prepare_colorize(photo, side, options)
    elif task == "superres":
        factor = editing.choose_factor(given["factor"], photo.pixels, side)
        subject = editing.prepare_superres(photo, factor, side, options)
    elif task == "stroke":
        subject = editing.prepare_stroke(photo, side, options)
    else:
        subject = editing.prepare_denoise(photo, side, options)
    for note in subject.notes:
        output.say(f"{path}: {note}")
    return subject


def _mask(given: dict[str, Any], output: Output) -> Mask | None:
    """The mask that --mask names; None: there is none."""
    from cmtool.data.decode import upright
    from cmtool.editing.masks import mask_from_image

    if given.get("mask") is None:
        return None
    painted = mask_from_image(upright(given["mask"]), str(given["mask"]), given["invert_mask"])
    for notice in painted.notices:
        output.warn(notice)
    return painted.mask


def _result(request: Request, model: Model, path: Path, subject: Subject, output: Output) -> Result:
    """Make all variations of one picture, in batches, and keep the wanted ones."""
    import torch

    from cmtool.editing.editor import Editor, Task

    compares = request.given.get("metric", "l2") if request.given.get("best_of") else "l2"
    task = Task(request.task, request.plan, request.guidance, request.label, compares, request.candidates)
    editor = Editor(task, model, subject)
    label = editor.choose_label()
    if label is not None and request.label is None:
        names = model.header["data"].get("class_names")
        output.say(f"{path}: class {names[label] if names else label} fits it best; --label names another")
    size = request.given["batch_size"] or editor.batch_size
    images, residuals = [], []
    with output.progress(len(request.seeds), path.name) as update:
        for first in range(0, len(request.seeds), size):
            chosen = request.seeds[first : first + size]
            made, misses = editor.run(chosen, label)
            images.append(made)
            residuals.append(misses)
            update(len(chosen))
    every, misses = torch.cat(images), torch.cat(residuals)
    best = (
        torch.argsort(misses, stable=True)[: request.keep].tolist()
        if request.given.get("best_of")
        else range(len(every))
    )
    rows = list(best)
    return Result(path, subject, every[rows], tuple(request.seeds[row] for row in rows), tuple(misses[rows].tolist()))
