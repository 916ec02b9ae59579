"""The schema of a preset: every setting with its default, unit and bounds.

A preset file holds the tables below. `RunConfig` is one of its recipes fully resolved; a run folder keeps it as
`config.toml`, and every other room works from it. All tables are frozen and refuse unknown keys.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cmtool.config.networks import Network
from cmtool.config.networks import NetworkConfig as NetworkConfig
from cmtool.config.parts import RecipeConfig, Table
from cmtool.config.sources import SourceName, is_own

Family = Literal["edm", "ct", "cd"]
FAMILIES: tuple[Family, ...] = ("edm", "ct", "cd")
OWN_HOLDOUT = 0.05


class AboutConfig(Table):
    """What a preset is."""

    title: str = ""
    paper: str = ""
    note: str = ""


class DataConfig(Table):
    """Where images come from and what shape they take."""

    source: SourceName
    path: str | None = Field(None, description="file or folder; None for built-in sources")
    resolution: int = Field(ge=1, le=1024, description="image side in pixels")
    channels: int = Field(3, ge=1, le=4)
    flip: bool = Field(False, description="mirror half of the images, drawn per step")
    labels: bool = Field(False, description="condition the network on class labels")
    num_classes: int | None = Field(None, ge=1, description="number of classes; None: taken from the data")
    size: int | None = Field(None, ge=1, description="number of images of a generated source; a limit for the others")
    kind: str | None = Field(None, description="variant of the source, e.g. the mixture of toy2d")
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how an image of another shape becomes square")
    filter: Literal["adm", "edm", "bicubic", "box", "lanczos"] = Field("adm", description="down-sampling rule")
    small: Literal["skip", "upscale"] = Field("skip", description="images smaller than the resolution")
    condition: str | None = Field(
        None, description="picture that the network sees too: superres:N, gray, edges, or a folder of pairs"
    )
    latent: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="channels and side of the latents that images are encoded to; None: not said, usually images"
    )
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share kept from training to judge by, at most 2,000; default .05 of files of images",
    )

    @property
    def shape(self) -> tuple[int, int]:
        """(channels, side) of what the network works on."""
        return self.latent or (self.channels, self.resolution)

    @model_validator(mode="before")
    @classmethod
    def _hold_out(cls, table: Any) -> Any:
        """Fill in the usual share: what is generated or published has references, a user's own images have none."""
        if isinstance(table, dict) and table.get("holdout") is None:
            own = is_own(table.get("source"), table.get("path"))
            return {**table, "holdout": OWN_HOLDOUT if own else 0.0}
        return table


class ProcessConfig(Table):
    """The noise process and how a raw network becomes f(x, t)."""

    kind: Literal["ve", "trig", "flow"] = "ve"
    parameterization: Literal["edm", "consistency", "hard", "trig", "flow", "ddpm"] = "consistency"
    sigma_min: float = Field(0.002, gt=0, description="smallest noise level, where f is the identity")
    sigma_max: float = Field(80.0, gt=0, description="largest noise level")
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data")
    rho: float = Field(7.0, gt=0, description="exponent of the Karras grid")
    noise_scale: float = Field(0.25, gt=0, description="c_noise = noise_scale * ln t (0.25: EDM, 250: OpenAI's ADM)")
    truncated_at: float | None = Field(
        None, gt=0, description="noise level below which a second, frozen network answers; None: one network"
    )

    @model_validator(mode="after")
    def _ordered(self) -> ProcessConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min} must be below sigma_max = {self.sigma_max}")
        return self


class EmaConfig(Table):
    """A moving average of the weights: exponential with a fixed decay, or EDM2's power function."""

    kind: Literal["exponential", "power", "none"] = "exponential"
    decay: float = Field(0.9999, ge=0, lt=1, description="exponential: weight of the old average per step")
    std: float = Field(0.10, gt=0, lt=0.29, description="power: relative width (EDM2 sigma_rel; 0.10 is gamma 6.94)")


