"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, section 2 and Appendix B, configuration G).

Every layer keeps the magnitude of its input: weights are normalized where they are used (Eq. 47), sums and
concatenations are weighted (Eqs. 88, 103), and no layer has a bias or a normalization of its own. Parameters have the
names of NVlabs' files. `normalize_weights` is the forced normalization of Eq. 66. It is called after a step of the
optimizer, because within the forward pass it would modify weights that are being differentiated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.config.networks import Edm2Config
from cmtool.errors import UserError
from cmtool.networks.blocks import RawNetwork, WideBuffers, attention, exact, heads_of, number_of_heads, per_level
from cmtool.networks.convolution import convolve_doubled
from cmtool.networks.normalization import wide

EPS = 1e-4
SILU_GAIN = 0.596
RESIDUAL_BALANCE = ATTENTION_BALANCE = 0.3
LABEL_BALANCE = CONCAT_BALANCE = 0.5
LARGEST_ACTIVATION = 256.0
LOGVAR_FEATURES = 128


def normalize(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Return x scaled to unit mean square over `dims` (all but the first by default), computed in at least float32."""
    dims = dims or tuple(range(1, x.ndim))
    whole = wide(x)
    count = math.prod(x.shape[dim] for dim in dims)
    norm = torch.linalg.vector_norm(whole, dim=dims, keepdim=True)
    return (whole / (EPS + norm / math.sqrt(count))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps unit magnitude (Eq. 81)."""
    return F.silu(x) / SILU_GAIN


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b at unit magnitude (Eq. 88), in a's dtype; under autocast b may be in half precision."""
    return torch.lerp(a, b.to(a.dtype), share) / math.hypot(1 - share, share)


def mp_cat(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Channels of a and b side by side, weighted so that each contributes by its share (Eq. 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - share) ** 2 + share**2))
    return torch.cat(
        [a * (scale * (1 - share) / math.sqrt(a.shape[1])), b * (scale * share / math.sqrt(b.shape[1]))], dim=1
    )


