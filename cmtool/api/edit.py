"""Editing pictures with a consistency model, without retraining: inpaint, colorize, superres, deblur, stroke, denoise.

Every function takes a model (or its path or name) and one picture, and returns uint8 variations (num, H, W, C) in
sRGB. A picture is a path, a Pillow image, uint8 (H, W) or (H, W, C), or a float tensor (C, H, W) in [-1, 1]. Those of
other sizes than the model's are fitted as `fit` says ("crop", "pad", "stretch"); with `paste=True` the edit comes back
inside the whole picture.

`perform` edits several pictures, for the command line and the studio too; it refuses what it can before torch comes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cmtool.api.choose import check_pictures, choose_label, choose_seeds
from cmtool.api.find import FoundModel, find_model, load_model
from cmtool.api.how import Fit, How
from cmtool.editing.levels import EditPlan, plan_edit
from cmtool.editing.tasks import TASKS, Asked, Task
from cmtool.errors import UserError
from cmtool.talk import ALOUD, Talk

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from cmtool.api.model import Model
    from cmtool.editing.editor import Editor
    from cmtool.editing.photos import Bytes, Picture
    from cmtool.editing.subject import Subject

AnyModel: TypeAlias = "Model | FoundModel | str | Path"


@dataclass(frozen=True)
class Edited:
    """The kept variations of one picture: tensors (K, C, H, W), their seeds, and how far each misses what is known."""

    name: str
    subject: Subject
    images: Tensor
    seeds: tuple[int, ...]
    residuals: tuple[float, ...]

    def pictures(self, talk: Talk) -> Iterator[Bytes]:
        """Yield the bytes (H, W, C) of each variation in its picture's color space; say in which nothing changed."""
        same = []
        for row, seed in enumerate(self.seeds):
            made = self.subject.back(self.images[row : row + 1])
            same += [str(seed)] if self.subject.unchanged(made) else []
            yield made
        if same:
            where = "in the hole " if self.subject.has_hole else ""
            talk.warn(f"{self.name}: the edit changes nothing {where}(seed {', '.join(same)})")


@dataclass(frozen=True)
class Edits:
    """What was made of all pictures, and with what."""

    model: FoundModel
    plan: EditPlan
    pictures: tuple[Edited, ...]


def perform(task: str, model: AnyModel | None, images: Sequence[Picture], how: How, talk: Talk) -> Edits:
    """Edit pictures.

    Args:
        task: the name of a row of `editing.tasks.TASKS`.
        model: a consistency model, or where it is; None: $CMTOOL_MODEL or the newest finished run.
        images: the pictures.
        how: everything else.
        talk: told which model and levels are taken, what is done to pictures, and what is odd about them.

    Raises:
        UserError: a picture, a mask or the model does not fit, or the request cannot be carried out.
    """
    row = TASKS[task]
    how.check()
    best, seeds = how.kept if how.best_of else None, choose_seeds(how.best_of or how.kept, how.seed, None, 1)
    check_pictures(images)
    how.check_mask(images)
    found = _find(row, model, talk)
    label = choose_label(how.label, found.header["data"])
    plan = plan_edit(
        found.header, task, steps=how.steps, times=how.times, indices=how.indices, of=how.of, sigma=how.sigma
    )
    guidance = plan.guidance if how.guidance is None else how.guidance
    fresh = plan.fresh if how.fresh is None else how.fresh
    plan = replace(plan, guidance=guidance, fresh=fresh, candidates=1 if how.best_of else plan.candidates)
    talk.say(found.describe())
    shown = ", ".join(f"{level:.4g}" for level in plan.times[:6]) + " ..." * (len(plan.times) > 6)
    chosen = f"; each the most consistent of {plan.candidates}" if plan.candidates > 1 else ""
    talk.say(f"times {shown} ({plan.source}{chosen})")
    subjects = _subjects(row, found, images, how, talk)
    from cmtool.editing.editor import Editor

    loaded = None if model is None or isinstance(model, (FoundModel, str, Path)) else model.module
    module = loaded or load_model(found, how.device, how.precision)
    edits = []
    for name, subject in subjects:
        editor = Editor(row, plan, module, subject, label, how.metric if best else "l2")
        edits.append(_edited(name, editor, seeds, best, how.batch_size, talk))
    return Edits(found, plan, tuple(edits))


