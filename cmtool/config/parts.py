"""The parts of a training objective, as settings.

Each independent question (which times, which pair, which direction, ...) has a small table. A method is a row of
choices (`config/methods.py`); a recipe in a preset names a method and may change any of its parts.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Table(BaseModel):
    """A frozen table that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Part(Table):
    """A part of an objective."""


class TimesPart(Part):
    """Which noise levels a step trains on.

    `grid_uniform`: index uniform on the grid (Song et al. 2023); `grid_lognormal`: index with log-normal mass (iCT,
    Eq. 10); `grid_log`: index uniform on a grid even in ln t;
    `lognormal`: ln t ~ N(mean, std^2), continuous (EDM, ECT, sCM); `karras_uniform`: uniform in t^(1/rho) (continuous
    time); `flow_uniform`: t / (1 + t) uniform (rectified flow); `student_t`: ln t - ln low half a Student law of scale
    `std`, with an atom at `low` (TCM); `two_lognormal`: two levels, the larger is t and the smaller r, equal for a
    share `same` of the images (MeanFlow); `flow_pair`: t with its rectified-flow time (noise as wide as the data)
    uniform, s uniform below it (IMM); `largest`: sigma_max alone; `discrepancy`: density of ln t proportional to the
    root of the measured discrepancy between sample and flow directions.
    """

    kind: Literal[
        "grid_uniform",
        "grid_lognormal",
        "grid_log",
        "lognormal",
        "karras_uniform",
        "flow_uniform",
        "student_t",
        "two_lognormal",
        "flow_pair",
        "largest",
        "discrepancy",
    ] = "grid_uniform"
    mean: float = Field(-1.1, description="mean of ln t")
    std: float = Field(2.0, gt=0, description="standard deviation of ln t")
    low: float = Field(1.0, gt=0, description="student_t: smallest noise level that is trained")
    df: float = Field(0.01, gt=0, description="student_t: degrees of freedom")
    atom: float = Field(0.25, ge=0, lt=1, description="student_t: share of each batch that sits at low")
    group: int = Field(1, ge=1, description="neighboring images of a batch that share their times")
    same: float = Field(0.25, ge=0, le=1, description="two_lognormal: share of each batch with r = t")
    floor: float = Field(0.1, ge=0, le=1, description="discrepancy: share that is uniform in ln t")


class CurriculumPart(Part):
    """The number of grid points N(k) over the run, as a function of the share of the run that is done."""

    scales: Literal["fixed", "sqrt", "doubling", "halving"] = "fixed"
    s0: int = Field(2, ge=1, description="sqrt, doubling, halving: first number of intervals")
    s1: int = Field(150, ge=1, description="sqrt, doubling, halving: last number of intervals; fixed: N, in points")
    form: Literal["code", "paper"] = Field("code", description="mu(k) = exp(s0 ln mu0 / (N-1)) (code) or / N (paper)")


class GapPart(Part):
    """How the cleaner time r follows from t: the neighbor on the grid, ECT's ratio map, or the limit r -> t.

    `decrement`: r = max(s, t - sigma_max / 2^k), never past the time s that the network jumps to (IMM).
    """

    kind: Literal["neighbor", "ratio", "decrement", "none"] = "neighbor"
    map: Literal["sigmoid", "constant"] = "sigmoid"
    q: float = Field(2.0, gt=1, description="ratio: 1 - r/t shrinks by q per stage")
    k: float = Field(8.0, ge=0, description="ratio: 1 - r/t is up to 1 + k/2 times larger at small t; decrement: power")
    b: float = Field(1.0, ge=0)
    stages: int = Field(8, ge=1, description="ratio: stages over the run")
    first: int = Field(0, ge=0, description="ratio: stages that an earlier run has done")
    cap: float = Field(1.0, gt=0, le=1, description="ratio: largest r / t")


class CouplingPart(Part):
    """Which clean image is paired with which noise.

    `independent`: as drawn; `ot`: noise assigned to the images of the batch at the least total squared distance;
    `generator`: a share of the images is replaced by the model's own answer at (x_r, r) (generator-augmented flows);
    `teacher`: images made from the noise by the teacher's ODE, from a store (knowledge distillation, reflow; with
    `path`, x_t is the point of the teacher's path at t: consistency mid-training).
    """

    kind: Literal["independent", "ot", "generator", "teacher"] = "independent"
    mix: float = Field(0.5, ge=0, le=1, description="generator: mu, the share of images that the model makes")
    mix_end: float | None = Field(None, ge=0, le=1, description="generator: mu at the end of the run; None: constant")
    predictor: Literal["online", "ema", "frozen"] = Field("ema", description="generator: whose answer")
    model: str | None = Field(None, description="generator: file or run of the frozen predictor")
    pairs: int = Field(4096, ge=1, description="teacher: number of stored pairs")
    solver_steps: int = Field(18, ge=1, description="teacher: Heun steps that make a pair")
    path: bool = Field(False, description="teacher: store the whole path, solved by DPM-Solver++ 2M on the times' grid")


