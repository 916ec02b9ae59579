"""Editing pictures with a consistency model, without retraining: inpaint, colorize, superres, stroke, denoise.

Every function takes a model (or its path or name) and one picture, and returns uint8 variations (num, H, W, C) in
sRGB. A picture is a path, a Pillow image, uint8 (H, W) or (H, W, C), or a float tensor (C, H, W) in [-1, 1]. Those of
other sizes than the model's are fitted as `fit` says ("crop", "pad", "stretch"); with `paste=True` the edit comes back
inside the whole picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from numpy.typing import NDArray

from cmtool.api.model import BLOCK, Model, as_model
from cmtool.api.pictures import Bytes, Picture, mask_of, photo, stacked
from cmtool.editing import tasks as editing
from cmtool.editing.editor import Editor, Task
from cmtool.editing.levels import plan_edit, usual_help
from cmtool.errors import UserError
from cmtool.samplers.plan import SamplePlan
from cmtool.samplers.times import header_range

Fit: TypeAlias = Literal["crop", "pad", "stretch"]
AnyModel: TypeAlias = "Model | str | Path"


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
    loaded = _images_model(model)
    painted = None if mask is None else mask_of(mask)
    given = photo(image, loaded.image_shape[0], see_through=painted is None)
    side, options = loaded.image_shape[1], _options(fit, paste)
    subject = editing.prepare_inpaint(given, painted, side, options, "the picture")
    return _edited("inpaint", loaded, subject, num, steps, times, guidance, label, seed)


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
    loaded = _images_model(model)
    if loaded.image_shape[0] != 3:
        raise UserError(f"{loaded.path} works in {loaded.image_shape[0]} channel(s), and colors need three.")
    subject = editing.prepare_colorize(photo(image, 3), loaded.image_shape[1], _options(fit, paste))
    return _edited("colorize", loaded, subject, num, steps, times, guidance, label, seed)


def superres(
    model: AnyModel,
    image: Picture,
    factor: int | None = None,
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
    """Enlarge a small picture `factor` times (None: to the model's size); each of its pixels stays its patch's mean.

    With `paste` a picture of any size is enlarged whole, in overlapping windows. Other arguments as in `inpaint`.

    Raises:
        UserError: a factor that does not divide the model's side, unusable levels, an unknown class.
    """
    loaded = _images_model(model)
    given, side = photo(image, loaded.image_shape[0]), loaded.image_shape[1]
    times_larger = editing.choose_factor(factor, given.pixels, side)
    subject = editing.prepare_superres(given, times_larger, side, _options(fit, paste))
    return _edited("superres", loaded, subject, num, steps, times, guidance, label, seed)


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
    loaded = _images_model(model)
    given = photo(image, loaded.image_shape[0])
    subject = editing.prepare_stroke(given, loaded.image_shape[1], _options(fit, paste))
    return _edited("stroke", loaded, subject, num, steps, times, 0.0, label, seed)


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
    loaded = _images_model(model)
    low, high, _ = header_range(loaded.header)
    if not low <= sigma <= high:
        raise UserError(
            f"sigma {sigma:g} is outside the model's range [{low:g}, {high:g}].",
            "it is the noise's standard deviation on the scale of [-1, 1]: 0.3 is 38 of 255 levels",
        )
    given = photo(image, loaded.image_shape[0])
    subject = editing.prepare_denoise(given, loaded.image_shape[1], _options(fit, paste))
    plan = SamplePlan("multistep", (sigma,), "the noise's own level")
    return _run(Task("denoise", plan, 0.0, _label(loaded, label)), loaded, subject, 1, 0)


def _images_model(model: AnyModel) -> Model:
    loaded = as_model(model)
    if loaded.kind != "consistency":
        raise UserError(f"{loaded.path} is a teacher, and editing needs a consistency model.")
    if loaded.module.float_samples:
        raise UserError(f"{loaded.path} makes points, not pictures.")
    return loaded


def _options(fit: Fit | None, paste: bool) -> editing.Options:
    return editing.Options(fit or ("pad" if paste else "crop"), paste)


def _label(model: Model, label: str | int | None) -> int | None:
    return None if label is None else model.label(label)


def _edited(
    task: str,
    model: Model,
    subject: editing.Subject,
    num: int,
    steps: int | None,
    times: Sequence[float] | None,
    guidance: float | None,
    label: str | int | None,
    seed: int,
) -> Bytes:
    plan = plan_edit(model.header, task, steps=steps, times=times)
    usual, candidates = usual_help(model.header, task, plan)
    strength = usual if guidance is None else guidance
    return _run(Task(task, plan, strength, _label(model, label), candidates=candidates), model, subject, num, seed)


def _run(task: Task, model: Model, subject: editing.Subject, num: int, seed: int) -> Bytes:
    if num < 1:
        raise UserError(f"num={num} asks for nothing; use at least 1.")
    editor = Editor(task, model.module, subject)
    label = editor.choose_label()
    seeds = range(seed * BLOCK, seed * BLOCK + num)
    size = editor.batch_size
    parts: list[Any] = [editor.run(seeds[first : first + size], label)[0] for first in range(0, num, size)]
    made = torch.cat(parts)
    edits = [subject.back(made[row : row + 1]) for row in range(num)]
    if any(map(subject.unchanged, edits)):
        warnings.warn("the edit changes nothing.", stacklevel=4)
    return stacked([subject.photo.to_srgb(edit) for edit in edits])
