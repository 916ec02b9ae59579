"""The ADM U-Net (Dhariwal and Nichol 2021), as the published consistency models use it.

Parameters have the names of the published files, so that those load without a map: `time_embed`, `label_emb`,
`input_blocks.i.j`, `middle_block.j`, `output_blocks.i.j`, `out`; in a residual block `in_layers`, `emb_layers`,
`out_layers`, `skip_connection`; in an attention layer `norm`, `qkv`, `proj_out`. The numbers count the layers of the
original sequence, where layers without weights (activations, dropout) leave gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.config.networks import AdmConfig
from cmtool.networks.blocks import (
    FourierFeatures,
    LogVariance,
    RawNetwork,
    add_label,
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
from cmtool.networks.normalization import GroupNorm


def conv3x3(channels_in: int, channels_out: int) -> Conv2d:
    """A 3x3 convolution that keeps the side."""
    return Conv2d(channels_in, channels_out, 3, padding=1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, embedding, GroupNorm, SiLU, dropout, convolution, plus the input.

    `resample` "down" or "up" halves or doubles the side of both branches before the first convolution.
    """

    def __init__(self, cin: int, cout: int, emb: int, cfg: AdmConfig, dropout: float, resample: str = "") -> None:
        super().__init__()
        self.resample, self.dropout, self.scale_shift = resample, dropout, cfg.scale_shift
        self.in_layers = nn.ModuleDict({"0": GroupNorm(cin, cfg.group_channels), "2": conv3x3(cin, cout)})
        self.emb_layers = nn.ModuleDict({"1": nn.Linear(emb, cout * (2 if cfg.scale_shift else 1))})
        self.out_layers = nn.ModuleDict({"0": GroupNorm(cout, cfg.group_channels), "3": zeroed(conv3x3(cout, cout))})
        if cin != cout:
            self.skip_connection = Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W'); `emb` (B, E) is the embedding after its activation."""
        h = self.in_layers["0"](x, silu=True)
        if self.resample == "up":
            h, x = (
                cast(Conv2d, self.in_layers["2"]).after_doubling(h),
                F.interpolate(x, scale_factor=2.0, mode="nearest"),
            )
        elif self.resample == "down":
            h, x = self.in_layers["2"](F.avg_pool2d(h, 2)), F.avg_pool2d(x, 2)
        else:
            h = self.in_layers["2"](h)
        condition = self.emb_layers["1"](emb)[:, :, None, None]
        if self.scale_shift:
            h = self.out_layers["0"](h, condition, silu=True)
        else:
            h = self.out_layers["0"](h + condition, silu=True)
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        skip = x if not hasattr(self, "skip_connection") else self.skip_connection(x)
        return joined(self.out_layers["3"](h), skip)


