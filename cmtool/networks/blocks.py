"""What the networks share: normalization, attention, embeddings of the noise level, and the checks of their inputs."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmtool.errors import ConfigError, UserError
from cmtool.networks.normalization import HALF, wide

Number = TypeVar("Number", int, float)
EXPLICIT_TOKENS, SAVED_TOKENS = 1024, 256


def per_level(value: Number | Sequence[Number], levels: int, name: str) -> tuple[Number, ...]:
    """Return one value for each of `levels` resolutions from a number or a sequence of that length.

    Raises `ConfigError` when a sequence has another length; `name` is the setting's name for that message.
    """
    if isinstance(value, int | float):
        return (value,) * levels
    if len(value) != levels:
        raise ConfigError(
            f"network.{name} has {len(value)} values and channel_mult has {levels}; give one number or {levels}."
        )
    return tuple(value)


def linear_wide(layer: Any, x: Tensor) -> Tensor:
    """Apply the `nn.Linear` of an embedding to x (B, C), in float32 if its weights are in half precision."""
    weight = wide(layer.weight)
    return F.linear(x.to(weight.dtype), weight, wide(layer.bias))


def zeroed(module: nn.Module) -> nn.Module:
    """Set a module's weights to zero, so that the branch it ends contributes nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, S, d), written out: works under every derivative."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "auto") -> Tensor:
    """Attention of (B, heads, S, d) tensors: torch's fused kernel, or the explicit one for `kernel="math"`.

    The fused kernels have no forward-mode derivative, so inside `torch.func.jvp` "auto" falls back to the explicit
    form. It also does so for small images in half precision on a CPU, where the fused kernel takes up to 1.7 times as
    long, and 2 to 7 times in the backward pass; the scores are then rounded to half precision. With gradients, only
    images of up to `SAVED_TOKENS` pixels count as small, because the weights of all pairs of pixels are kept.
    """
    halves = q.dtype in HALF and q.device.type == "cpu"
    most = SAVED_TOKENS if torch.is_grad_enabled() else EXPLICIT_TOKENS
    if kernel == "auto" and not (halves and q.shape[-2] <= most):
        try:
            return F.scaled_dot_product_attention(q, k, v)
        except NotImplementedError:
            return explicit_attention(q, k, v)
    return explicit_attention(q, k, v)


def heads_of(qkv: Tensor, heads: int, interleaved: bool = False) -> tuple[Tensor, ...]:
    """Split (B, 3C, H, W) into q, k and v, each (B, heads, H W, C / heads).

    Channels are ordered (q|k|v, head, channel), as in ADM's files, or `interleaved` (head, channel, q|k|v), as in
    EDM's. Images stored channels last are split without a copy, and their gradients are joined without one.
    """
    rows = qkv.permute(0, 2, 3, 1).flatten(1, 2)
    if not interleaved:
        return tuple(part.transpose(1, 2) for part in rows.unflatten(2, (3, heads, -1)).unbind(2))
    parts = rows.unflatten(2, (heads, -1, 3)).permute(4, 0, 2, 1, 3)
    # The CPU's fused kernel needs the channels of a head side by side; otherwise attention takes 1.4 to 2.3 times as
    # long.
    return (parts.contiguous() if qkv.device.type == "cpu" else parts).unbind(0)


def joined(branch: Tensor, x: Tensor) -> Tensor:
    """The sum of a branch that nothing else reads and its input, in place when no gradients are recorded."""
    if torch.is_grad_enabled() or branch.dtype != x.dtype:
        return x + branch
    return branch.add_(x)


def set_attention_kernel(network: nn.Module, kernel: str) -> None:
    """Switch every attention layer of a built network to "auto" (fused) or "math" (explicit)."""
    if kernel not in ("auto", "math"):
        raise ValueError(f"unknown attention kernel '{kernel}'; choose auto or math")
    for module in network.modules():
        if hasattr(module, "attention_kernel"):
            setattr(module, "attention_kernel", kernel)  # noqa: B010 (a module's attribute to the type checker is a tensor)