class TrainConfig(Table):
    """The optimizer, the length of the run and its rhythm."""

    steps: int = Field(ge=1, description="optimizer steps; every schedule scales with it")
    time: float | None = Field(
        None, gt=0, description="seconds within which the model should be there: the number of steps follows the clock"
    )
    batch_size: int = Field(64, ge=1, description="images per step over all processes")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="images per forward pass; None: the whole batch; auto: halved until it fits the memory"
    )
    optimizer: Literal["radam", "adam", "adamw", "lion", "sgd", "muon"] = Field(
        "radam", description="muon: Muon for matrices and kernels, AdamW for the rest"
    )
    lr: float = Field(1e-4, gt=0, le=10)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the run over which lr rises from zero")
    decay: Literal["none", "linear", "cosine", "inverse_sqrt"] = "none"
    decay_start: float = Field(0.0, ge=0, lt=1, description="share after which lr falls; inverse_sqrt: as share^-1/2")
    decay_end: float = Field(0.0, ge=0, le=1, description="lr at the end as a share of lr")
    restart: Literal["none", "stage"] = Field(
        "none", description="stage: whenever a halving curriculum halves, lr and the optimizer's memory begin anew"
    )
    grad_clip: float | None = Field(None, gt=0, description="largest global gradient norm")
    ema: EmaConfig = EmaConfig()
    extra_emas: tuple[EmaConfig, ...] = ()
    label_dropout: float = Field(0.0, ge=0, lt=1, description="share of labels replaced by the null class")
    seed: int = Field(0, ge=0)
    bad_step: Literal["stop", "rollback"] = Field(
        "stop", description="a loss or gradient that is not finite: stop, or go back to the last checkpoint"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    half_passes: Literal["pair", "backward", "all"] = Field(
        "pair",
        description="what bf16 rounds in consistency models: gradients and the difference of both passes, gradients "
        "alone, or all passes (less exact)",
    )
    deterministic: bool = False
    compile: bool = Field(
        False, description="torch.compile the networks block by block; without a compiler they run as they are"
    )
    fused_norm: bool = Field(
        False,
        description="a GPU: normalize, condition and activate in one kernel, where it agrees with torch and is faster",
    )
    pairs_in_step: bool = Field(
        False,
        description="a GPU: the passes of a pair side by side, a convolution of both in one call, where it is faster",
    )
    cuda_graphs: bool = Field(True, description="record the passes of a small network on a GPU once and replay them")
    shard: bool = Field(False, description="several processes: split weights, optimizer and averages over them (FSDP2)")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; None: torch's choice")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.jsonl")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    sample_every: int = Field(1000, ge=1, description="steps between sample grids")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: none")
    snapshot_every: int = Field(0, ge=0, description="steps between snapshots for cmtool ema; 0: none")
    keep_every: int = Field(0, ge=0, description="keep every checkpoint whose step this divides; 0: the last two")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas must lie in [0, 1)")
        return value

    @model_validator(mode="after")
    def _micro(self) -> TrainConfig:
        if isinstance(self.micro_batch, int) and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch = {self.micro_batch} is larger than batch_size = {self.batch_size}")
        return self


class SampleConfig(Table):
    """Default sampling: noise levels per number of evaluations, and the sampler."""

    times: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="number of evaluations -> noise levels"
    )
    sampler: str | None = None
    steps: int | None = Field(None, ge=1, description="evaluations (consistency) or solver steps (teacher)")

    @field_validator("times")
    @classmethod
    def _decreasing(cls, value: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for key, times in value.items():
            if not key.isdigit() or int(key) != len(times):
                raise ValueError(f"times['{key}'] must hold as many noise levels as its key says")
            if any(a <= b for a, b in pairwise(times)):
                raise ValueError(f"times['{key}'] must be strictly decreasing")
        return value


class EditLevels(Table):
    """Noise levels of an editing task: `steps` geometric ones from `first` to `last`, and the settings found with them.

    For another number K of evaluations the last level is last * (steps / K)^.55: more evaluations can reach finer
    levels. The first stays, since it must drown what the start got wrong.
    """

    steps: int = Field(20, ge=1, description="evaluations")
    first: float = Field(gt=0, description="largest noise level")
    last: float = Field(gt=0, description="smallest noise level")
    guidance: float = Field(0.0, ge=0, le=10, description="over-relaxation of the known part between the evaluations")
    fresh: float = Field(
        1.0, gt=0, le=1, description="share of new noise between them; the rest is the found one, negated"
    )
    candidates: int = Field(1, ge=1, le=64, description="a variation is the most consistent of so many edits")
    class_last: float | None = Field(None, gt=0, description="smallest level while the class is searched (none: last)")

    @model_validator(mode="after")
    def _ordered(self) -> EditLevels:
        for name in ("last", "class_last"):
            if (getattr(self, name) or 0.0) >= self.first:
                raise ValueError(f"{name} = {getattr(self, name)} must be below first = {self.first}")
        return self


class EditConfig(Table):
    """Noise levels of `cmtool edit`: tuned ones for each task, and the published ones."""

    inpaint: EditLevels = EditLevels(first=1.2, last=0.2, guidance=0.8)
    colorize: EditLevels = EditLevels(first=20.0, last=0.15, guidance=0.6)
    superres: EditLevels = EditLevels(first=0.9, last=0.2, guidance=0.4)
    deblur: EditLevels = EditLevels(steps=4, first=2.0, last=0.2, guidance=0.4, fresh=0.1)
    stroke: tuple[float, ...] = Field((5.38, 2.24), min_length=1, description="levels of stroke editing")
    paper_stroke: tuple[float, ...] = Field((5.38, 2.24), min_length=1, description="published ones of stroke editing")
    paper_points: int = Field(40, ge=2, description="points of the published grid, of which the last is the identity")

    @field_validator("stroke", "paper_stroke")
    @classmethod
    def _stroke(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value[-1] <= 0 or any(a <= b for a, b in pairwise(value)):
            raise ValueError("levels of stroke editing must be strictly decreasing and positive")
        return value


class EvalConfig(Table):
    """What `cmtool eval` compares with when it is not told."""

    reference: str | None = None
    features: str | None = None
    count: int = Field(50_000, ge=2, description="number of samples")
    metrics: tuple[str, ...] = ()


class StageRow(Table):
    """One training of a plan: a recipe of the preset, its share of the time, its folder below the run folder."""

    recipe: str
    share: float = Field(gt=0)
    folder: str

    @field_validator("folder")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not value.isidentifier():
            raise ValueError(f"'{value}' must be one word, such as 'teacher'")
        return value


class PlanTable(Table):
    """The stages that a preset is trained in, each from the newest models before it that its recipe needs.

    `time` is that of all of them, in seconds; `stages` are rows as in `StageRow`; `asked` is what it was made for, and
    `machine` where.
    """

    time: float | None = Field(None, gt=0)
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)
    asked: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)


class PresetFile(Table):
    """A preset file as written: tables of shared defaults, and recipes that may override any of them."""

    about: AboutConfig = AboutConfig()
    data: dict[str, Any]
    network: dict[str, Any] = Field(default_factory=dict)
    process: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any]
    sample: dict[str, Any] = Field(default_factory=dict)
    edit: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, dict[str, Any]] = Field(default_factory=dict)
    plan: PlanTable | None = None


class RunConfig(Table):
    """One recipe of one preset, fully resolved: all that a run needs to know.

    Whether its tables go together is for `combinations.check_combination` to say, which `load` asks.
    """

    preset: str
    recipe_name: str
    about: AboutConfig = AboutConfig()
    data: DataConfig
    network: Network
    process: ProcessConfig
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    edit: EditConfig = EditConfig()
    eval: EvalConfig = EvalConfig()
    recipe: RecipeConfig
    teacher: str | None = None
    init: str | None = None

    @property
    def family(self) -> str:
        """The command that trains it: "edm", "ct" or "cd"."""
        return self.recipe.family
