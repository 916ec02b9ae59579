"""Editing pictures with a consistency model, without retraining: inpaint, colorize, superres, deblur, stroke, denoise.

Every function takes a model (or its path or name) and one picture, and returns uint8 variations (num, H, W, C) in
sRGB. A picture is a path, a Pillow image, uint8 (H, W) or (H, W, C), or a float tensor (C, H, W) in [-1, 1]. Those of
other sizes than the model's are fitted as `fit` says ("crop", "pad", "stretch"); with `paste=True` the edit comes back
inside the whole picture.

`perform` edits several pictures, for the command line and the studio too; it refuses what it can before torch comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cmtool.api.choose import check_pictures, choose_label, choose_seeds, lookalike
from cmtool.api.edits import Edits, find_editor, picture_size, vary
from cmtool.api.find import FoundModel, load_model
from cmtool.editing.levels import plan_edit
from cmtool.editing.tasks import TASKS, Asked, Task
from cmtool.errors import UsageError, UserError
from cmtool.talk import ALOUD, Talk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cmtool.api.model import Model
    from cmtool.editing.photos import Bytes, Picture
    from cmtool.editing.subject import Subject

Fit: TypeAlias = Literal["crop", "pad", "stretch"]
AnyModel: TypeAlias = "Model | FoundModel | str | Path"
# An uncertainty map of fewer variations is mostly its own noise.
UNCERTAINTY_NUM = 32
MASK_HINT = "a mask is a picture of its own: white where something is to be made, black elsewhere"


@dataclass(frozen=True, kw_only=True)
class How:
    """How pictures are edited; what an edit has no use for is left as it is.

    Attributes:
        mask: a picture whose white is generated (`invert_mask`: kept); None: what is transparent is generated.
        factor: enlargement; None: to the model's size.
        kernel: what made a picture small that is enlarged: a mean of patches, or a bicubic filter.
        sigma: standard deviation of the noise to remove, on the scale of [-1, 1]; or of a blur, in pixels.
        noise: that of the noise in a picture that is enlarged or sharpened; None: at most that of its bytes.
        steps: evaluations, at tuned noise levels; or `times` names the levels ("paper": the published ones), or
            `indices` those of a grid `of` so many points.
        guidance: over-relaxation of the known part, 0 is the paper's; None suits the levels.
        fresh: share of new noise between evaluations, 1 is the paper's; None suits the levels.
        num: variations of a picture; None: one.
        best_of: make so many and keep `num` of them, those most consistent by `metric`.
        uncertainty: a map of how far variations differ is wanted, which takes several.
        seed: of the variations.
        label: class, by name or number; None: the likeliest.
        fit: how another shape becomes square; None: "crop", with `paste` "pad".
        paste: return the edit inside the whole picture.
        batch_size: variations computed together; None: as many as memory is likely to hold.
    """

    mask: Picture | NDArray[Any] | None = None
    invert_mask: bool = False
    factor: int | None = None
    kernel: Literal["mean", "bicubic"] = "mean"
    sigma: float | None = None
    noise: float | None = None
    steps: int | None = None
    times: Sequence[float] | str | None = None
    indices: Sequence[int] | None = None
    of: int | None = None
    guidance: float | None = None
    fresh: float | None = None
    num: int | None = None
    best_of: int | None = None
    metric: Literal["l2", "lpips"] = "l2"
    uncertainty: bool = False
    seed: int = 0
    label: str | int | None = None
    fit: Fit | None = None
    paste: bool = False
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "auto"

    @property
    def kept(self) -> int:
        """How many variations of a picture are kept; `best_of` are made where it is given."""
        return self.num or (UNCERTAINTY_NUM if self.uncertainty and not self.best_of else 1)

    def check(self) -> None:
        """Refuse what contradicts itself."""
        if self.num is not None and self.num < 1:
            raise UserError(f"num={self.num} asks for nothing; use at least 1.")
        if self.noise is not None and not self.noise >= 0:
            raise UserError(f"noise={self.noise:g} is no standard deviation; it is 0 or more.")
        if self.best_of and self.num and self.num > self.best_of:
            raise UsageError(f"--num {self.num} of --best-of {self.best_of} variations cannot be kept.")
        if self.uncertainty and self.kept < 2:
            raise UsageError("--uncertainty needs at least two variations.", f"e.g. --num {UNCERTAINTY_NUM}")

    def check_mask(self, images: Sequence[Picture]) -> None:
        """Refuse a mask that is no file, or one of the pictures."""
        if self.mask is None and self.invert_mask:
            raise UsageError("--invert-mask turns a --mask round; what is transparent is always what is generated.")
        if not isinstance(self.mask, (str, Path)):
            return
        mask = Path(self.mask)
        if not mask.exists():
            raise UserError(f"--mask {mask}: no such file.", lookalike(mask))
        for image in images:
            if isinstance(image, (str, Path)) and Path(image).resolve() == mask.resolve():
                raise UserError(f"{image} is given as the picture and as its mask.", MASK_HINT)


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
    found = find_editor(row, model, talk)
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
        edits.append(vary(name, editor, seeds, best, how.batch_size, talk))
    return Edits(found, plan, tuple(edits))


def _subjects(
    row: Task, found: FoundModel, images: Sequence[Picture], how: How, talk: Talk
) -> list[tuple[str, Subject]]:
    """Read the mask and all pictures and make them ready; says what was done to them."""
    from cmtool.editing.photos import mask_of, photo_of

    channels, side = picture_size(found.header)
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
        given = photo_of(image, channels, "mask" in row.takes and mask is None)
        subject = row.prepare(given, side, asked)
        for note in subject.notes:
            talk.say(f"{name}: {note}")
        ready.append((name, subject))
    return ready


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
