"""What a plan is made by: tables of networks, images needed, recipes and what follows from counts.

Found by experiment, and meant to be changed by it: every row is a number that `benchmarks/` can measure again. Needs no
torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

RESOLUTIONS = (8, 16, 32, 64, 128, 256)
# Where U-Nets are chosen: at 16 and 32 px transformers are far ahead of them in equal time.
OF_UNETS = (8, 64, 128, 256)
# Pictures may be enlarged by this factor to the resolution above, e.g. 28 pixels to 32.
ENLARGED = 1.25
# The ratio to be content with where no resolution gets all the images that it needs.
FAIR = 0.4
# The times that `cmtool plan` compares, in seconds, and the time of a run that names none.
TIMES = {"5 min": 300.0, "30 min": 1800.0, "2 h": 7200.0, "a night (8 h)": 28_800.0}
USUAL_TIME = 1800.0


@dataclass(frozen=True, kw_only=True)
class Size(ABC):
    """A network that a plan may choose: its learning rates, images a step, and what it needs to be trained.

    `lr` is the rate of students and of training from scratch, `teacher_lr` that of teachers. `need` multiplies the
    images of `NEED`; `sides` are the resolutions at which it is chosen.
    """

    kind: ClassVar[str]

    name: str
    lr: float
    teacher_lr: float
    batch: int
    need: float
    sides: tuple[int, ...] = RESOLUTIONS

    @property
    @abstractmethod
    def drops(self) -> bool:
        """Whether it is large enough to need dropout."""

    @abstractmethod
    def network(self, resolution: int) -> dict[str, Any]:
        """Return the [network] table for pictures of this side."""

    @abstractmethod
    def work(self, resolution: int) -> float:
        """Return the multiplications of a forward pass of one picture, roughly."""

    @abstractmethod
    def memory(self, resolution: int) -> tuple[float, float]:
        """Return bytes of weights with optimizer and averages, and of activations for each picture, both rough."""

    @abstractmethod
    def described(self) -> str:
        """Return what kind of network it is, in a few words."""

    def takes(self, named: Mapping[str, Any]) -> bool:
        """Whether settings of [network] that were named can be its own: they are not those of another kind alone."""
        if "kind" in named and any(size.kind == named["kind"] for size in SIZES):
            return bool(named["kind"] == self.kind)
        others = {key for size in SIZES for key in size.network(16)} - set(self.network(16))
        return others.isdisjoint(named)


@dataclass(frozen=True, kw_only=True)
class UNet(Size):
    """A U-Net by its base width and residual blocks a level; `wide` levels are those of the folder presets."""

    kind = "adm"

    channels: int
    blocks: int
    head_channels: int
    wide: bool = False

    @property
    def drops(self) -> bool:
        """Whether it is large enough to need dropout."""
        return self.channels >= 32

    def network(self, resolution: int) -> dict[str, Any]:
        """Return the [network] table for pictures of this side."""
        return {
            "kind": self.kind,
            "channels": self.channels,
            "channel_mult": list(self._mult(resolution)),
            "num_blocks": self.blocks,
            "attention": [16, 8] if self.wide else [4 if resolution <= 16 else 8],
            "head_channels": self.head_channels,
            "group_channels": 8,
        }

    def _mult(self, resolution: int) -> tuple[int, ...]:
        return (WIDE if self.wide else LEVELS)[resolution]

    def _levels(self, resolution: int) -> list[tuple[int, int]]:
        """Return (pixels, width) of each level."""
        mult = enumerate(self._mult(resolution))
        return [((resolution >> level) ** 2, self.channels * factor) for level, factor in mult]

    @property
    def _inner(self) -> int:
        """Convolutions of a level; the decoder has one block more, on twice the channels."""
        return 2 * self.blocks + 3 * (self.blocks + 1)

    def work(self, resolution: int) -> float:
        """Return the multiplications of its 3 x 3 convolutions."""
        return float(sum(9 * self._inner * pixels * width**2 for pixels, width in self._levels(resolution)))

    def memory(self, resolution: int) -> tuple[float, float]:
        """Return bytes of weights with optimizer and averages, and of activations for each picture."""
        weights = sum(9 * self._inner * width**2 for _, width in self._levels(resolution))
        kept = sum(KEPT * (2 * self.blocks + 1) * pixels * width for pixels, width in self._levels(resolution))
        return 4.0 * 7 * BESIDES * weights, 4.0 * kept

    def described(self) -> str:
        """Return what kind of network it is, in a few words."""
        return f"a {self.name} network ({self.channels} channels)"


@dataclass(frozen=True, kw_only=True)
class Transformer(Size):
    """A transformer by its width, blocks, heads, and how many patches make a side.

    Heads of 32 values: those of 24 take twice the time on a CPU.
    """

    kind = "dit"

    width: int
    depth: int
    heads: int
    patches: int

    @property
    def drops(self) -> bool:
        """Whether it is large enough to need dropout."""
        return True

    def network(self, resolution: int) -> dict[str, Any]:
        """Return the [network] table for pictures of this side."""
        shape = {"width": self.width, "depth": self.depth, "heads": self.heads}
        return {"kind": self.kind, **shape, "patch": max(1, resolution // self.patches), **PARTS}

    def _tokens(self, resolution: int) -> int:
        return min(self.patches, resolution) ** 2

    def work(self, resolution: int) -> float:
        """Return the multiplications of the blocks' matrices and of attention."""
        tokens = self._tokens(resolution)
        return float(self.depth * (tokens * 12 * self.width**2 + 2 * tokens**2 * self.width + 6 * self.width**2))

    def memory(self, resolution: int) -> tuple[float, float]:
        """Return bytes of weights with optimizer and averages, and of activations for each picture."""
        weights = 18 * self.depth * self.width**2 + 3 * self.width**2 + 256 * self.width
        tokens = self._tokens(resolution)
        kept = self.depth * tokens * (TOKEN * self.width + 2 * self.heads * tokens)
        return 4.0 * 7 * weights, 4.0 * kept

    def described(self) -> str:
        """Return what kind of network it is, in a few words."""
        return f"a transformer ({self.depth} blocks, {self.width} wide)"