class Attention(nn.Module):
    """Multi-head attention over pixels with a residual; channels of `qkv` are ordered (q|k|v, head, channel)."""

    def __init__(self, channels: int, cfg: AdmConfig) -> None:
        super().__init__()
        self.heads = number_of_heads(channels, cfg.head_channels)
        self.attention_kernel = cfg.attention_kernel
        self.norm = GroupNorm(channels, cfg.group_channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj_out = zeroed(Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        batch, channels, height, width = x.shape
        q, k, v = heads_of(self.qkv(self.norm(x)), self.heads)
        mixed = attention(q, k, v, self.attention_kernel).transpose(1, 2)
        # The kernel leaves channels last, so this copies nothing.
        return joined(self.proj_out(mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)), x)


class Stage(nn.ModuleList):
    """One entry of `input_blocks` or `output_blocks`: layers run in order at one point of the U."""

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Run all layers; residual blocks see the embedding."""
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class AdmUNet(RawNetwork):
    """F(x, c_noise, label, r) for images of any side that is a multiple of `downsampling`."""

    def __init__(self, cfg: AdmConfig, *, channels: int, resolution: int, num_classes: int | None) -> None:
        super().__init__(channels, resolution, num_classes, cfg.two_time, cfg.checkpointing)
        levels = len(cfg.channel_mult)
        self.downsampling = 2 ** (levels - 1)
        self.width, emb = cfg.channels, 4 * cfg.channels
        self.blocks_per_level = per_level(cfg.num_blocks, levels, "num_blocks")
        self.dropouts = per_level(cfg.dropout, levels, "dropout")
        self._embeddings(cfg, emb)
        self._encoder(cfg, emb)
        self._decoder(cfg, emb)
        if cfg.log_variance:
            self.log_variance_head = LogVariance()
        self.hear_augment(cfg.augment_labels, self.width)
        self.hear_guidance(cfg.guided, self.width)

    def _embeddings(self, cfg: AdmConfig, emb: int) -> None:
        if cfg.embedding == "fourier":
            self.map_noise = FourierFeatures(self.width, cfg.fourier_scale)
        self.time_embed = nn.ModuleDict({"0": nn.Linear(self.width, emb), "2": nn.Linear(emb, emb)})
        if cfg.two_time:
            # Starts at zero, so that the weights of a one-time network mean the same until r has been learned.
            self.time_embed_r = nn.ModuleDict({"0": nn.Linear(self.width, emb), "2": zeroed(nn.Linear(emb, emb))})
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes, emb)

    def _encoder(self, cfg: AdmConfig, emb: int) -> None:
        wide_at = [cfg.channels * mult for mult in cfg.channel_mult]
        current = wide_at[0]
        self.input_blocks = nn.ModuleList([Stage([conv3x3(self.channels, current)])])
        self._skips = [current]
        for level, width in enumerate(wide_at):
            for _ in range(self.blocks_per_level[level]):
                self.input_blocks.append(Stage(self._layers(cfg, current, width, emb, level)))
                current = width
                self._skips.append(current)
            if level < len(wide_at) - 1:
                self.input_blocks.append(Stage([ResBlock(current, current, emb, cfg, self.dropouts[level], "down")]))
                self._skips.append(current)
        deepest = self.dropouts[-1]
        self.middle_block = Stage(
            [
                ResBlock(current, current, emb, cfg, deepest),
                Attention(current, cfg),
                ResBlock(current, current, emb, cfg, deepest),
            ]
        )

    def _decoder(self, cfg: AdmConfig, emb: int) -> None:
        wide_at = [cfg.channels * mult for mult in cfg.channel_mult]
        current, skips = wide_at[-1], list(self._skips)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(wide_at))):
            for block in range(self.blocks_per_level[level] + 1):
                layers = list(self._layers(cfg, current + skips.pop(), width, emb, level))
                current = width
                if level and block == self.blocks_per_level[level]:
                    layers.append(ResBlock(width, width, emb, cfg, self.dropouts[level], "up"))
                self.output_blocks.append(Stage(layers))
        self.out = nn.ModuleDict(
            {"0": GroupNorm(current, cfg.group_channels), "2": zeroed(conv3x3(current, self.channels))}
        )

    def _layers(self, cfg: AdmConfig, cin: int, cout: int, emb: int, level: int) -> Iterator[nn.Module]:
        yield ResBlock(cin, cout, emb, cfg, self.dropouts[level])
        if self.resolution // 2**level in cfg.attention:
            yield Attention(cout, cfg)

    def _features(self, c: Tensor) -> Tensor:
        return self.map_noise(c) if hasattr(self, "map_noise") else positional_features(c, self.width)

    def _time(self, c: Tensor, mlp: nn.ModuleDict, augment: Tensor | None = None) -> Tensor:
        features = self.told(self.aimed(c, self._features), augment)
        return linear_wide(mlp["2"], F.silu(linear_wide(mlp["0"], features)))

    def embed(self, c_noise: Tensor, label: Tensor | None, r: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the embedding (B, E) of noise level, second time, label and augmentation."""
        emb = self._time(c_noise, self.time_embed, augment)
        if r is not None:
            emb = emb + self._time(r, self.time_embed_r)
        if label is not None:
            emb = add_label(emb, self.label_emb.weight, label)
        return F.silu(emb).to(self.dtype)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C, H, W) to F; `emb` (B, E)."""
        with exact(x):
            h = self.run(self.input_blocks[0], x, emb)
        skips = [h]
        for stage in self.input_blocks[1:]:
            h = self.run(stage, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), emb)
        with exact(h):
            return self.out["2"](self.out["0"](h.to(self.dtype), silu=True))
