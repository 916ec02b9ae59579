"""Two networks as one: a frozen one for small noise levels and a trained one above (truncated consistency models)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmtool.networks.blocks import RawNetwork


class TruncatedNetwork(nn.Module):
    """F(x, c_noise, *told) of `early` below the threshold of c_noise and of `late` from it on.

    `early` never trains: it has no gradients and stays in evaluation mode. Source: Lee et al. 2025, section 4.
    """

    def __init__(self, early: RawNetwork, late: RawNetwork, threshold: float) -> None:
        super().__init__()
        self.early, self.late = early.requires_grad_(False), late
        # The threshold is slightly lower, so that a level rounded to float32 falls on the right side.
        self.threshold = threshold - 1e-6 * max(1.0, abs(threshold))
        self.channels, self.resolution, self.num_classes = late.channels, late.resolution, late.num_classes
        self.two_time, self.downsampling = late.two_time, late.downsampling
        self.augment_labels = late.augment_labels

    def train(self, mode: bool = True) -> TruncatedNetwork:
        """Set the mode of `late`; `early` is always in evaluation mode."""
        super().train(mode)
        self.early.eval()
        return self

    def forward(self, x: Tensor, c_noise: Tensor, *told: Tensor | None) -> Tensor:
        """Return F (B, C, H, W); arguments as in every network of this room; `told` are those after c_noise."""
        above = c_noise >= self.threshold
        if bool(above.all()):
            return self.late(x, c_noise, *told)
        if not bool(above.any()):
            return self.early(x, c_noise, *told)
        both = (self.late(x, c_noise, *told), self.early(x, c_noise, *told))
        return torch.where(above[:, None, None, None], *both)

    def log_variance(self, c_noise: Tensor) -> Tensor:
        """Return the head w(c_noise) (B,) of `late`."""
        return self.late.log_variance(c_noise)


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one network as those of both halves."""
    return {f"{half}.{name}": tensor for half in ("early", "late") for name, tensor in state.items()}
