"""How pictures are edited: the request that all edits share, refused where it contradicts itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cmtool.api.choose import lookalike
from cmtool.errors import UsageError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cmtool.editing.photos import Picture

Fit: TypeAlias = Literal["crop", "pad", "stretch"]
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
