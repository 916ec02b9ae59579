"""The `[network]` table: one for each kind of raw network F(x, c_noise, label, r), told apart by `kind`.

A new network is a file in `cmtool/networks/` and its table here, with its place in `Network`. Needs no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cmtool.config.parts import Table
from cmtool.errors import ConfigError, nearest

Embedding = Literal["positional", "fourier"]
GROUPS = "fewest channels of a normalization group (1: OpenAI, 4: EDM); 32 groups at most"
SCALE_SHIFT = "time embedding scales and shifts (FiLM) instead of being added"


class NetworkConfig(Table):
    """What every network has.

    `builds` is the "module:class" below `cmtool.networks`. `halves` says what bfloat16 may round in it while the
    forward passes stay in float32: the gradients of its convolutions, or nothing. Below `halves_from` channels,
    or on images below `halves_side` pixels, it computes no faster in bfloat16. `augments` says that it can be told how
    an image was augmented.
    """

    # The order in which files and lists name the settings.
    ORDER: ClassVar[tuple[str, ...]] = (
        "kind",
        "channels",
        "channel_mult",
        "num_blocks",
        "attention",
        "head_channels",
        "group_channels",
        "dropout",
        "scale_shift",
        "embedding",
        "fourier_scale",
        "encoder",
        "resample_filter",
        "two_time",
        "log_variance",
        "attention_kernel",
        "checkpointing",
    )
    builds: ClassVar[str]
    halves: ClassVar[Literal["convolutions", "none"]] = "none"
    halves_from: ClassVar[int] = 64
    halves_side: ClassVar[int] = 32
    augments: ClassVar[bool] = False

    kind: str
    channels: int = Field(32, ge=4, description="base width of a U-Net, hidden width of an MLP")
    num_blocks: int | tuple[int, ...] = Field(1, description="residual blocks per level (U-Net), hidden blocks (MLP)")
    dropout: float | tuple[float, ...] = 0.0
    two_time: bool = Field(False, description="takes a second time input r")
    guided: bool = Field(False, description="two_time: is told the scale and the interval of guidance beside r")
    log_variance: bool = Field(False, description="has a learned log-variance head w(t)")
    augment_labels: int = Field(0, ge=0, description="numbers that tell how an image was augmented (recipe.augment)")
    attention_kernel: Literal["auto", "math"] = Field("auto", description="math works under forward-mode derivatives")
    checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")

    def __new__(cls, **values: Any) -> Any:
        """Make the table of the kind that `values` name: `NetworkConfig(kind="song", channels=16)`."""
        return network_config(**values) if cls is NetworkConfig else super().__new__(cls)

    @model_validator(mode="before")
    @classmethod
    def _own(cls, values: Any) -> Any:
        """Leave out what only other kinds have.

        A preset's table stays usable when `--set network.kind=...` asks for another kind, and so do headers of models
        from the time when all kinds had one table. What a preset has for another kind alone stands in a table inside,
        named by that kind: `[network.dit]`.
        """
        if not isinstance(values, dict):
            return values
        foreign = {name for other in NETWORKS.values() for name in other.model_fields} - set(cls.model_fields)
        kind = cls.model_fields["kind"].default
        tables = {key: value for key, value in values.items() if key in NETWORKS and isinstance(value, dict)}
        values = {key: value for key, value in values.items() if key not in tables}
        own = {"kind": kind} | {key: value for key, value in values.items() if key not in foreign}
        return cls.sized(tables.get(kind, {}) | own, values)

    @property
    def forward_mode(self) -> bool:
        """Whether it can be differentiated in forward mode."""
        return True

    def check(self, side: int) -> None:
        """Refuse settings that do not fit each other or images of this side in pixels.

        Raises:
            ValueError: one sentence that names the settings.
        """

    @classmethod
    def sized(cls, own: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """Return this kind's settings `own`, completed from `values`, which may have been written for another kind."""
        return own

    @model_serializer(mode="wrap")
    def _in_order(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        own = handler(self)
        if type(self) not in _FIRST:
            return own
        # Files of the first four kinds name every setting of all four, as they did when these had one table.
        rest = {
            key: list(value) if isinstance(value, tuple) and info.mode == "json" else value
            for key, value in _REST.items()
        }
        told = {"augment_labels": self.augment_labels} if self.augment_labels else {}
        told |= {"guided": True} if self.guided else {}
        return {key: own.get(key, rest[key]) for key in self.ORDER} | told


class UNetConfig(NetworkConfig):
    """What every U-Net has."""

    channel_mult: tuple[int, ...] = Field((1, 2), min_length=1)
    attention: tuple[int, ...] = Field((), description="resolutions in pixels that have attention")
    head_channels: int = Field(32, ge=1)

    @property
    def forward_mode(self) -> bool:
        """Whether it can be differentiated in forward mode: fused attention cannot."""
        return self.attention_kernel == "math"

    def check(self, side: int) -> None:
        """Refuse lists without exactly one value a level, and sides and widths that do not divide.

        Raises:
            ValueError: one sentence that names the settings.
        """
        levels = len(self.channel_mult)
        for name, value in (("num_blocks", self.num_blocks), ("dropout", self.dropout)):
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"network.{name} has {len(value)} values and network.channel_mult {levels}: one a level"
                )
        if side % 2 ** (levels - 1):
            raise ValueError(
                f"network.channel_mult has {levels} levels, each half the side of the one before: data.resolution = "
                f"{side} must be a multiple of {2 ** (levels - 1)}"
            )
        for level, mult in enumerate(self.channel_mult):
            channels, attends = self.channels * mult, side // 2**level in self.attention or level == levels - 1
            if attends and channels // self.head_channels > 1 and channels % self.head_channels:
                raise ValueError(
                    f"network.head_channels = {self.head_channels} does not divide the {channels} channels of an "
                    "attention layer"
                )


