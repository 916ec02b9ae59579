"""A distance whose pull points towards the data: the manifold feature distance of Kim et al. (2025).

A small network is trained to read from an image alone how it was turned, recolored, blurred, mixed and made noisy. Its
features change most in the directions that lead away from the data. The distance of two images is that of their
features; only the direction of its gradient is used, as a vector of norm 1 for each image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmtool.losses.distance import Distance

WIDTHS = (16, 32, 64, 128)
# Norms are rounded off below this, as in the authors' code.
TINY = 1e-5


class Features(nn.Module):
    """A network that reads from images (B, C, H, H) how each was changed; every pooled layer is a feature map."""

    def __init__(self, channels: int, side: int, labels: int) -> None:
        super().__init__()
        blocks, inside = [], channels
        # Down to maps of two or three pixels a side.
        for width in WIDTHS[: max(1, side.bit_length() - 2)]:
            layers: list[nn.Module] = []
            for _ in range(2):
                layers += [nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inside = width
            blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.blocks = nn.ModuleList(blocks)
        self.answers = nn.Linear(inside, labels)

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return all feature maps, (B, C', H', H') each, and last the answers as (B, labels, 1, 1)."""
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return (*found, self.answers(x.mean((2, 3)))[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the answers, (B, labels)."""
        return self.maps(x)[-1].flatten(1)


def norms(maps: tuple[Tensor, ...]) -> Tensor:
    """Sum over maps and channels of the pseudo-Huber norm over space, (B,)."""
    # Not sqrt(s + c^2) - c, which loses every digit of small differences.
    squares = torch.cat([(m**2).sum((2, 3)) for m in maps], 1)
    return (squares / ((squares + TINY**2).sqrt() + TINY)).sum(1)


def unit(gradient: Tensor) -> Tensor:
    """Scale each image of a gradient (B, C, H, W) to norm 1; nothing stays nothing."""
    return gradient / torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True).clamp_min(TINY**2)


def build_aligned(network: Features) -> Distance:
    """Return the distance in the features of `network`, which must not be trained any more.

    `between(a, b)` has the value of the distance and, in a alone, a gradient of norm 1: that of the distance without
    its length. Networks of the pixels' device and at least float32 are asked.
    """

    def at(x: Tensor) -> Features:
        return network.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))

    def between(a: Tensor, b: Tensor) -> Tensor:
        network, here = at(a), a.detach().requires_grad_(True)
        with torch.no_grad():
            there = network.maps(b)
        with torch.enable_grad():
            value = norms(tuple(one - other for one, other in zip(network.maps(here), there, strict=True)))
            pull = unit(torch.autograd.grad(value.sum(), here)[0])
        along = (a * pull).flatten(1).sum(1)
        return value.detach() + (along - along.detach())

    def along(f: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the change of every map along v, and its norm over space."""
        changes = torch.func.jvp(at(f).maps, (f,), (v,))[1]
        return changes, tuple(torch.linalg.vector_norm(m, dim=(2, 3), keepdim=True) for m in changes)

    def form(f: Tensor, v: Tensor) -> Tensor:
        # Of degree 1 in v: the rounding of norms lies below any step that is taken.
        return torch.cat([length.flatten(1) for length in along(f, v)[1]], 1).sum(1)

    def pull(f: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            changes, lengths = along(f, v)
            towards = [m / length.clamp_min(TINY**2) for m, length in zip(changes, lengths, strict=True)]
        here = f.detach().requires_grad_(True)
        with torch.enable_grad():
            maps = at(f).maps(here)
            inner = torch.stack([(m * t).sum() for m, t in zip(maps, towards, strict=True)]).sum()
        return unit(torch.autograd.grad(inner, here)[0])

    return Distance(between, form, pull)
