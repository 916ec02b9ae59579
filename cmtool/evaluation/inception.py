"""The 2015 Inception network behind published metrics, and the ways to resize images to its 299 pixels.

The weights are the TorchScript file that StyleGAN2-ADA published and clean-fid uses. Three resizing rules are known
by clean-fid's names: `legacy_tensorflow` (bilinear as in TensorFlow 1: no half-pixel center, no antialiasing; ADM's
evaluator and the consistency-model papers use it), `clean` (Pillow's antialiased bicubic on float channels) and
`legacy_pytorch` (bilinear with half-pixel centers, inputs scaled to [-1, 1]). Do not mix metrics of different rules.

ADM's conventions: pool features (2,048), spatial features (the first 7 channels of the first convolution of `mixed_6`,
17 x 17 x 7 = 2,023, in that order), class probabilities from the logit matrix without its bias.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array
from cmtool.files.cache import sha256
from cmtool.files.download import Remote, fetch

SIDE = 299
WEIGHTS = Remote(
    what="the Inception network for FID",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    folder="features",
    name="inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
SPATIAL_LAYER, SPATIAL_CHANNELS = "mixed_6", 7


def resize_tensorflow(images: Tensor) -> Tensor:
    """Resize (B, C, H, W) to 299 as TensorFlow 1 does: source coordinate = index * in / out, neighbors clamped."""
    for axis in (2, 3):
        size = images.shape[axis]
        source = torch.arange(SIDE, dtype=torch.float32, device=images.device) * (size / SIDE)
        low = source.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        share = (source - low).reshape([-1 if dim == axis else 1 for dim in range(4)])
        below, above = images.index_select(axis, low), images.index_select(axis, high)
        images = below + (above - below) * share
    return images


def resize_clean(images: Tensor) -> Tensor:
    """Resize (B, C, H, W) in 0..255 to 299 with Pillow's antialiased bicubic filter by channel, unquantized."""
    planes = images.cpu().numpy().astype(np.float32)
    out = np.empty((*planes.shape[:2], SIDE, SIDE), dtype=np.float32)
    for index in np.ndindex(planes.shape[:2]):
        picture = Image.fromarray(np.ascontiguousarray(planes[index]))
        out[index] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return torch.from_numpy(out.clip(0, 255)).to(images.device)


def resize_pytorch(images: Tensor) -> Tensor:
    """Resize (B, C, H, W) in 0..255 to 299, bilinear with half-pixel centers and no antialiasing."""
    return nn.functional.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False).clamp(0, 255)


RESIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "legacy_tensorflow": resize_tensorflow,
    "clean": resize_clean,
    "legacy_pytorch": resize_pytorch,
}


def normalize(images: Tensor, mode: str) -> Tensor:
    """Scale 0..255 as the rule asks: (x - 128) / 128, or 2 x / 255 - 1 for `legacy_pytorch`."""
    return images * (2 / 255) - 1 if mode == "legacy_pytorch" else (images - 128) / 128


class Inception(nn.Module):
    """Pool features, spatial features and class probabilities of uint8 images, from the TorchScript weights."""

    def __init__(self, script: torch.jit.ScriptModule, mode: str) -> None:
        super().__init__()
        self.script = script
        self.mode = mode

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return pool (B, 2048), spatial (B, 2023) or None, probabilities (B, 1008) or None, of uint8 (B, 3, H, W)."""
        x = normalize(RESIZERS[self.mode](images.float()), self.mode)
        pool, spatial = self._walk(x)
        return pool, spatial, self._probabilities(pool)

    def _walk(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        layers = self.script.layers
        children = dict(layers.named_children())
        if SPATIAL_LAYER not in children:
            return layers(x).flatten(1).float(), None
        spatial = None
        for name, layer in children.items():
            x = layer(x)
            if name == SPATIAL_LAYER:
                # The block's output begins with the 192 channels of its first convolution.
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()
        return x.flatten(1).float(), spatial

    def _probabilities(self, pool: Tensor) -> Tensor | None:
        output = getattr(self.script, "output", None)
        if output is None or not hasattr(output, "weight"):
            return None
        return (pool @ output.weight.float().T).softmax(dim=1)


def load_inception(mode: str, say: Callable[[str], None] = lambda text: None) -> tuple[Inception, str]:
    """Return the network and the SHA-256 of its file, which is downloaded once unless somebody has put it in place.

    Raises:
        OfflineError: the file is absent and cannot be downloaded.
        DataError: the file is not a TorchScript module of that shape.
    """
    path = fetch(WEIGHTS, say)
    digest = sha256(path)
    if digest != WEIGHTS.sha256:
        say(
            f"{path} is not the published file (SHA-256 {digest[:12]}): figures from it are not comparable with papers."
        )
    return Inception(_load_script(path), mode).eval(), digest


def _load_script(path: Path) -> torch.jit.ScriptModule:
    try:
        script = load_script(path)
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "it is damaged"
        raise DataError(f"{path} is no TorchScript file: {reason}", f"delete it and download {WEIGHTS.url}") from error
    if not hasattr(script, "layers"):
        raise DataError(f"{path} is a TorchScript file, but not the Inception network: it has no part named layers.")
    return script


def load_script(path: Path, device: str = "cpu") -> torch.jit.ScriptModule:
    """Load a TorchScript file in evaluation mode, without torch's advice to its author to use another format."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=FutureWarning)
        return torch.jit.load(str(path), map_location=device).eval()


def tile_channels(images: Array) -> Array:
    """Return uint8 (B, H, W, 3): gray channels are repeated, alpha is refused."""
    if images.shape[-1] == 1:
        return images.repeat(3, axis=-1)
    if images.shape[-1] != 3:
        raise DataError(f"features are for gray or RGB images, not for {images.shape[-1]} channels.")
    return images
