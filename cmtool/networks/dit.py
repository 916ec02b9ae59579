"""A transformer over patches with adaLN-Zero, with the names of DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024).

The classic parts are theirs: layer normalization without weights, a GELU feed-forward layer, fixed sine and cosine
positions. RMS normalization, SwiGLU, rotary positions and normalized queries and keys are what later ones use.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.config.networks import DitConfig
from cmtool.networks.blocks import (
    LogVariance,
    RawNetwork,
    WideBuffers,
    add_label,
    attention,
    exact,
    linear_wide,
    per_level,
    positional_features,
    wide,
    zeroed,
)
from cmtool.networks.convolution import Linear

FEATURES = 256  # sines and cosines of a noise level
EPS = 1e-6


def frequencies(count: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return 1 .. 1/10000 (count,), geometric, the last one ratio above the end."""
    steps = torch.arange(count, device=device, dtype=dtype)
    return torch.exp(steps * (-math.log(10000.0) / count))


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return (1, rows * columns, width): sines, then cosines, of the column in one half and of the row in the other."""
    found = []
    for place in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")[::-1]:
        phase = place.flatten()[:, None] * frequencies(width // 4, dtype=torch.float64)
        found += [phase.sin(), phase.cos()]
    return torch.cat(found, dim=1).float().unsqueeze(0)


def rotary_angles(rows: int, columns: int, head: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (rows * columns, head) of the angles that turn queries and keys.

    Half of the pairs turn by the row, half by the column. Source: Su et al. 2021; in two dimensions Heo et al. 2024.
    """
    freqs = frequencies(head // 4, like.device)
    row = torch.arange(rows, device=like.device).repeat_interleave(columns)
    column = torch.arange(columns, device=like.device).repeat(rows)
    phase = torch.cat([row[:, None] * freqs, column[:, None] * freqs], dim=1).repeat(1, 2)
    return phase.cos().to(like.dtype), phase.sin().to(like.dtype)


def turned(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + d / 2) of x (..., N, d) by their angles."""
    cos, sin = (angle.to(x.dtype) for angle in angles)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LevelEmbedder(nn.Module):
    """A noise level to a vector (B, width): features, linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = nn.Linear(FEATURES, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, c: Tensor) -> Tensor:
        """Return (B, width) of c (B,), in at least float32."""
        return linear_wide(self.mlp[2], F.silu(linear_wide(self.mlp[0], positional_features(c, FEATURES))))


class LabelEmbedder(nn.Module):
    """A row for each class, and a last one for the null class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, embedding: Tensor, label: Tensor | None) -> Tensor:
        """Add the rows of label (B,), the last one for -1 or no label, to `embedding` (B, width)."""
        table = self.embedding_table.weight
        null = wide(table[-1])
        if label is None:
            return embedding + null
        return add_label(embedding, table[:-1], label) + null * (label < 0).unsqueeze(1)


class RmsNorm(nn.Module):
    """x / rms(x), times a weight, over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., width) in its own dtype."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), EPS)


