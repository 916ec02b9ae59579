"""The DDPM++ and NCSN++ U-Nets (Song et al. 2021) in the form of EDM (Karras et al. 2022, Appendix F).

DDPM++: positional embedding, box filter. NCSN++: Fourier embedding, FIR filter [1, 3, 3, 1], a residual pyramid that
feeds the shrunken image to each level. Both rescale every residual sum by sqrt(1/2). Parameters have the names of EDM's
pickles (`map_layer0`, `enc.32x32_block0.conv0`, `dec.32x32_aux_conv`), so that those load without a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.config.networks import SongConfig
from cmtool.errors import UserError
from cmtool.networks.blocks import (
    FourierFeatures,
    LogVariance,
    RawNetwork,
    attention,
    exact,
    heads_of,
    joined,
    linear_wide,
    number_of_heads,
    per_level,
    positional_features,
    zeroed,
)
from cmtool.networks.convolution import Conv2d
from cmtool.networks.normalization import GroupNorm, wide

SKIP_SCALE = math.sqrt(0.5)
ALMOST_ZERO = 1e-5
EPS = 1e-6


def xavier(module: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Draw a layer's weight uniformly by Glorot's rule times `gain`, and clear its bias."""
    nn.init.xavier_uniform_(module.weight, gain)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def linear(size_in: int, size_out: int) -> nn.Linear:
    """A linear layer with Glorot's weights."""
    layer = nn.Linear(size_in, size_out)
    xavier(layer)
    return layer