# From the weakest to the strongest at their resolutions. "small" at 16 px is the network of preset shapes, "dit" that
# of preset avatars with kind = "dit"; "large" is that of the presets for folders.
SIZES: tuple[Size, ...] = (
    UNet(
        name="tiny",
        channels=16,
        blocks=1,
        head_channels=16,
        lr=2e-3,
        teacher_lr=4e-3,
        batch=32,
        need=0.7,
        sides=OF_UNETS,
    ),
    UNet(
        name="small",
        channels=32,
        blocks=1,
        head_channels=32,
        lr=2e-3,
        teacher_lr=4e-3,
        batch=32,
        need=1.0,
        sides=OF_UNETS,
    ),
    UNet(
        name="medium",
        channels=64,
        blocks=1,
        head_channels=32,
        lr=1e-3,
        teacher_lr=2e-3,
        batch=32,
        need=2.0,
        sides=OF_UNETS,
    ),
    UNet(
        name="large",
        channels=96,
        blocks=2,
        head_channels=32,
        lr=5e-4,
        teacher_lr=1e-3,
        batch=64,
        need=10.0,
        sides=OF_UNETS,
        wide=True,
    ),
    Transformer(
        name="dit-small",
        width=96,
        depth=4,
        heads=3,
        patches=8,
        lr=3e-3,
        teacher_lr=4e-3,
        batch=32,
        need=1.0,
        sides=(16, 32),
    ),
    Transformer(
        name="dit", width=128, depth=6, heads=4, patches=8, lr=3e-3, teacher_lr=4e-3, batch=32, need=2.5, sides=(16, 32)
    ),
    # Not measured: for days of two cores, or for a GPU.
    Transformer(
        name="dit-large",
        width=256,
        depth=8,
        heads=4,
        patches=16,
        lr=1e-3,
        teacher_lr=2e-3,
        batch=64,
        need=10.0,
        sides=(32,),
    ),
)
LEVELS = {8: (1, 2), 16: (1, 2, 2), 32: (1, 2, 2, 2), 64: (1, 1, 2, 2), 128: (1, 1, 2, 2, 2), 256: (1, 1, 1, 2, 2, 2)}
WIDE = LEVELS | {32: (1, 2, 3), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 3, 4)}
# Training images that the first stage of a "small" network needs before its pictures are good for their size.
NEED = {8: 40_000, 16: 60_000, 32: 120_000, 64: 240_000, 128: 480_000, 256: 960_000}
# What images seen over images needed leads to: at least this ratio, in a word, in a sentence.
EXPECT = (
    (3.0, "best", "as good as a network of this size gets"),
    (1.0, "good", "good for their size where pictures are alike (faces), rough where they vary (photos)"),
    (0.4, "fair", "recognizable and grainy where pictures are alike (faces), traces where they vary (photos)"),
    (0.12, "rough", "rough shapes in the right colors"),
    (0.0, "noise", "colored noise with traces of shapes"),
)


# In equal time far ahead of RAdam, for transformers and for U-Nets (docs/recipes.md).
OPTIMIZER = "muon"


@dataclass(frozen=True)
class Stage:
    """One training of a plan: its recipe, share of the time, and what it costs a step (in steps of `edm`).

    `folder` is where below the run folder it goes; the last stage has the run folder itself. What a stage starts from
    follows from what its recipe needs: the newest teacher and the newest consistency model of the stages before. `row`
    is the recipe's table in the preset, `lr` its rate in units of the network's, `memory` that of its weights and of
    its activations in units of `edm`'s.
    """

    recipe: str
    family: Literal["edm", "ct", "cd"]
    share: float
    cost: float
    folder: str
    row: dict[str, Any]
    lr: float = 1.0
    memory: tuple[float, float] = (1.0, 1.0)