class Attention(nn.Module):
    """Multi-head attention over tokens; outputs of `qkv` are ordered (q|k|v, head, channel)."""

    def __init__(self, cfg: DitConfig) -> None:
        super().__init__()
        self.heads, self.attention_kernel, self.rotary = cfg.heads, cfg.attention_kernel, cfg.positions == "rotary"
        self.qkv = Linear(cfg.width, 3 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RmsNorm(cfg.width // cfg.heads), RmsNorm(cfg.width // cfg.heads)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map x (B, N, width) to the same shape; `grid`: rows and columns of patches."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            angles = rotary_angles(*grid, q.shape[-1], wide(q))
            q, k = turned(q, angles), turned(k, angles)
        return self.proj(attention(q, k, v, self.attention_kernel).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, or a SwiGLU of the same size (Shazeer 2020).

    DiT takes GELU's approximation by tanh; it differs from the exact one by at most .0005, and on CPUs torch needs two
    to five times as long for it.
    """

    def __init__(self, cfg: DitConfig) -> None:
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        self.approximate = "none" if cfg.mlp == "gelu_erf" else "tanh"
        hidden = int(cfg.width * cfg.mlp_ratio * (2 / 3 if self.gated else 1))
        (self.dropout,) = per_level(cfg.dropout, 1, "dropout")
        self.fc1 = Linear(cfg.width, 2 * hidden if self.gated else hidden)
        self.fc2 = Linear(hidden, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, N, width) to the same shape."""
        h = self.fc1(x)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h, approximate=self.approximate)
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return self.fc2(h)


class Modulation(nn.Sequential):
    """SiLU and a linear layer, zero at the start: from the condition to `parts` vectors of a block."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), zeroed(nn.Linear(width, parts * width)))
        self.parts = parts

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return (B, 1, width) each of `condition` (B, width), in at least float32."""
        with exact(condition):
            return linear_wide(self[1], F.silu(condition)).unsqueeze(1).chunk(self.parts, dim=2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, norm: str) -> Tensor:
    """Normalize each token of x (B, N, width), multiply by 1 + scale and shift."""
    y = F.layer_norm(x, x.shape[-1:], eps=EPS) if norm == "layer" else F.rms_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift.to(y.dtype), y, (scale + 1).to(y.dtype))


class Block(nn.Module):
    """Attention, then a feed-forward layer; each branch is shifted, scaled and gated by the condition."""

    def __init__(self, cfg: DitConfig) -> None:
        super().__init__()
        self.norm = cfg.norm
        self.attn = Attention(cfg)
        self.mlp = FeedForward(cfg)
        self.adaLN_modulation = Modulation(cfg.width, 6)

    def forward(self, x: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens x (B, N, width) to the same shape."""
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition)
        x = x + gate.to(x.dtype) * self.attn(modulated(x, shift, scale, self.norm), grid)
        return x + gate2.to(x.dtype) * self.mlp(modulated(x, shift2, scale2, self.norm))


class FinalLayer(nn.Module):
    """Normalization, condition, and a linear layer from each token to its patch."""

    def __init__(self, cfg: DitConfig, values: int) -> None:
        super().__init__()
        self.norm = cfg.norm
        self.linear = zeroed(nn.Linear(cfg.width, values))
        self.adaLN_modulation = Modulation(cfg.width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, width) to patches (B, N, values)."""
        shift, scale = self.adaLN_modulation(condition)
        return self.linear(modulated(x, shift, scale, self.norm))


class PatchEmbedder(nn.Module):
    """Each patch to a token by one linear map."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, N, width), row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Dit(RawNetwork, WideBuffers):
    """F(x, c_noise, label, r) for images of any side that is a multiple of the patch."""

    pos_embed: Tensor

    def __init__(self, cfg: DitConfig, *, channels: int, resolution: int, num_classes: int | None) -> None:
        super().__init__(channels, resolution, num_classes, cfg.two_time, cfg.checkpointing)
        self.downsampling = self.patch = cfg.patch_for(resolution)
        self.width = cfg.width
        self.x_embedder = PatchEmbedder(channels, self.patch, cfg.width)
        self.t_embedder = LevelEmbedder(cfg.width)
        if cfg.two_time:
            # Starts at zero, so that the weights of a one-time network mean the same until r has been learned.
            self.r_embedder = LevelEmbedder(cfg.width)
            zeroed(self.r_embedder.mlp[2])
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, cfg.width)
        if cfg.positions == "sincos":
            self.grid = (resolution // self.patch, resolution // self.patch)
            self.register_buffer("pos_embed", sincos_positions(*self.grid, cfg.width))
        if cfg.input_gate:
            self.input_gate = Modulation(cfg.width, 2)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.depth)])
        for layer in self.blocks.modules():
            if isinstance(layer, Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.final_layer = FinalLayer(cfg, self.patch**2 * channels)
        if cfg.log_variance:
            self.log_variance_head = LogVariance()
        self.hear_guidance(cfg.guided, cfg.width)
        if self.map_guidance is not None:
            zeroed(self.map_guidance)
        self.hear_augment(cfg.augment_labels, cfg.width)

    def embed(self, c_noise: Tensor, label: Tensor | None, r: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return the condition (B, width) of noise level, second time, label and augmentation."""
        condition = self.told(self.t_embedder(c_noise), augment)
        if r is not None:
            condition = condition + self.aimed(r, self.r_embedder)
        if self.num_classes is not None:
            condition = self.y_embedder(condition, label)
        return condition.to(self.dtype)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C, H, W) to F; `emb` (B, width)."""
        grid = x.shape[2] // self.patch, x.shape[3] // self.patch
        with exact(x):
            h = self._placed(self._gated(self.x_embedder(x), emb), grid)
        for block in self.blocks:
            h = self.run(block, h, emb, grid)
        with exact(x):
            return self._joined(self.final_layer(h.to(self.dtype), emb), grid)

    def _gated(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Scale and shift the tokens of patches by the condition, where the network has an input gate.

        Blocks add to their input and pass it on. At large noise levels that is noise, which an answer has to take away
        again, and leaves as grain. Blocks normalize what they read, so that a small input tells them no less.
        """
        if not hasattr(self, "input_gate"):
            return tokens
        shift, scale = self.input_gate(condition)
        return torch.addcmul(shift.to(tokens.dtype), tokens, (scale + 1).to(tokens.dtype))

    def _placed(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add the positions to tokens (B, N, width), on another grid than the nominal one those of that grid."""
        if not hasattr(self, "pos_embed"):
            return tokens
        if grid == self.grid:
            return tokens + self.pos_embed.to(tokens.dtype)
        return tokens + sincos_positions(*grid, self.width).to(tokens)

    def _joined(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Put patches (B, N, p * p * C), channels last, back into images (B, C, H, W)."""
        cells = patches.unflatten(2, (self.patch, self.patch, self.channels)).unflatten(1, grid)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