class Conv(Conv2d):
    """A convolution that keeps the side, or halves or doubles it with a FIR filter first.

    `resample`: "" none, "up" or "down"; `fused`: filter after the convolution, as the input pyramid of NCSN++ does.
    """

    resample_filter: Tensor

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        resample: str = "",
        fir: Sequence[int] = (1, 1),
        gain: float = 1.0,
        fused: bool = False,
    ) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2)
        xavier(self, gain)
        self.resample, self.box, self.fused = resample, tuple(fir) == (1, 1), fused
        if resample:
            taps = torch.tensor(fir, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W')."""
        if not self.resample:
            return super().forward(x)
        if self.fused:
            pad = self.kernel_size[0] // 2 + (self.resample_filter.shape[-1] - 1) // 2
            return self._filter(F.conv2d(x, self.weight, self.bias, padding=pad), 0)
        if not self.box:
            return super().forward(self._filter(x, (self.resample_filter.shape[-1] - 1) // 2))
        return super().forward(F.avg_pool2d(x, 2)) if self.resample == "down" else self.after_doubling(x)

    def _filter(self, x: Tensor, pad: int) -> Tensor:
        channels = x.shape[1]
        fir = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, fir, stride=2, padding=pad, groups=channels)
        return F.conv_transpose2d(x, 4 * fir, stride=2, padding=pad, groups=channels)


class SongBlock(nn.Module):
    """A residual block with optional attention; both sums are scaled by sqrt(1/2).

    Channels of `qkv` are ordered (head, channel, q|k|v).
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        cfg: SongConfig,
        dropout: float,
        *,
        resample: str = "",
        attends: bool = False,
        joins: bool = False,
    ) -> None:
        super().__init__()
        self.joins, self.dropout, self.scale_shift = joins, dropout, cfg.scale_shift
        self.norm0 = GroupNorm(cin, cfg.group_channels, EPS)
        self.conv0 = Conv(cin, cout, 3, resample, cfg.resample_filter)
        self.affine = linear(4 * cfg.channels, cout * (2 if cfg.scale_shift else 1))
        self.norm1 = GroupNorm(cout, cfg.group_channels, EPS)
        self.conv1 = Conv(cout, cout, 3, gain=ALMOST_ZERO)
        self.skip = Conv(cin, cout, 1, resample, cfg.resample_filter) if resample or cin != cout else None
        self.heads = number_of_heads(cout, cfg.head_channels) if attends else 0
        self.attention_kernel = cfg.attention_kernel
        if attends:
            self.norm2 = GroupNorm(cout, cfg.group_channels, EPS)
            self.qkv = Conv(cout, 3 * cout, 1, gain=math.sqrt(0.2))
            self.proj = Conv(cout, cout, 1, gain=ALMOST_ZERO)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W'); `emb` (B, E)."""
        h = self.conv0(self.norm0(x, silu=True))
        condition = self.affine(emb)[:, :, None, None]
        if self.scale_shift:
            h = self.norm1(h, condition, silu=True)
        else:
            h = self.norm1(h + condition, silu=True)
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        x = joined(self.conv1(h), x if self.skip is None else self.skip(x)).mul_(SKIP_SCALE)
        return joined(self.proj(self._attend(x)), x).mul_(SKIP_SCALE) if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.qkv(self.norm2(x)), self.heads, interleaved=True)
        return attention(q, k, v, self.attention_kernel).transpose(-1, -2).reshape(x.shape)


class SongUNet(RawNetwork):
    """F(x, c_noise, label, r) for images of any side that is a multiple of `downsampling`."""

    def __init__(self, cfg: SongConfig, *, channels: int, resolution: int, num_classes: int | None) -> None:
        super().__init__(channels, resolution, num_classes, cfg.two_time, cfg.checkpointing)
        levels = len(cfg.channel_mult)
        self.downsampling = 2 ** (levels - 1)
        self._widths = [cfg.channels * mult for mult in cfg.channel_mult]
        self._blocks = per_level(cfg.num_blocks, levels, "num_blocks")
        self._dropouts = per_level(cfg.dropout, levels, "dropout")
        self._embeddings(cfg)
        self._decoder(cfg, self._encoder(cfg))
        if cfg.log_variance:
            self.log_variance_head = LogVariance()
        self.hear_augment(cfg.augment_labels, self.features)
        self.hear_guidance(cfg.guided, self.features)

    def _embeddings(self, cfg: SongConfig) -> None:
        fourier, emb = cfg.embedding == "fourier", 4 * cfg.channels
        self.features = cfg.channels * (2 if fourier else 1)
        if fourier:
            self.map_noise = FourierFeatures(self.features, cfg.fourier_scale)
        if self.num_classes is not None:
            self.map_label = linear(self.num_classes, self.features)
        self.map_layer0, self.map_layer1 = linear(self.features, emb), linear(emb, emb)
        if cfg.two_time:
            self.map_layer0_r, self.map_layer1_r = linear(self.features, emb), zeroed(nn.Linear(emb, emb))

    def _attends(self, cfg: SongConfig, level: int) -> bool:
        return self.resolution // 2**level in cfg.attention

    def _encoder(self, cfg: SongConfig) -> list[int]:
        """Build the encoder and return the widths of its skip connections."""
        self.enc = nn.ModuleDict()
        current, image, skips = cfg.channels, self.channels, [cfg.channels]
        for level, width in enumerate(self._widths):
            side = self.resolution // 2**level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv(self.channels, current, 3)
            else:
                self.enc[f"{side}x{side}_down"] = SongBlock(
                    current, current, cfg, self._dropouts[level], resample="down"
                )
                if cfg.encoder == "residual":
                    pyramid = Conv(image, current, 3, "down", cfg.resample_filter, fused=True)
                    self.enc[f"{side}x{side}_aux_residual"], image = pyramid, current
                skips.append(current)
            for index in range(self._blocks[level]):
                block = SongBlock(current, width, cfg, self._dropouts[level], attends=self._attends(cfg, level))
                self.enc[f"{side}x{side}_block{index}"], current = block, width
                skips.append(current)
        return skips

    def _decoder(self, cfg: SongConfig, skips: list[int]) -> None:
        self.dec = nn.ModuleDict()
        current, last = self._widths[-1], len(self._widths) - 1
        for level in range(last, -1, -1):
            side, dropout, count = self.resolution // 2**level, self._dropouts[level], self._blocks[level]
            if level == last:
                self.dec[f"{side}x{side}_in0"] = SongBlock(current, current, cfg, dropout, attends=True)
                self.dec[f"{side}x{side}_in1"] = SongBlock(current, current, cfg, dropout)
            else:
                self.dec[f"{side}x{side}_up"] = SongBlock(current, current, cfg, dropout, resample="up")
            for index in range(count + 1):
                attends = index == count and self._attends(cfg, level)
                cin, current = current + skips.pop(), self._widths[level]
                self.dec[f"{side}x{side}_block{index}"] = SongBlock(
                    cin, current, cfg, dropout, attends=attends, joins=True
                )
        side = self.resolution
        self.dec[f"{side}x{side}_aux_norm"] = GroupNorm(current, cfg.group_channels, EPS)
        self.dec[f"{side}x{side}_aux_conv"] = Conv(current, self.channels, 3, gain=ALMOST_ZERO)

    def _features(self, c: Tensor) -> Tensor:
        features = (
            self.map_noise(c) if hasattr(self, "map_noise") else positional_features(c, self.features, endpoint=True)
        )
        # These networks read the sine half first.
        return features.roll(features.shape[1] // 2, dims=1)

    def _label(self, label: Tensor | None) -> Tensor:
        """Return the embedding (1 or B, features) of labels; the null class is just the bias."""
        weight, bias = self.map_label.weight, wide(self.map_label.bias)
        if label is None:
            return bias[None]
        try:
            rows = F.embedding(label.clamp_min(0), weight.t())
        except IndexError:
            raise UserError(
                f"label {int(label.max())} is outside 0..{weight.shape[1] - 1}; -1 is the null class."
            ) from None
        return wide(rows) * (label >= 0).unsqueeze(1) * math.sqrt(weight.shape[1]) + bias

    def embed(self, c_noise: Tensor, label: Tensor | None, r: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the embedding (B, E) of noise level, second time, label and augmentation."""
        features = self._features(c_noise)
        if self.num_classes is not None:
            features = features + self._label(label)
        hidden = F.silu(linear_wide(self.map_layer0, self.told(features, augment)))
        emb = linear_wide(self.map_layer1, hidden)
        if r is not None:
            hidden = F.silu(linear_wide(self.map_layer0_r, self.aimed(r, self._features)))
            emb = emb + linear_wide(self.map_layer1_r, hidden)
        return F.silu(emb).to(self.dtype)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C, H, W) to F; `emb` (B, E)."""
        first, *layers = self.enc.values()
        image = x
        with exact(x):
            h = first(image)
        skips: list[Tensor] = [h]
        for layer in layers:
            if isinstance(layer, SongBlock):
                h = self.run(layer, h, emb)
            else:
                h = image = (skips.pop() + layer(image)) * SKIP_SCALE
            skips.append(h)
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1) if block.joins else h, emb)
        with exact(h):
            return conv(norm(h.to(self.dtype), silu=True))
