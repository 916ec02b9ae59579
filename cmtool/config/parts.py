"""The parts of a training objective, as settings.

Each independent question (which times, which pair, which direction, ...) has a small table. A method is a row of
choices (`config/methods.py`); a recipe in a preset names a method and may change any of its parts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator


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
    share `same` of the images (MeanFlow); `two_karras`: the same with both uniform in t^(1/rho); `dyadic`: gaps of
    2^-j of rectified flow's time, the shortest for a share `same` (shortcut models);
    `flow_pair`: t with its rectified-flow time (noise as wide as the data) uniform, s uniform below it (IMM);
    `largest`: sigma_max alone; `discrepancy`: density of ln t proportional to the root of the measured discrepancy
    between sample and flow directions.
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
        "two_karras",
        "dyadic",
        "flow_pair",
        "largest",
        "discrepancy",
    ] = "grid_uniform"
    mean: float = Field(-1.1, description="mean of ln t")
    std: float = Field(2.0, gt=0, description="standard deviation of ln t")
    low: float = Field(1.0, gt=0, description="student_t: smallest noise level that is trained")
    df: float = Field(0.01, gt=0, description="student_t: degrees of freedom")
    atom: float = Field(0.25, ge=0, lt=1, description="student_t: share of each batch that sits at low")
    mean_r: float | None = Field(None, description="two_lognormal: mean of ln r, if r has its own law below t")
    std_r: float | None = Field(None, gt=0, description="two_lognormal: standard deviation of ln r; None: std")
    mean_same: float | None = Field(None, description="two_lognormal: mean of ln t where r = t, if it has its own law")
    std_same: float | None = Field(None, gt=0, description="two_lognormal: standard deviation there; None: std")
    same: float = Field(0.25, ge=0, le=1, description="two times: share of each batch with r = t, or the shortest gap")
    halvings: int = Field(7, ge=1, le=20, description="dyadic: the shortest gap is 2^-halvings of the whole")
    group: int = Field(1, ge=1, description="neighboring images of a batch that share their times")
    floor: float = Field(0.1, ge=0, le=1, description="discrepancy: share that is uniform in ln t")

    @property
    def draws_two(self) -> bool:
        """Whether the law draws two times for each image, not a time whose neighbor is given."""
        return self.kind in ("two_lognormal", "two_karras", "dyadic")


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


class LegsPart(Part):
    """two_leg: the length a of the first leg, as a share of the gap from t to r in rectified flow's time.

    `constant`: start; `exponential`: from start to end over the run (SoFlow); `sigmoid`: from 1 to 0, cut off at
    1 - end and at end (alpha-Flow); `uniform`: drawn for each image between end and start (CTM).
    """

    law: Literal["constant", "exponential", "sigmoid", "uniform"] = "constant"
    start: float = Field(1.0, gt=0, le=1, description="a at the start, or its largest value")
    end: float = Field(0.005, gt=0, le=1, description="a at the end, or its smallest value")
    gamma: float = Field(25.0, gt=0, description="sigmoid: steepness")
    begins: float = Field(0.0, ge=0, lt=1, description="sigmoid: share of the run where it begins")
    ends: float = Field(1.0, gt=0, le=1, description="sigmoid: share of the run where it ends")
    shortest: float = Field(
        1e-4, gt=0, le=0.5, description="shortest first leg in rectified flow's time; as short a gap is flow matching"
    )


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
    Guidance leads a teacher away from its answer to no label, or from a weak model; in networks of two times it leads
    the sample's slope away from the network's own.
    """

    kind: Literal["sample", "teacher", "posterior_mean", "target"] = "sample"
    solver: Literal["euler", "heun", "midpoint", "dpmpp_2m", "adams_bashforth"] = "euler"
    substeps: int = Field(1, ge=1, le=64, description="solver steps within a pair")
    reference: int = Field(0, ge=0, description="posterior_mean: number of reference images; 0: all")
    pool: Literal["data", "batch"] = Field("data", description="posterior_mean: over the data, or the batch alone")
    guidance: float = Field(1.0, ge=0, description="guidance scale; 1: none")
    weak: str | None = Field(
        None, description="teacher: file or run of a worse model to be guided away from; None: its answer to no label"
    )
    mix: float = Field(0.0, ge=0, lt=1, description="sample: share of the own velocity in the guided one")
    interval: tuple[float, float] | None = Field(None, description="noise levels that are guided; None: all")