# Measured on 16 px faces, two cores, equal total minutes, FD in ImageNet features in one / two steps: a teacher and its
# student 264 / 160, from scratch 331 / 260. Shares of .47 to .74 for the teacher differ little (docs/recipes.md).
TEACHER = Stage("edm", "edm", 0.5, 1.0, "teacher", {"optimizer": OPTIMIZER})
STUDENT = Stage("icd", "cd", 0.5, 1.8, "student", {"distance": {"details": [4.0, 2.0]}})
SCRATCH = Stage("ict-pm", "ct", 1.0, 1.5, "student", {})
# It trains a third network, three steps in each of its own, and asks the teacher: 7.4 steps of `edm` at 16 px.
_SCORE = {"kind": "dmd", "reach": [0.02, 0.98], "fake_steps": 3, "keep": 5.0}
POLISH = Stage(
    "polish", "cd", 0.3, 7.4, "polish", {"optimizer": OPTIMIZER, "score": _SCORE}, lr=1 / 3, memory=(1.5, 3.0)
)
# Shares of the time where a polish is asked for. Steps after the first pay for it (docs/recipes.md), so that no plan
# has one by itself.
POLISHED = tuple(replace(stage, share=share) for stage, share in ((TEACHER, 0.4), (STUDENT, 0.3), (POLISH, 0.3)))
# The stages of each command.
WAYS: dict[str, tuple[Stage, ...]] = {"edm": (TEACHER,), "ct": (TEACHER, STUDENT), "cd": (TEACHER, STUDENT)}
# Cost of a step of methods that have no row above.
COSTS = {"edm": 1.0, "ct": 1.5, "cd": 2.2}
# Levels for a few steps: fine grain on flat grounds is most of what one step leaves, and low levels remove it.
SAMPLING_TIMES = {"2": [80.0, 0.4], "3": [80.0, 0.8, 0.1], "4": [80.0, 2.0, 0.4, 0.1]}
# The end of a doubling curriculum, by the steps of its stage.
INTERVALS = ((0, 80), (4_000, 160), (20_000, 320), (80_000, 640), (250_000, 1280))
# Dropout by how often a picture is seen; small networks of little training do not need it.
DROPOUT = ((0, 0.0), (300, 0.1), (1500, 0.2))
# Probability of augmentation by the number of pictures (below it). It has no place in a plan until
# benchmarks/little_data.py has shown what it buys.
AUGMENT = ((1_000, 0.15), (5_000, 0.12), (20_000, 0.06))
# Where a choice stands in the preset, by dotted key; None: nothing takes it yet.
PLACES: dict[str, str | None] = {"dropout": "network.dropout", "augment": None}
# What every plan sets besides, by dotted key.
ALSO: dict[str, Any] = {"eval.count": 2000}

# Fewer pictures lead to copies; a class of fewer is no class to learn.
FEW_PICTURES, FEW_OF_A_CLASS = 50, 10
MANY_DUPLICATES = 0.1
# Steps below which a stage is no training, and seconds for starting, looking and measuring.
LEAST_STEPS, STARTING = 10, 6.0
# Share of a stage's time that goes into its steps: grids, checkpoints and the first steps take the rest.
STEPPING = 0.93
# Shares of the whole time, and seconds at most, that are kept free at the end of the last stage for the search for
# sampling times and for judging the model.
SEARCHING, JUDGING, CLOSING = 0.08, 0.08, 75.0
# What the small network takes of these shares, which are those of larger ones.
QUICK = 0.25
# Numbers that a residual block keeps for the backward pass, for each of its outputs.
KEPT = 14
# All weights over those of the 3 x 3 convolutions: middle, attention, embedding.
BESIDES = 1.9
# Parts of a transformer that are not those of DiT: the exact GELU, since a CPU takes several times as long for DiT's
# approximation, and a gate that keeps the noise of the input out of the answer.
PARTS = {"mlp": "gelu_erf", "input_gate": True}
# Numbers that a transformer's block keeps of a token, in units of its width.
TOKEN = 20
# Share of the free memory that a pass may take.
MEMORY_SHARE = 0.5


def by_least(table: tuple[tuple[float, Any], ...], value: float) -> Any:
    """Return the entry of the last row whose bound `value` reaches; rows ascend."""
    return [entry for bound, entry in table if value >= bound][-1]


def augmentation(count: int) -> float:
    """Return the probability of augmentation for so many pictures."""
    return next((chance for below, chance in AUGMENT if count < below), 0.0)


def expectation(ratio: float) -> tuple[str, str]:
    """Return word and sentence on what to expect of images seen over images needed."""
    return next((word, sentence) for least, word, sentence in EXPECT if ratio >= least)


def size_named(name: str) -> Size:
    """Return the network of this name."""
    return next(size for size in SIZES if size.name == name)