class AdmConfig(UNetConfig):
    """The U-Net of OpenAI's ADM (Dhariwal & Nichol 2021)."""

    builds = "adm:AdmUNet"
    augments = True
    halves = "convolutions"

    kind: Literal["adm"] = "adm"
    group_channels: int = Field(1, ge=1, description=GROUPS)
    scale_shift: bool = Field(True, description=SCALE_SHIFT)
    embedding: Embedding = "positional"
    fourier_scale: float = Field(16.0, gt=0)


class MlpConfig(NetworkConfig):
    """A residual MLP, for points in the plane."""

    builds = "mlp:Mlp"
    augments = True

    kind: Literal["mlp"] = "mlp"
    scale_shift: bool = Field(True, description=SCALE_SHIFT)
    embedding: Embedding = "positional"
    fourier_scale: float = Field(16.0, gt=0)

    def check(self, side: int) -> None:
        """Refuse lists of one value a level.

        Raises:
            ValueError: one sentence that names the settings.
        """
        if isinstance(self.num_blocks, tuple) or isinstance(self.dropout, tuple):
            raise ValueError("an mlp has no levels: network.num_blocks and network.dropout are one number each")


class SongConfig(UNetConfig):
    """DDPM++ and NCSN++ (Song et al. 2021) in the form of EDM."""

    builds = "song:SongUNet"
    augments = True
    halves = "convolutions"

    kind: Literal["song"] = "song"
    group_channels: int = Field(1, ge=1, description=GROUPS)
    scale_shift: bool = Field(True, description=SCALE_SHIFT)
    embedding: Embedding = "positional"
    fourier_scale: float = Field(16.0, gt=0)
    encoder: Literal["standard", "residual"] = Field("standard", description="NCSN++ input pyramid (song)")
    resample_filter: tuple[int, ...] = Field((1, 1), description="FIR filter of a song network")

    def check(self, side: int) -> None:
        """Refuse what no U-Net can have, and a filter with an odd number of taps.

        Raises:
            ValueError: one sentence that names the settings.
        """
        super().check(side)
        if len(self.resample_filter) % 2:
            raise ValueError(f"network.resample_filter needs an even number of taps, not {len(self.resample_filter)}")


class Edm2Config(UNetConfig):
    """EDM2's magnitude-preserving U-Net (Karras et al. 2024)."""

    builds = "edm2:Edm2UNet"
    augments = True

    kind: Literal["edm2"] = "edm2"