def _find(row: Task, model: AnyModel | None, talk: Talk) -> FoundModel:
    """Return the model as a file and its header; a model that is loaded already is not looked for."""

    def refusal(header: Mapping[str, Any]) -> str | None:
        data = header["data"]
        if data.get("float_samples") or data.get("latent"):
            return "works on latents, not pictures" if data.get("latent") else "makes points, not pictures"
        if row.channels is not None and data["channels"] != row.channels:
            return f"works in {data['channels']} channel(s), and colors need three"
        return None if data["channels"] in (1, 3, 4) else f"works in {data['channels']} channels"

    if isinstance(model, FoundModel):
        found = model
    elif model is None or isinstance(model, (str, Path)):
        found = find_model(
            None if model is None else str(model),
            kinds=("consistency",),
            fits=lambda header: refusal(header) is None,
            wanted="consistency model of images" + (" in color" if row.channels else ""),
            output=talk,
            preset="shapes" if row.channels else "digits",
        )
    else:
        found = FoundModel(model.path, model.header, "as given")
        if model.kind != "consistency":
            raise UserError(f"{model.path} is a teacher, and editing needs a consistency model.")
    if unfit := refusal(found.header):
        raise UserError(f"{found.path} {unfit}.", "name another with --model")
    return found


def _subjects(
    row: Task, found: FoundModel, images: Sequence[Picture], how: How, talk: Talk
) -> list[tuple[str, Subject]]:
    """Read the mask and all pictures and make them ready; says what was done to them."""
    from cmtool.editing.photos import mask_of, photo_of

    data = found.header["data"]
    mask, notices = (None, ()) if how.mask is None else mask_of(how.mask, how.invert_mask)
    for notice in notices:
        talk.warn(notice)
    ready = []
    for image in images:
        name = str(image) if isinstance(image, (str, Path)) else "the picture"
        asked = Asked(
            name=name,
            fit=how.fit or ("pad" if how.paste else "crop"),
            paste=how.paste,
            mask=mask,
            factor=how.factor,
            kernel=how.kernel,
            sigma=how.sigma or 0.0,
            noise=how.noise,
        )
        given = photo_of(image, data["channels"], "mask" in row.takes and mask is None)
        subject = row.prepare(given, data["resolution"], asked)
        for note in subject.notes:
            talk.say(f"{name}: {note}")
        ready.append((name, subject))
    return ready


def _edited(
    name: str, editor: Editor, seeds: Sequence[int], best: int | None, batch_size: int | None, talk: Talk
) -> Edited:
    """Make all variations of one picture, in batches, and keep them, or the `best` most consistent ones."""
    import torch

    label, searched = editor.choose_label()
    if searched:
        names = editor.class_names
        chosen = names[label] if names and label is not None else label
        talk.say(f"{name}: class {chosen} fits it best; --label names another")
    size = batch_size or editor.batch_size
    parts = []
    with talk.progress(len(seeds), Path(name).name) as update:
        for first in range(0, len(seeds), size):
            parts.append(editor.run(seeds[first : first + size], label))
            update(len(parts[-1][0]))
    images, misses = (torch.cat(columns) for columns in zip(*parts, strict=True))
    rows = torch.argsort(misses, stable=True)[:best].tolist() if best else list(range(len(images)))
    residuals = tuple(misses[rows].tolist())
    return Edited(name, editor.subject, images[rows], tuple(seeds[row] for row in rows), residuals)


def arrays(task: str, model: AnyModel, image: Picture, how: How) -> Bytes:
    """Edit one picture: uint8 (num, H, W, C) in sRGB."""
    import numpy as np

    [edited] = perform(task, model, [image], how, ALOUD).pictures
    return np.stack([edited.subject.photo.to_srgb(one) for one in edited.pictures(ALOUD)])


