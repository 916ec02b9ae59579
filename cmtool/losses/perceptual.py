"""LPIPS: a distance in the features of VGG16 (Zhang et al. 2018), as consistency models use it.

Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 are divided by their norm over channels; squared
differences are weighted per channel and averaged over space. The weights of the channels come with the `lpips`
package; those of VGG16 are torchvision's file, fetched once. Both are read as plain tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.config.parts import DistancePart
from cmtool.errors import CheckpointError, OfflineError
from cmtool.losses.distance import Distance

BACKBONE = "vgg16-397923af.pth"
BACKBONE_URL = f"https://download.pytorch.org/models/{BACKBONE}"
# Layers of torchvision's `features` after which a feature map is taken, and their widths.
TAPS = (3, 8, 15, 22, 29)
WIDTHS = (64, 128, 256, 512, 512)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Images of this side or more are compared as they are; smaller ones are enlarged (Song et al. 2023, Appendix C).
NATIVE = 256
# Keeps the norm's gradient finite where all channels of a place are zero.
TINY = 1e-10


def backbone_path() -> Path:
    """Return where torchvision keeps the file of VGG16: `$TORCH_HOME`, else the user's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE


def backbone_weights() -> dict[str, Tensor]:
    """Return VGG16's weights, fetching the file the first time.

    Raises:
        OfflineError: it is not there and cannot be fetched; the sentence names file and place.
    """
    path = backbone_path()
    if not path.is_file():
        missing = f"LPIPS needs {BACKBONE}, which is not in {path.parent}"
        hint = f"put {BACKBONE_URL} there, or use another distance: --set recipe.distance.kind=pseudo_huber"
        if os.environ.get("CMTOOL_OFFLINE", "") not in ("", "0"):
            raise OfflineError(f"{missing}, and CMTOOL_OFFLINE forbids fetching it.", hint)
        try:
            torch.hub.load_state_dict_from_url(BACKBONE_URL, progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise OfflineError(f"{missing} and could not be fetched ({error}).", hint) from error
    return read_tensors(path)


def channel_weights() -> list[Tensor]:
    """Return the five vectors of channel weights (version 0.1) from the files of the `lpips` package."""
    spec = find_spec("lpips")
    if spec is None or spec.origin is None:
        raise CheckpointError("LPIPS needs the lpips package, which is not installed.", "pip install lpips")
    state = read_tensors(Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth")
    return [state[f"lin{index}.model.1.weight"].flatten() for index in range(len(TAPS))]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors that cannot run code.

    Raises:
        CheckpointError: if it is damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged files
        raise CheckpointError(f"{path} is damaged or no file of weights.", "remove it and fetch it again") from error


def vgg_features(pooling: str) -> nn.Sequential:
    """Return VGG16's layers up to relu5_3 with fresh weights; "average" pools by the mean (the released models)."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in zip(WIDTHS, (2, 2, 3, 3, 3), strict=True):
        if layers:
            layers.append(nn.MaxPool2d(2, 2) if pooling == "max" else nn.AvgPool2d(2, 2))
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


class Lpips(nn.Module):
    """LPIPS of two batches of images in [-1, 1], (B, 1 or 3, H, W) -> (B,). Never trained, in float32 at least."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Sequential, channels: Sequence[Tensor], resize: int = 224) -> None:
        super().__init__()
        self.features = backbone
        self.resize = resize
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])
        for index, weight in enumerate(channels):
            self.register_buffer(f"weight{index}", weight.reshape(1, -1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def unit_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the five feature maps, each of norm 1 over channels and times the root of its weights."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if self.resize and x.shape[-1] < NATIVE:
            x = F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        h = (x - self.shift.to(x.dtype)) / self.scale.to(x.dtype)
        found: list[Tensor] = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in TAPS:
                weight = self.get_buffer(f"weight{len(found)}").to(h.dtype)
                # Not norm(h): its gradient is not a number where every channel is zero.
                found.append(h / ((h**2).sum(1, keepdim=True) + TINY**2).sqrt() * weight.sqrt())
        return tuple(found)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of a and b (B,)."""
        return squares([one - other for one, other in zip(self.unit_features(a), self.unit_features(b), strict=True)])

    def form(self, f: Tensor, v: Tensor) -> Tensor:
        """Return the leading term of d(f, f + h v) / h^2 (B,): the squared change of the features along v."""
        return squares(torch.func.jvp(self.unit_features, (f,), (v,))[1])

    def pull(self, f: Tensor, v: Tensor) -> Tensor:
        """Return H(f) v (B, C, H, W), H the Hessian at zero distance: 2 J^T J v, the Gauss-Newton form, exact there."""
        with torch.no_grad():
            along = torch.func.jvp(self.unit_features, (f,), (v,))[1]
        at = f.detach().requires_grad_(True)
        with torch.enable_grad():
            maps = self.unit_features(at)
            inner = sum((2 * a.detach() * m).mean((2, 3)).sum() for a, m in zip(along, maps, strict=True))
        return torch.autograd.grad(inner, at)[0]


def squares(maps: Sequence[Tensor]) -> Tensor:
    """Sum over maps and channels of the mean square over space, (B,)."""
    return torch.stack([(m**2).sum(1).mean((1, 2)) for m in maps]).sum(0)


def load_lpips(part: DistancePart) -> Lpips:
    """Return LPIPS with the published weights.

    Raises:
        OfflineError: if VGG16's file is missing and cannot be fetched.
    """
    backbone = vgg_features(part.pooling)
    state = {name.removeprefix("features."): tensor for name, tensor in backbone_weights().items()}
    try:
        backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{backbone_path()} is no file of VGG16.", "remove it and fetch it again") from error
    return Lpips(backbone, channel_weights(), part.resize)


def build_lpips(part: DistancePart) -> Distance:
    """Return LPIPS as a distance with its local forms; the network moves to the images' device when first used."""
    network = load_lpips(part)

    def at(x: Tensor) -> Lpips:
        return network.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))

    return Distance(lambda a, b: at(a)(a, b), lambda f, v: at(f).form(f, v), lambda f, v: at(f).pull(f, v))
