"""Changes that carry an image away from its kind, and numbers that say how far: turns, colors, blur, mixtures, noise.

What tells them apart from an image alone knows what images of the kind look like (`losses.aligned`). The fifteen
numbers are those of Kim et al. (2025), whose widths in pixels are for a side of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmtool.config.parts import AugmentPart
from cmtool.data.augment import augmented
from cmtool.rng import batch_normal, batch_uniform

BRIGHTNESS, CONTRAST, BLUR, MIXTURE, NOISE = 0.2, 0.5, 3 / 32, 0.5, 0.5


def labels_of(channels: int) -> int:
    """Return how many numbers say what was done: 7 of the geometry, 2 to 5 of colors, 3 of blur, mixture and noise."""
    return 15 if channels == 3 else 12


def disturbed(images: Tensor, p: float, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Change images (B, C, H, H) in [-1, 1], each in every way with probability `p`; nothing depends on the device.

    Returns:
        The changed images, and what was done to them, (B, labels_of(C)), zero where nothing was.
    """
    turned, told = augmented(AugmentPart(p=p, xflip=0, yflip=0), images, seed, step, len(images), 0)
    assert told is not None
    size = (len(images), 7)
    chance, amount = (batch_uniform(size, seed, word, step).float() for word in ("disturb", "disturb-by"))
    normal = batch_normal((len(images), 3), seed, "disturb-normal", step)
    by = torch.cat([normal, amount[:, 3:]], 1)
    by = torch.where(chance < p, by, torch.zeros_like(by)).to(images)
    brightness, contrast, saturation, hue, blur, mixture, noise = by.unbind(1)
    made, said = _recolored(turned, brightness, contrast), [brightness, contrast]
    if images.shape[1] == 3:
        angle = torch.where(hue > 0, 2 * hue - 1, 0.0) * torch.pi
        made = _tinted(made, angle, saturation)
        said += [angle.cos() - 1, angle.sin(), saturation]
    made = _blurred(made, blur * BLUR * images.shape[-1])
    share = MIXTURE * (1 - (1 - mixture) ** (1 / 3))  # half of a Beta(1, 3)
    grain = batch_normal(images.shape, seed, "disturb-noise", step, device=images.device, dtype=images.dtype)
    made = made + _wide(share) * (made.flip(0) - made) + _wide(NOISE * noise) * grain
    return made, torch.stack([*told.to(by).unbind(1), *said, 3 * blur, share, NOISE * noise], 1)


def _wide(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def _recolored(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    return (images + _wide(BRIGHTNESS * brightness)) * _wide(torch.exp2(CONTRAST * contrast))


def _tinted(images: Tensor, angle: Tensor, saturation: Tensor) -> Tensor:
    """Turn and stretch colors around the gray axis."""
    gray = images.mean(1, keepdim=True)
    color = images - gray
    across = (color.roll(1, 1) - color.roll(-1, 1)) / 3**0.5
    return gray + _wide(torch.exp2(saturation)) * (_wide(angle.cos()) * color + _wide(angle.sin()) * across)


def _blurred(images: Tensor, width: Tensor) -> Tensor:
    """Blur each image by a Gaussian of a standard deviation `width` (B,) in pixels; at 0 it keeps every bit."""
    place = torch.arange(images.shape[-1], device=images.device)
    apart = (place[:, None] - place).square() / (2 * width.clamp_min(1e-3)[:, None, None] ** 2)
    rows = torch.softmax(-apart, -1)[:, None]
    return torch.where(_wide(width) > 0, rows @ images @ rows.mT, images)