class DirectionPart(Part):
    """The slope dx/dt that leads from x_t to x_r.

    `sample`: towards the training image itself (consistency training); `teacher`: the teacher's probability flow
    (consistency distillation); `posterior_mean`: towards the mean of the training images given x_t
    (variance-reduced, Stable Consistency Tuning); `target`: the target network's flow (progressive distillation).
    """

    kind: Literal["sample", "teacher", "posterior_mean", "target"] = "sample"
    solver: Literal["euler", "heun", "midpoint", "dpmpp_2m", "adams_bashforth"] = "euler"
    substeps: int = Field(1, ge=1, le=64, description="solver steps within a pair")
    reference: int = Field(0, ge=0, description="posterior_mean: number of reference images; 0: all")
    pool: Literal["data", "batch"] = Field("data", description="posterior_mean: over the data, or the batch alone")
    guidance: float = Field(1.0, ge=0, description="teacher: classifier-free guidance scale; 1: none")


class TargetPart(Part):
    """Where the value that f(x_t, t) must reach comes from.

    `pair`: the target network at (x_r, r); `data`: the clean image (denoising); `leap`: the clean image that one Euler
    step to x_r would need (progressive distillation); `tangent`: f must not change along the flow (continuous time);
    `trig_tangent`: the same in TrigFlow's F, normalized (sCM); `average_velocity`: MeanFlow's identity; `moments`: in
    each group, the jumps from x_t to the level s must have the law of the jumps from x_r to it (IMM).
    """

    rule: Literal["pair", "data", "leap", "tangent", "trig_tangent", "average_velocity", "moments"] = "pair"
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the target network; 0: the student itself, stop-gradient")
    adaptive: bool = Field(False, description="decay follows N: exp(s0 ln mu0 / (N-1)) with mu0 = ema")
    update: Literal["ema", "stage"] = Field("ema", description="stage: the target is renewed where N changes")
    stop_gradient: bool = Field(True, description="tangent: False differentiates through the tangent as well")
    derivative: Literal["forward", "difference"] = Field("forward", description="exact, or a central difference")
    difference_step: float = Field(1e-2, gt=0, le=0.5, description="difference: relative step in t")
    normalize: Literal["norm", "clip", "none"] = Field("norm", description="trig_tangent: g / (|g| + c), or clip to 1")
    c: float = Field(0.1, ge=0, description="trig_tangent: the constant of the normalization")
    warmup: float = Field(0.025, ge=0, le=1, description="trig_tangent: share of the run in which the tangent grows in")

    @property
    def differentiates(self) -> bool:
        """Whether the rule asks the network for its derivative along the flow."""
        return self.rule in ("tangent", "trig_tangent", "average_velocity")

    @property
    def keeps_network(self) -> bool:
        """Whether the target is a separate network, not the student."""
        return self.update == "stage" or (self.rule in ("pair", "moments") and self.ema > 0)


class DistancePart(Part):
    """How prediction and target are compared; every distance gives one number per image."""

    kind: Literal["l1", "l2", "squared_norm", "pseudo_huber", "cauchy", "lpips"] = "l2"
    c: float | None = Field(None, ge=0, description="pseudo_huber, cauchy: None: c_scale * sqrt(values an image)")
    c_scale: float = Field(0.00054, ge=0)
    pooling: Literal["max", "average"] = Field("max", description="lpips: pooling of the VGG features")
    resize: int = Field(224, ge=0, description="lpips: side to which images below 256 are enlarged; 0: never")


class WeightingPart(Part):
    """The weight of an image's distance as a function of its times, of itself, or learned.

    `learned`: exp(w) d - w with the network's head w(t) (sCM); `adaptive`: d / (d + c)^p (MeanFlow); `sigmoid`: a
    sigmoid of the log-SNR times its speed in rectified flow (IMM).
    """

    kind: Literal[
        "uniform",
        "inverse_gap",
        "karras",
        "snr",
        "snr_plus_one",
        "truncated_snr",
        "c_out",
        "flow",
        "grid_speed",
        "learned",
        "adaptive",
        "sigmoid",
    ] = "uniform"
    p: float = Field(0.75, ge=0, description="adaptive: exponent")
    c: float = Field(1e-3, gt=0, description="adaptive: constant")
    a: float = Field(1.0, ge=0, description="sigmoid: exponent of the image's share alpha in x_t")
    b: float = Field(5.0, description="sigmoid: log-SNR at its middle")
    atom: float | None = Field(None, ge=0, description="weight of the mean over the atom of student_t; None: all alike")


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
    kind: Literal["diffusion", "consistency"] | None = Field(
        None, description="what the model is afterwards; None: a diffusion model for edm, else a consistency model"
    )
    needs: Literal["nothing", "teacher", "init", "consistency_init"] = Field(
        "nothing", description="teacher: --teacher; init: --init; consistency_init: --init with a consistency model"
    )
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

    @property
    def model_kind(self) -> str:
        """What the trained model is: "diffusion" or "consistency"."""
        return self.kind or ("diffusion" if self.family == "edm" else "consistency")