class MpFourier(WideBuffers):
    """sqrt(2) cos(f c + phase) with frozen random frequencies and phases (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(size))
        self.register_buffer("phases", 2 * math.pi * torch.rand(size))

    def forward(self, c: Tensor) -> Tensor:
        """Return (B, size) features of c (B,)."""
        c = wide(c)
        return (c[:, None] * self.freqs.to(c.dtype) + self.phases.to(c.dtype)).cos() * math.sqrt(2)


class MpLayer(nn.Module):
    """A linear map or convolution without bias whose weight is normalized at use; `side` 0 is a linear map."""

    def __init__(self, cin: int, cout: int, side: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *([side, side] if side else [])))

    def unit(self) -> Tensor:
        """The weight with every output's row at unit mean square."""
        return normalize(self.weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0, doubled: bool = False) -> Tensor:
        """Map x (B, C_in, ...) to (B, C_out, ...), times `gain`; `doubled`: 3x3, of x enlarged twice."""
        weight = (normalize(wide(self.weight)) * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        if doubled:
            return convolve_doubled(x, weight)
        return x @ weight.t() if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MpBlock(nn.Module):
    """A residual block with optional attention; q, k, v are ordered (head, channel, q|k|v) and normalized per pixel."""

    def __init__(
        self,
        cin: int,
        cout: int,
        emb: int,
        cfg: Edm2Config,
        dropout: float,
        *,
        decodes: bool,
        resample: str = "",
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.decodes, self.resample, self.dropout = decodes, resample, dropout
        self.joins = False
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MpLayer(cin if decodes else cout, cout, 3)
        self.emb_linear = MpLayer(emb, cout)
        self.conv_res1 = MpLayer(cout, cout, 3)
        self.conv_skip = MpLayer(cin, cout, 1) if cin != cout else None
        self.heads = number_of_heads(cout, cfg.head_channels) if attends else 0
        self.attention_kernel = cfg.attention_kernel
        if attends:
            self.attn_qkv, self.attn_proj = MpLayer(cout, 3 * cout, 1), MpLayer(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W'); `emb` (B, E)."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        if not self.decodes:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), (1,))
        y = self.conv_res0(mp_silu(x), doubled=self.resample == "up")
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        if self.decodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, self.conv_res1(y), RESIDUAL_BALANCE)
        if self.heads:
            x = mp_sum(x, self.attn_proj(self._attend(x)), ATTENTION_BALANCE)
        return x.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (normalize(part, (3,)) for part in heads_of(self.attn_qkv(x), self.heads, interleaved=True))
        return attention(q, k, v, self.attention_kernel).transpose(-1, -2).reshape(x.shape)


class MpLogVariance(nn.Module):
    """EDM2's learned log-variance u(sigma): a linear map of Fourier features."""

    def __init__(self) -> None:
        super().__init__()
        self.fourier, self.linear = MpFourier(LOGVAR_FEATURES), MpLayer(LOGVAR_FEATURES, 1)

    def forward(self, c: Tensor) -> Tensor:
        """Return (B,) for c (B,)."""
        weight = self.linear.weight
        features = self.fourier(c).to(torch.promote_types(weight.dtype, torch.float32))
        return self.linear(features).squeeze(1).to(c.dtype)


class Edm2UNet(RawNetwork):
    """F(x, c_noise, label, r) for images of any side that is a multiple of `downsampling`."""

    def __init__(self, cfg: Edm2Config, *, channels: int, resolution: int, num_classes: int | None) -> None:
        super().__init__(channels, resolution, num_classes, cfg.two_time, cfg.checkpointing)
        levels = len(cfg.channel_mult)
        self.downsampling = 2 ** (levels - 1)
        self._widths = [cfg.channels * mult for mult in cfg.channel_mult]
        self._blocks = per_level(cfg.num_blocks, levels, "num_blocks")
        self._dropouts = per_level(cfg.dropout, levels, "dropout")
        emb = max(self._widths)
        self.emb_fourier = MpFourier(self._widths[0])
        self.emb_noise = MpLayer(self._widths[0], emb)
        if num_classes is not None:
            self.emb_label = MpLayer(num_classes, emb)
        if cfg.two_time:
            self.emb_noise_r, self.emb_gain_r = MpLayer(self._widths[0], emb), nn.Parameter(torch.zeros([]))
        self._build(cfg, emb)
        self.out_conv, self.out_gain = MpLayer(self._widths[0], channels, 3), nn.Parameter(torch.zeros([]))
        if cfg.log_variance:
            self.log_variance_head = MpLogVariance()
        if cfg.augment_labels:
            # As with the second time, a gain that starts at zero.
            self.augment_labels, self.map_augment = cfg.augment_labels, MpLayer(cfg.augment_labels, emb)
            self.augment_gain = nn.Parameter(torch.zeros([]))
        self.hear_guidance(cfg.guided, self._widths[0])

    def _build(self, cfg: Edm2Config, emb: int) -> None:
        """Build encoder and decoder; every decoder block named `block` takes a skip connection."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        sides = [self.resolution // 2**level for level in range(len(self._widths))]
        current, skips = self._widths[0], [self._widths[0]]
        self.enc[f"{sides[0]}x{sides[0]}_conv"] = MpLayer(self.channels + 1, current, 3)
        for level, (side, width) in enumerate(zip(sides, self._widths, strict=True)):
            shared: dict[str, Any] = {"emb": emb, "cfg": cfg, "dropout": self._dropouts[level], "decodes": False}
            if level:
                self.enc[f"{side}x{side}_down"] = MpBlock(current, current, resample="down", **shared)
                skips.append(current)
            for index in range(self._blocks[level]):
                self.enc[f"{side}x{side}_block{index}"] = MpBlock(
                    current, width, attends=side in cfg.attention, **shared
                )
                current = width
                skips.append(current)
        for level in reversed(range(len(sides))):
            side, width = sides[level], self._widths[level]
            shared = {"emb": emb, "cfg": cfg, "dropout": self._dropouts[level], "decodes": True}
            if level == len(sides) - 1:
                self.dec[f"{side}x{side}_in0"] = MpBlock(current, current, attends=True, **shared)
                self.dec[f"{side}x{side}_in1"] = MpBlock(current, current, **shared)
            else:
                self.dec[f"{side}x{side}_up"] = MpBlock(current, current, resample="up", **shared)
            for index in range(self._blocks[level] + 1):
                block = MpBlock(current + skips.pop(), width, attends=side in cfg.attention, **shared)
                block.joins, current = True, width
                self.dec[f"{side}x{side}_block{index}"] = block

    @torch.no_grad()
    def normalize_weights(self) -> None:
        """Bring every weight to unit mean square per output (Eq. 66), as training does after each step."""
        for module in self.modules():
            if isinstance(module, MpLayer):
                module.weight.copy_(module.unit())

    def told(self, features: Tensor, augment: Tensor | None) -> Tensor:
        """Return embeddings (B, E) plus the map of the labels (B, L); None is "nothing was done"."""
        if augment is None or self.map_augment is None:
            return features
        return features + self.map_augment(augment.to(features.dtype), wide(self.augment_gain))

    def embed(self, c_noise: Tensor, label: Tensor | None, r: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the embedding (B, E) of noise level, second time, label and augmentation."""
        emb = self.told(self.emb_noise(self._features(c_noise)), augment)
        if r is not None:
            emb = emb + self.emb_noise_r(self.aimed(r, self._features), wide(self.emb_gain_r))
        if self.num_classes is not None:
            emb = mp_sum(emb, self._label(label, emb), LABEL_BALANCE)
        return mp_silu(emb).to(self.dtype)

    def _features(self, c: Tensor) -> Tensor:
        """Return the features of c (B,) in the dtype of the weights, or in float32 where that is half precision."""
        return self.emb_fourier(c).to(torch.promote_types(self.dtype, torch.float32))

    def _label(self, label: Tensor | None, emb: Tensor) -> Tensor:
        """Return the embedding of labels (B, E); the null class is zero."""
        if label is None:
            return torch.zeros_like(emb)
        table = normalize(wide(self.emb_label.weight)).t()
        try:
            rows = F.embedding(label.clamp_min(0), table)
        except IndexError:
            raise UserError(f"label {int(label.max())} is outside 0..{len(table) - 1}; -1 is the null class.") from None
        return rows * (label >= 0).unsqueeze(1)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C, H, W) to F; `emb` (B, E)."""
        first, *blocks = self.enc.values()
        # The constant channel lets a network without biases add one.
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        with exact(x):
            h = first(h)
        skips = [h]
        for block in blocks:
            h = self.run(block, h, emb)
            skips.append(h)
        for block in self.dec.values():
            h = self.run(block, mp_cat(h, skips.pop(), CONCAT_BALANCE) if block.joins else h, emb)
        with exact(x):
            return self.out_conv(h.to(self.dtype), self.out_gain)