def number_of_heads(channels: int, head_channels: int) -> int:
    """Return channels / head_channels, or 1 for narrow layers; raises `ConfigError` when they do not divide."""
    heads = max(1, channels // head_channels)
    if heads > 1 and channels % head_channels:
        raise ConfigError(
            f"network.head_channels = {head_channels} does not divide the {channels} channels of an attention layer."
        )
    return heads


def positional_features(c: Tensor, size: int, endpoint: bool = False) -> Tensor:
    """Return [cos, sin] of c times geometric frequencies 1 .. 1/10000: (B,) -> (B, size) (Ho et al. 2020).

    `endpoint`: the last frequency is exactly 1/10000 (DDPM++), otherwise one ratio above it (ADM). Computed in at least
    float32, because half precision cannot hold the phase of c = 250 ln t.
    """
    c, half = wide(c), size // 2
    steps = torch.arange(half, device=c.device, dtype=c.dtype)
    phase = c[:, None] * torch.exp(steps * (-math.log(10000.0) / (half - endpoint)))
    features = torch.cat([phase.cos(), phase.sin()], dim=1)
    return F.pad(features, (0, 1)) if size % 2 else features


class WideBuffers(nn.Module):
    """A module whose buffers stay in float32 when the network is converted to half precision.

    A frequency rounded to bfloat16 is off by up to one part in 256, and so is every phase computed from it: a noise
    level would get the features of another.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype in HALF and buffer.dtype not in HALF:
                self._buffers[name] = buffer.to(after.device, torch.float32)
        return self


class FourierFeatures(WideBuffers):
    """[cos, sin] of 2 pi f c with frozen random frequencies f ~ N(0, scale^2) (Tancik et al. 2020; NCSN++)."""

    freqs: Tensor

    def __init__(self, size: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(size // 2) * scale)

    def forward(self, c: Tensor) -> Tensor:
        """Return (B, size) features of c (B,), in at least float32."""
        c = wide(c)
        phase = c[:, None] * (2 * math.pi * self.freqs.to(c.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class LogVariance(nn.Linear):
    """A learned log-variance w(c_noise): a linear map of positional features, zero at the start."""

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__(self.FEATURES, 1)
        zeroed(self)

    def forward(self, c: Tensor) -> Tensor:
        """Return (B,) for c (B,)."""
        return linear_wide(self, positional_features(c, self.FEATURES)).squeeze(1).to(c.dtype)


def add_label(embedding: Tensor, table: Tensor, label: Tensor | None) -> Tensor:
    """Add rows of `table` (classes, E) to `embedding` (B, E); label (B,), where -1 (or None) adds nothing."""
    if label is None:
        return embedding
    try:
        rows = F.embedding(label.clamp_min(0), table)
    except IndexError:
        raise UserError(f"label {int(label.max())} is outside 0..{len(table) - 1}; -1 is the null class.") from None
    return embedding + wide(rows) * (label >= 0).unsqueeze(1)


class RawNetwork(nn.Module, ABC):
    """What all raw networks F(x, c_noise, label, r) have in common.

    Attributes: `channels` (of an image), `resolution` (nominal side), `num_classes` (None: no labels), `two_time`,
    `downsampling` (sides must be multiples of it), `checkpointing` (recompute blocks in the backward pass).
    """

    def __init__(
        self, channels: int, resolution: int, num_classes: int | None, two_time: bool, checkpointing: bool
    ) -> None:
        super().__init__()
        self.channels, self.resolution, self.num_classes = channels, resolution, num_classes
        self.two_time, self.checkpointing = two_time, checkpointing
        self.downsampling = 1
        self.log_variance_head: nn.Module | None = None
        self.map_guidance: nn.Linear | None = None
        self.map_augment: nn.Module | None = None
        self.augment_labels = 0

    def hear_augment(self, labels: int, width: int) -> None:
        """Add the linear map of `labels` numbers to embeddings of `width`; called last, so that no other weight moves.

        It starts at zero: a network that hears of augmentation for the first time means the same as before.
        """
        if labels:
            self.augment_labels, self.map_augment = labels, zeroed(nn.Linear(labels, width, bias=False))

    def told(self, features: Tensor, augment: Tensor | None) -> Tensor:
        """Return features (B, E) of the noise level plus the map of the labels (B, L); None is "nothing was done"."""
        if augment is None or self.map_augment is None:
            return features
        weight = wide(self.map_augment.weight)  # type: ignore[arg-type]
        return features + F.linear(augment.to(weight.dtype), weight)

    @property
    def guided(self) -> bool:
        """Whether r carries three more numbers: ln of the guidance scale, first and last time that is guided."""
        return self.map_guidance is not None

    def hear_guidance(self, guided: bool, width: int) -> None:
        """Add, if `guided`, the linear map of the three numbers to features of `width`; called last.

        What becomes of the features of r starts at zero, so that a network means the same as before.
        """
        if guided:
            self.map_guidance = nn.Linear(3, width)

    def aimed(self, r: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the features (B, E) of r (B,), or of r (B, 4) with the three numbers of its guidance."""
        if r.ndim == 1:
            return features(r)
        return features(r[:, 0]) + linear_wide(self.map_guidance, r[:, 1:])

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which the network computes."""
        return next(self.parameters()).dtype

    def log_variance(self, c_noise: Tensor) -> Tensor:
        """Return w(c_noise) (B,) of the log-variance head; raises `ConfigError` for a network without one."""
        if self.log_variance_head is None:
            raise ConfigError("this network has no log-variance head; set network.log_variance = true.")
        return self.log_variance_head(c_noise)

    def check_inputs(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None, r: Tensor | None, augment: Tensor | None = None
    ) -> None:
        """Raise `UserError` for shapes that this network cannot take, or a label or r it cannot use or misses."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise UserError(f"the network takes images of shape (B, {self.channels}, H, W), not {tuple(x.shape)}.")
        if x.shape[2] % self.downsampling or x.shape[3] % self.downsampling:
            sides = f"{x.shape[2]}x{x.shape[3]}"
            raise UserError(f"image sides must be multiples of {self.downsampling} for this network, not {sides}.")
        if c_noise.shape != x.shape[:1]:
            raise UserError(f"one noise level an image is needed: shape ({len(x)},), not {tuple(c_noise.shape)}.")
        if label is not None and self.num_classes is None:
            raise UserError("this network knows no labels; leave the label out.")
        if label is not None and label.shape != x.shape[:1]:
            raise UserError(f"one label an image is needed: shape ({len(x)},), not {tuple(label.shape)}.")
        if (r is not None) != self.two_time:
            raise UserError(
                "this network needs a second time r." if self.two_time else "this network takes no second time r."
            )
        if augment is not None and augment.shape != (len(x), self.augment_labels):
            raise UserError(
                f"this network takes {self.augment_labels or 'no'} augmentation labels, not {tuple(augment.shape)}."
            )
        if r is not None and r.shape[1:] != ((4,) if self.guided else ()):
            raise UserError(f"r is {'(B, 4) for a ' if self.guided else '(B,) for an un'}guided network.")

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        label: Tensor | None = None,
        r: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return F (B, C, H, W) in the dtype of x.

        Args:
            x: (B, C, H, W).
            c_noise: (B,).
            label: (B,) with -1 (or no label at all) for the null class.
            r: the second conditioning value of a two-time network, (B,), or (B, 4) of a guided one.
            augment: (B, L), what was done to the images; None: nothing.

        Raises:
            UserError: for inputs that do not fit.
        """
        self.check_inputs(x, c_noise, label, r, augment)
        with exact(x):
            emb = self.embed(c_noise, label, r, augment)
        return self.compute(x.to(self.dtype), emb).to(x.dtype)

    @abstractmethod
    def embed(self, c_noise: Tensor, label: Tensor | None, r: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the embedding (B, E) of what a network is told, in the dtype of the weights; without autocast."""

    @abstractmethod
    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C, H, W) to F in the same shape; `emb` (B, E)."""

    def run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call a block, recomputing it in the backward pass when `checkpointing` is on."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def exact(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off for a block of code if it is on for the device of x.

    This is how embeddings of the noise level and the first and last convolution are computed. Training compares two
    outputs by their small difference, which half precision would round away, and together these layers cost little.
    Embeddings stay in float32 even where the weights are in half precision (`linear_wide`).
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
