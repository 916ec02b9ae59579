"""The parts that a training objective is put together from, as settings.

One small table for each independent question (which times, which pair, which direction, ...). A method is a row of
choices (`config/methods.py`); a recipe in a preset names a method and may change any of its parts.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A frozen part of an objective."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class TimesPart(Part):
    """Which noise levels a step looks at.

    `grid_uniform`: index uniform on the grid (Song et al. 2023); `grid_lognormal`: index with log-normal mass (iCT,
    Eq. 10);
    `lognormal`: ln t ~ N(mean, std^2), continuous (EDM, ECT); `karras_uniform`: uniform in t^(1/rho) (continuous time).
    """

    kind: Literal["grid_uniform", "grid_lognormal", "lognormal", "karras_uniform"] = "grid_uniform"
    mean: float = Field(-1.1, description="mean of ln t")
    std: float = Field(2.0, gt=0, description="standard deviation of ln t")


class CurriculumPart(Part):
    """The number of grid points N(k) over the run, as a function of the share of the run that is done."""

    scales: Literal["fixed", "sqrt", "doubling"] = "fixed"
    s0: int = Field(2, ge=1, description="sqrt, doubling: first number of intervals")
    s1: int = Field(150, ge=1, description="sqrt, doubling: last number of intervals; fixed: N itself, in points")
    form: Literal["code", "paper"] = Field("code", description="mu(k) = exp(s0 ln mu0 / (N-1)) (code) or / N (paper)")


class GapPart(Part):
    """How the cleaner time r follows from t: the grid neighbor, or ECT's ratio map, or a limit r -> t."""

    kind: Literal["neighbor", "ratio", "none"] = "neighbor"
    map: Literal["sigmoid", "constant"] = "sigmoid"
    q: float = Field(2.0, gt=1, description="ratio: 1 - r/t shrinks by q per stage")
    k: float = Field(8.0, ge=0)
    b: float = Field(1.0, ge=0)
    stages: int = Field(8, ge=1, description="ratio: stages over the run")


class CouplingPart(Part):
    """Which clean image meets which noise."""

    kind: Literal["independent"] = "independent"


class DirectionPart(Part):
    """The slope dx/dt that leads from x_t to x_r.

    `sample`: towards the training image itself (consistency training); `teacher`: the teacher's probability flow
    (consistency distillation); `posterior_mean`: towards the mean of the training images given x_t
    (variance-reduced, Stable Consistency Tuning).
    """

    kind: Literal["sample", "teacher", "posterior_mean"] = "sample"
    solver: Literal["euler", "heun"] = "euler"
    reference: int = Field(0, ge=0, description="posterior_mean: number of reference images; 0: all")


class TargetPart(Part):
    """Where the value that f(x_t, t) must reach comes from.

    `pair`: the target network at (x_r, r); `data`: the clean image (denoising).
    """

    rule: Literal["pair", "data"] = "pair"
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the target network; 0: the student itself, stop-gradient")
    adaptive: bool = Field(False, description="decay follows N: exp(s0 ln mu0 / (N-1)) with mu0 = ema")


class DistancePart(Part):
    """How prediction and target are compared; every distance gives one number an image."""

    kind: Literal["l1", "l2", "pseudo_huber", "lpips"] = "l2"
    c: float | None = Field(None, ge=0, description="pseudo_huber: the constant; None: c_scale * sqrt(values an image)")
    c_scale: float = Field(0.00054, ge=0)


class WeightingPart(Part):
    """The weight of an image's distance as a function of its times."""

    kind: Literal["uniform", "inverse_gap", "karras", "snr", "snr_plus_one", "truncated_snr", "c_out"] = "uniform"


class Expected(Part):
    """Published (or measured) quality: Frechet distance in one and two evaluations, and where it is from."""

    nfe1: float | None = None
    nfe2: float | None = None
    metric: str = "FID"
    source: str = ""


class RecipeConfig(Part):
    """A named way to train: its family (the command), its parts, and what it needs to start from."""

    method: str
    family: Literal["edm", "ct", "cd"]
    title: str = ""
    needs: Literal["nothing", "teacher", "init"] = Field("nothing", description="teacher: --teacher; init: --init")
    may_init: bool = Field(False, description="takes an optional --init")
    times: TimesPart = TimesPart()
    curriculum: CurriculumPart = CurriculumPart()
    gap: GapPart = GapPart()
    coupling: CouplingPart = CouplingPart()
    direction: DirectionPart = DirectionPart()
    target: TargetPart = TargetPart()
    distance: DistancePart = DistancePart()
    weighting: WeightingPart = WeightingPart()
    expected: Expected | None = None
    options: dict[str, Any] = Field(default_factory=dict)