class AugmentPart(Part):
    """Augmentation that does not leak: images are changed at random and the network is told how (EDM, Appendix F.2).

    Each change happens with probability `p` times its own factor, at most 1. Samples are made with "nothing was done".
    The defaults are EDM's for CIFAR-10, where p = 0.12; mirroring always has its even chance.
    """

    p: float = Field(0.0, ge=0, le=1, description="probability of every change; 0: no augmentation")
    xflip: float = Field(1e8, ge=0, description="factor of p: the mirror image (then one half of the images)")
    yflip: float = Field(1.0, ge=0, description="factor of p: upside down (then one half)")
    translate_int: float = Field(0.0, ge=0, description="factor of p: moved by whole pixels, up to 1/8 of the side")
    scale: float = Field(1.0, ge=0, description="factor of p: scaled by 2^(n/5), n ~ N(0, 1)")
    rotate_frac: float = Field(1.0, ge=0, description="factor of p: turned by any angle")
    aniso: float = Field(1.0, ge=0, description="factor of p: scaled by 2^(n/5) along an axis and by 2^(-n/5) across")
    translate_frac: float = Field(1.0, ge=0, description="factor of p: moved by N(0, 1/8) of the side in x and y")

    @property
    def labels(self) -> int:
        """How many numbers tell the network what was done; 0 without augmentation."""
        singles, pairs = (self.xflip, self.yflip, self.scale), (self.translate_int, self.rotate_frac, self.aniso)
        each = [(factor, 1) for factor in singles] + [(factor, 2) for factor in (*pairs, self.translate_frac)]
        return sum(count for factor, count in each if factor > 0) if self.p > 0 else 0


class TargetPart(Part):
    """Where the value that f(x_t, t) must reach comes from.

    `pair`: the target network at (x_r, r); `data`: the clean image (denoising); `leap`: the clean image that one Euler
    step to x_r would need (progressive distillation); `tangent`: f must not change along the flow (continuous time);
    `trig_tangent`: the same in TrigFlow's F, normalized (sCM); `average_velocity`: MeanFlow's identity; `two_leg`: the
    average velocity of a first leg and of the network's own way from there to r (SoFlow, alpha-Flow, CTM, shortcuts);
    `moments`: in each group, the jumps from x_t to the level s must have the law of the jumps from x_r to it (IMM).
    """

    rule: Literal["pair", "data", "leap", "tangent", "trig_tangent", "average_velocity", "two_leg", "moments"] = "pair"
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the target network; 0: the student itself, stop-gradient")
    adaptive: bool = Field(False, description="decay follows N: exp(s0 ln mu0 / (N-1)) with mu0 = ema")
    update: Literal["ema", "stage"] = Field("ema", description="stage: the target is renewed where N changes")
    stop_gradient: bool = Field(True, description="tangent: False differentiates through the tangent as well")
    derivative: Literal["forward", "difference"] = Field("forward", description="exact, or a central difference")
    difference_step: float = Field(1e-2, gt=0, le=0.5, description="difference: relative step in t")
    normalize: Literal["norm", "clip", "none"] = Field("norm", description="trig_tangent: g / (|g| + c), or clip to 1")
    c: float = Field(0.1, ge=0, description="trig_tangent: the constant of the normalization")
    warmup: float = Field(0.025, ge=0, le=1, description="trig_tangent: share of the run in which the tangent grows in")
    first: Literal["direction", "own"] = Field("direction", description="two_leg: who goes the first leg")
    residual: Literal["whole", "rate", "step"] = Field(
        "whole", description="two_leg: measured as it is, by the length of the leg (rate), or pulling by it (step)"
    )
    tangent: Literal["direction", "own"] = Field(
        "direction",
        description="average_velocity: whose velocity the derivative is taken along (own: improved MeanFlow)",
    )
    limit: bool = Field(False, description="two_leg: average_velocity once the law of the first leg is at its end")

    @property
    def differentiates(self) -> bool:
        """Whether the rule asks the network for its derivative along the flow."""
        return self.rule in ("tangent", "trig_tangent", "average_velocity") or (self.rule == "two_leg" and self.limit)

    @property
    def keeps_network(self) -> bool:
        """Whether the target is a separate network, not the student."""
        return self.update == "stage" or (self.rule in ("pair", "two_leg", "moments") and self.ema > 0)