class DitConfig(NetworkConfig):
    """A transformer over patches, conditioned by adaLN-Zero (Peebles & Xie 2023), with classic or newer parts.

    In place of a U-Net of some preset it is as wide as that network's widest level, with as many blocks, unless the
    preset says more in `[network.dit]`.
    """

    builds = "dit:Dit"
    halves = "convolutions"  # its linear layers are convolutions of one token
    halves_from = 96
    halves_side = 8
    augments = True

    kind: Literal["dit"] = "dit"
    channels: int = Field(384, ge=4, exclude=True)
    num_blocks: int = Field(12, exclude=True)
    patch: int | None = Field(None, ge=1, description="side of a patch in pixels; None: 2 or more, at most 16 a side")
    width: int = Field(384, ge=4, description="values of a token")
    depth: int = Field(12, ge=1, description="transformer blocks")
    heads: int = Field(6, ge=1, description="attention heads of a block")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the feed-forward layers as a multiple of width")
    norm: Literal["layer", "rms"] = Field("layer", description="normalization before a branch, without weights")
    mlp: Literal["gelu", "gelu_erf", "swiglu"] = Field(
        "gelu", description="feed-forward layers; gelu: DiT's, by tanh; gelu_erf: exact; swiglu: two thirds as wide"
    )
    positions: Literal["sincos", "rotary"] = Field("sincos", description="added to tokens, or turning queries and keys")
    qk_norm: bool = Field(False, description="RMS normalization of queries and keys")
    input_gate: bool = Field(False, description="scale and shift tokens by the noise level before the first block")

    @property
    def forward_mode(self) -> bool:
        """Whether it can be differentiated in forward mode: fused attention cannot."""
        return self.attention_kernel == "math"

    @classmethod
    def sized(cls, own: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """Take width, depth and heads from the table of a U-Net or an MLP where they are not said."""
        made = {"width": 384, "depth": 12} | _sizes_of(values) | own
        if "heads" not in own and _is_count(made["width"]):
            head: Any = values.get("head_channels")
            made["heads"] = _fitting_heads(made["width"], min(head, 64) if _is_count(head) else 64)
        if isinstance(made.get("dropout"), list | tuple):
            made["dropout"] = max(made["dropout"], default=0.0)
        both = {"channels": made["width"], "num_blocks": made["depth"]}
        rest = {key: value for key, value in made.items() if key not in both}
        return rest | {key: value for key, value in both.items() if _is_count(value)}

    def patch_for(self, side: int) -> int:
        """Return the side of a patch: as set, else the smallest from 2 on that leaves at most 16 on a side."""
        if self.patch is not None:
            return self.patch
        return next((p for p in range(2, side + 1) if side % p == 0 and side // p <= 16), 1)

    def check(self, side: int) -> None:
        """Refuse a patch that does not divide the side, and heads or positions that do not fit the width.

        Raises:
            ValueError: one sentence that names the settings.
        """
        patch = self.patch_for(side)
        if side % patch:
            raise ValueError(
                f"network.patch = {patch} does not divide data.resolution = {side}: choose "
                f"{', '.join(str(p) for p in range(1, min(side, 64) + 1) if side % p == 0)}"
            )
        if self.width % self.heads:
            raise ValueError(f"network.heads = {self.heads} does not divide network.width = {self.width}")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"network.positions = 'sincos' needs a network.width divisible by 4, not {self.width}")
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"network.positions = 'rotary' needs heads of a width divisible by 4, not {self.width // self.heads} "
                f"(network.width = {self.width} in network.heads = {self.heads})"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _sizes_of(values: dict[str, Any]) -> dict[str, int]:
    """Return width and depth of a transformer in place of the U-Net or MLP that `values` describe."""
    channels: Any = values.get("channels")
    mult, blocks = values.get("channel_mult") or (1,), values.get("num_blocks")
    counts: list[Any] = list(blocks) if isinstance(blocks, list | tuple) else [blocks] * len(mult)
    if not mult or not all(map(_is_count, (channels, *mult, *counts))):
        return {}
    # A decoder has one block more a level than its encoder, and two lie between them.
    depth = 2 * sum(counts) + len(mult) + 2 if values.get("channel_mult") else sum(counts)
    return {"width": channels * max(mult), "depth": depth}


def _fitting_heads(width: int, head_width: int) -> int:
    """Return the most heads of at least `head_width` values that divide the width into multiples of four (or one)."""
    most = max(1, width // head_width)
    return next((heads for heads in range(most, 1, -1) if width % (4 * heads) == 0), 1)


AnyNetwork = AdmConfig | MlpConfig | SongConfig | Edm2Config | DitConfig  # every kind has its place here
NETWORKS: dict[str, type[NetworkConfig]] = {table.model_fields["kind"].default: table for table in get_args(AnyNetwork)}
_FIRST = (AdmConfig, MlpConfig, SongConfig, Edm2Config)
_REST = {name: field.default for name, field in SongConfig.model_fields.items()}


def _named(values: Any) -> Any:
    """Name the kind: "adm" unless said."""
    return {"kind": "adm"} | values if isinstance(values, dict) else values


# The table of a run's network.
Network = Annotated[AnyNetwork, Field(discriminator="kind"), BeforeValidator(_named)]


def kinds_with(setting: str, kind: str) -> list[str]:
    """Return the kinds of network that a setting is for, if one of `kind` knows nothing of it; else none.

    The settings of the first four kinds may stand for each of them, and for the size of others.
    """
    if setting in NETWORKS[kind].model_fields or setting in NetworkConfig.ORDER:
        return []
    return [name for name, table in NETWORKS.items() if setting in table.model_fields]


def network_config(**values: Any) -> Any:
    """Return the table of the kind that `values` name.

    Raises:
        ConfigError: for an unknown kind.
        ValidationError: for unknown settings, or values out of bounds.
    """
    kind = values.get("kind", "adm")
    if not isinstance(kind, str) or kind not in NETWORKS:
        close = nearest(str(kind), NETWORKS)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"network.kind = {kind!r} is unknown; choose {', '.join(NETWORKS)}.{hint}")
    return NETWORKS[kind].model_validate(values)