def inpaint(
    model: AnyModel,
    image: Picture,
    mask: Picture | NDArray[Any] | None = None,
    *,
    num: int = 1,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    guidance: float | None = None,
    label: str | int | None = None,
    seed: int = 0,
    fit: Fit | None = None,
    paste: bool = False,
) -> Bytes:
    """Fill what the mask paints white (or holds as True); every other pixel keeps its bytes.

    Args:
        model: a consistency model, or where it is.
        image: the picture.
        mask: of the picture's shape, white (True) where the model generates; None: what is transparent in the picture.
        num: variations.
        steps: evaluations, at tuned noise levels; `times` names the levels instead.
        times: strictly decreasing noise levels.
        guidance: over-relaxation of the known part, 0 is the paper's; None suits the levels.
        label: class, by name or number; None: the likeliest.
        seed: of the variations.
        fit: how another shape becomes square; None: "crop", with `paste` "pad".
        paste: return the edit inside the whole picture.

    Raises:
        UserError: an empty mask, one of another shape, unusable levels, an unknown class.
    """
    how = How(
        mask=mask, num=num, steps=steps, times=times, guidance=guidance, label=label, seed=seed, fit=fit, paste=paste
    )
    return arrays("inpaint", model, image, how)


def colorize(
    model: AnyModel,
    image: Picture,
    *,
    num: int = 1,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    guidance: float | None = None,
    label: str | int | None = None,
    seed: int = 0,
    fit: Fit | None = None,
    paste: bool = False,
) -> Bytes:
    """Give a gray picture colors; the luma of every pixel stays. Arguments as in `inpaint`.

    Raises:
        UserError: the model works in gray, unusable levels, an unknown class.
    """
    how = How(num=num, steps=steps, times=times, guidance=guidance, label=label, seed=seed, fit=fit, paste=paste)
    return arrays("colorize", model, image, how)


def superres(
    model: AnyModel,
    image: Picture,
    factor: int | None = None,
    *,
    kernel: Literal["mean", "bicubic"] = "mean",
    noise: float | None = None,
    num: int = 1,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    guidance: float | None = None,
    label: str | int | None = None,
    seed: int = 0,
    fit: Fit | None = None,
    paste: bool = False,
) -> Bytes:
    """Enlarge a small picture `factor` times (None: to the model's size); each of its pixels stays its patch's mean.

    `kernel` says what made it small, a mean of patches or a bicubic filter, and `noise` is the standard deviation of
    its noise on the scale of [-1, 1] (None: none). With `paste` a picture of any size is enlarged whole, in windows.
    Other arguments as in `inpaint`.

    Raises:
        UserError: a factor that does not divide the model's side, unusable levels, an unknown class.
    """
    how = How(
        factor=factor,
        kernel=kernel,
        noise=noise,
        num=num,
        steps=steps,
        times=times,
        guidance=guidance,
        label=label,
        seed=seed,
        fit=fit,
        paste=paste,
    )
    return arrays("superres", model, image, how)


def deblur(
    model: AnyModel,
    image: Picture,
    sigma: float,
    *,
    noise: float | None = None,
    num: int = 1,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    guidance: float | None = None,
    label: str | int | None = None,
    seed: int = 0,
    fit: Fit | None = None,
    paste: bool = False,
) -> Bytes:
    """Undo a Gaussian blur of standard deviation `sigma` pixels of the picture.

    `noise` is the standard deviation of the picture's noise on the scale of [-1, 1] (None: rounding to bytes); the more
    it has, the less is taken from it. Other arguments as in `inpaint`.

    Raises:
        UserError: a blur of no width or wider than the model, unusable levels, an unknown class.
    """
    how = How(
        sigma=sigma,
        noise=noise,
        num=num,
        steps=steps,
        times=times,
        guidance=guidance,
        label=label,
        seed=seed,
        fit=fit,
        paste=paste,
    )
    return arrays("deblur", model, image, how)


def stroke(
    model: AnyModel,
    image: Picture,
    *,
    num: int = 1,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    label: str | int | None = None,
    seed: int = 0,
    fit: Fit | None = None,
    paste: bool = False,
) -> Bytes:
    """Turn a rough drawing into a picture; a larger first level frees it more from the drawing.

    Raises:
        UserError: unusable levels, an unknown class.
    """
    how = How(num=num, steps=steps, times=times, label=label, seed=seed, fit=fit, paste=paste)
    return arrays("stroke", model, image, how)


def denoise(
    model: AnyModel,
    image: Picture,
    sigma: float,
    *,
    label: str | int | None = None,
    fit: Fit | None = None,
    paste: bool = False,
) -> Bytes:
    """Remove Gaussian noise of standard deviation `sigma` on the scale of [-1, 1] in one evaluation: (1, H, W, C).

    Raises:
        UserError: `sigma` outside the model's range, an unknown class.
    """
    how = How(sigma=sigma, label=label, fit=fit, paste=paste)
    return arrays("denoise", model, image, how)