class DistancePart(Part):
    """How prediction and target are compared; every distance gives one number per image."""

    kind: Literal["l1", "l2", "squared_norm", "pseudo_huber", "cauchy", "lpips"] = "l2"
    c: float | None = Field(None, ge=0, description="pseudo_huber, cauchy: None: c_scale * sqrt(values an image)")
    c_scale: float = Field(0.00054, ge=0)
    pooling: Literal["max", "average"] = Field("max", description="lpips: pooling of the VGG features")
    resize: int = Field(224, ge=0, description="lpips: side to which images below 256 are enlarged; 0: never")
    details: tuple[PositiveFloat, ...] = Field(
        (), description="weights of fine details (Haar), those of 2 x 2 pixels first; none: pixels as they are"
    )


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


class ScorePart(Part):
    """Score distillation: samples move to where the teacher's score and that of the samples' own law agree.

    That law is followed by a third network, the fake one: a denoiser that starts as the teacher and learns from the
    model's samples. `sid`: score identity distillation (Zhou et al. 2024); `dmd`: distribution matching (Yin et al.
    2024). The samples are those of multistep sampling at `levels`, each level's made from the model's own answers at
    the levels before it; the fake network is told which level a sample is of.
    """

    kind: Literal["none", "sid", "dmd"] = "none"
    alpha: float = Field(1.2, ge=0, description="sid: share of |T - F|^2 that is taken off the loss (1: the safe one)")
    levels: tuple[float, ...] = Field(
        (), description="noise levels of the samples; none: sigma_max from a consistency model, else 5 sigma_data"
    )
    reach: tuple[float, float] = Field(
        (0.0, 0.8), description="samples are compared at noise levels between these shares of the range of t^(1/rho)"
    )
    fake_steps: int = Field(1, ge=1, le=100, description="steps of the fake network in each of the model's")
    fake_lr: float = Field(1.0, gt=0, le=1000, description="its learning rate in units of train.lr")
    fake_mean: float = Field(-1.2, description="mean of ln t at which it learns")
    fake_std: float = Field(1.2, gt=0, description="standard deviation of ln t at which it learns")
    keep: float = Field(0.0, ge=0, description="weight of the recipe's other parts (a consistency loss); 0: left out")
    keep_every: int = Field(1, ge=1, description="steps from one that looks at the other parts to the next")

    @field_validator("levels")
    @classmethod
    def _decreasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(a <= b for a, b in pairwise((*value, 0.0))):
            raise ValueError("levels must be strictly decreasing and positive")
        return value

    @field_validator("reach")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("reach must be two increasing shares in [0, 1]")
        return value


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
    needs: Literal["nothing", "teacher", "init", "consistency_init", "teacher_and_consistency_init"] = Field(
        "nothing", description="teacher: --teacher; init: --init; consistency_init: --init with a consistency model"
    )
    may_init: bool = Field(False, description="takes an optional --init")
    times: TimesPart = TimesPart()
    curriculum: CurriculumPart = CurriculumPart()
    gap: GapPart = GapPart()
    legs: LegsPart = LegsPart()
    coupling: CouplingPart = CouplingPart()
    direction: DirectionPart = DirectionPart()
    target: TargetPart = TargetPart()
    distance: DistancePart = DistancePart()
    weighting: WeightingPart = WeightingPart()
    score: ScorePart = ScorePart()
    augment: AugmentPart = AugmentPart()
    expected: Expected | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def takes_teacher(self) -> bool:
        """Whether it follows a teacher."""
        return self.needs in ("teacher", "teacher_and_consistency_init")

    @property
    def needs_init(self) -> bool:
        """Whether it goes on from a model's weights, and cannot begin without."""
        return self.needs in ("init", "consistency_init", "teacher_and_consistency_init")

    @property
    def goes_on(self) -> bool:
        """Whether those weights must be a consistency model's."""
        return self.needs in ("consistency_init", "teacher_and_consistency_init")

    @property
    def model_kind(self) -> str:
        """What the trained model is: "diffusion" or "consistency"."""
        return self.kind or ("diffusion" if self.family == "edm" else "consistency")
