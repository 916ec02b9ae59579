"""A residual MLP over flat pixels: for points in the plane (images of shape (2, 1, 1)) and small flat images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.config.networks import MlpConfig
from cmtool.errors import UserError
from cmtool.networks.blocks import (
    FourierFeatures,
    LogVariance,
    RawNetwork,
    add_label,
    exact,
    linear_wide,
    per_level,
    positional_features,
    zeroed,
)


class ResidualLayer(nn.Module):
    """LayerNorm, SiLU, linear, embedding (scale and shift, or added), SiLU, linear, plus the input."""

    def __init__(self, width: int, cfg: MlpConfig) -> None:
        super().__init__()
        (self.dropout,) = per_level(cfg.dropout, 1, "dropout")
        self.scale_shift = cfg.scale_shift
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.condition = nn.Linear(width, width * (2 if cfg.scale_shift else 1))
        self.outer = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map h (B, width) to the same shape; `emb` (B, width) is the embedding after its activation."""
        inner, condition = self.inner(F.silu(self.norm(h))), self.condition(emb)
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            inner = torch.addcmul(shift, inner, scale + 1)
        else:
            inner = inner + condition
        inner = F.silu(inner)
        if self.dropout:
            inner = F.dropout(inner, self.dropout, self.training)
        return h + self.outer(inner)


class Mlp(RawNetwork):
    """F(x, c_noise, label, r) for images of exactly `channels` x `resolution` x `resolution`."""

    def __init__(self, cfg: MlpConfig, *, channels: int, resolution: int, num_classes: int | None) -> None:
        super().__init__(channels, resolution, num_classes, cfg.two_time, cfg.checkpointing)
        self.downsampling, self.width = resolution, cfg.channels
        flat = channels * resolution**2
        if cfg.embedding == "fourier":
            self.map_noise = FourierFeatures(self.width, cfg.fourier_scale)
        self.time_embed = nn.Linear(self.width, self.width)
        if cfg.two_time:
            self.time_embed_r = zeroed(nn.Linear(self.width, self.width))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self.width)
        self.first = nn.Linear(flat, self.width)
        (layers,) = per_level(cfg.num_blocks, 1, "num_blocks")
        self.layers = nn.ModuleList([ResidualLayer(self.width, cfg) for _ in range(layers)])
        self.norm = nn.LayerNorm(self.width)
        self.last = zeroed(nn.Linear(self.width, flat))
        if cfg.log_variance:
            self.log_variance_head = LogVariance()
        self.hear_augment(cfg.augment_labels, self.width)
        self.hear_guidance(cfg.guided, self.width)

    def _features(self, c: Tensor) -> Tensor:
        return self.map_noise(c) if hasattr(self, "map_noise") else positional_features(c, self.width)

    def embed(self, c_noise: Tensor, label: Tensor | None, r: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the embedding (B, width) of noise level, second time and label."""
        emb = linear_wide(self.time_embed, self.told(self._features(c_noise), augment))
        if r is not None:
            emb = emb + linear_wide(self.time_embed_r, self.aimed(r, self._features))
        return F.silu(add_label(emb, self.label_emb.weight, label) if label is not None else emb).to(self.dtype)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C, side, side) to F; raises `UserError` for another side than the nominal one."""
        if x.shape[2:] != (self.resolution, self.resolution):
            raise UserError(f"an mlp takes {self.resolution}x{self.resolution} images, not {x.shape[2]}x{x.shape[3]}.")
        with exact(x):
            h = self.first(x.flatten(1))
        for layer in self.layers:
            h = self.run(layer, h, emb)
        with exact(x):
            return self.last(F.silu(self.norm(h.to(self.dtype)))).view(x.shape)
