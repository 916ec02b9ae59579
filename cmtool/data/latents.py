"""Images as latents of a published autoencoder, read through diffusers: means and deviations, and pictures again.

A latent z has the mean and the deviation that the autoencoder gives for an image; training draws a new z whenever it
sees the image. Each channel is shifted and scaled: `edm2` brings the latents of Stable Diffusion's autoencoder to a
mean of 0 and a deviation of .5 (Karras et al. 2024b), `imf` those of its variant ft-mse to a deviation of 1 (Geng et
al. 2025b), `sd` multiplies by the autoencoder's own scaling factor (Rombach et al. 2022), which leads near 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmtool.config.combinations import check_combination
from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset
from cmtool.data.packed import latents_writer, read_packed
from cmtool.errors import ConfigError, DataError, UserError, install_extra
from cmtool.files.cache import offline
from cmtool.talk import Talk

# Means and deviations of the four channels as published, and the deviation that they are brought to.
NORMS = {
    "edm2": ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5),
    "imf": ((0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003), 1.0),
}
BATCH_PIXELS = 2**20
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_NAME_ONE = "name the folder of a diffusers AutoencoderKL, or owner/name on the hub"


def _folder(place: str) -> Path | None:
    """Return the folder of an autoencoder, which may be a pipeline's; None for a name on the hub.

    Raises:
        DataError: neither of the two.
    """
    path = Path(place).expanduser()
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    if path.exists() or not _HUB_NAME.fullmatch(place):
        lacks = "it holds no config.json" if path.exists() else "there is no such folder"
        raise DataError(f"{place} is no folder of an autoencoder: {lacks}.", _NAME_ONE)
    return None


@lru_cache(maxsize=1)
def open_autoencoder(place: str) -> Any:
    """Return the AutoencoderKL of a folder or a name on the hub, in evaluation mode on the CPU.

    Raises:
        UserError: diffusers is not installed.
        DataError: there is none, or it is damaged or of another kind.
    """
    folder = _folder(place)
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("latents need the package 'diffusers'.", install_extra("latent")) from None
    try:
        found = AutoencoderKL.from_pretrained(
            str(folder or place),
            use_safetensors=True,
            local_files_only=folder is not None or offline(),
            low_cpu_mem_usage=False,  # True asks for one more package, and says so
        )
    except Exception as error:  # diffusers, its hub client and safetensors raise errors of many kinds
        if folder is None and isinstance(error, OSError):
            told = "CMTOOL_OFFLINE forbids fetching it" if offline() else "the hub does not give it"
            raise DataError(f"{place} is no folder here, and {told}.", _NAME_ONE) from None
        raise DataError(f"{place} is no autoencoder that diffusers reads: {_in_one_line(error)}", _NAME_ONE) from None
    if found.config.in_channels != 3:
        raise DataError(f"{place} encodes pictures of in_channels = {found.config.in_channels}, not 3.", _NAME_ONE)
    return found.float().eval().requires_grad_(False)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def weights_hash(autoencoder: Any) -> str:
    """Return 16 hexadecimal digits of the weights, which a model's pictures depend on."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def norm_of(autoencoder: Any, name: str) -> tuple[list[float], list[float]]:
    """Return (shift, scale) by channel: a normalized latent is (z - shift) * scale.

    Raises:
        DataError: a normalization of four channels for an autoencoder of others.
    """
    channels = int(autoencoder.config.latent_channels)
    if name in NORMS:
        mean, deviation, wanted = NORMS[name]
        if channels != len(mean):
            raise DataError(
                f"--norm {name} is for latents of 4 channels, and this autoencoder makes {channels}.", "use --norm sd"
            )
        return list(mean), [wanted / std for std in deviation]
    shift = getattr(autoencoder.config, "shift_factor", None) or 0.0
    return [float(shift)] * channels, [float(autoencoder.config.scaling_factor)] * channels


def _by_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


@torch.no_grad()
def encode(autoencoder: Any, images: Tensor, shift: list[float], scale: list[float]) -> Tensor:
    """Return means, then deviations (B, 2C', h, w) of the normalized latents of images (B, 3, H, W) in [-1, 1]."""
    law = autoencoder.encode(images).latent_dist
    factor = _by_channel(scale, images)
    return torch.cat([(law.mean - _by_channel(shift, images)) * factor, law.std * factor], dim=1)


def fitting_autoencoder(place: str, norm: str, side: int, channels: int) -> tuple[Any, list[float], list[float]]:
    """Return an autoencoder for pictures of this side and these channels, and (shift, scale) of `norm`.

    Raises:
        UserError, DataError: see `open_autoencoder` and `norm_of`; or the pictures do not fit.
    """
    autoencoder = open_autoencoder(place)
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if channels != 3 or side % factor:
        raise DataError(
            f"the autoencoder makes a latent pixel of {factor} x {factor} pixels of 3 channels: it cannot encode "
            f"{side} x {side} x {channels}.",
            f"use --resolution {factor * -(-side // factor)}" if side % factor else "use --channels 3",
        )
    return autoencoder, *norm_of(autoencoder, norm)


def pack_latents(pictures: Path, out: Path, place: str, norm: str, talk: Talk) -> dict[str, Any]:
    """Encode a packed file of pictures into `out`, in half precision, and return the header of the new file.

    Raises:
        UserError, DataError: see `fitting_autoencoder`.
    """
    data = read_packed(pictures)
    side = data.resolution
    autoencoder, shift, scale = fitting_autoencoder(place, norm, side, data.channels)
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    size = max(1, BATCH_PIXELS // side**2)
    latent = {"autoencoder": _recorded(place), "hash": weights_hash(autoencoder), "norm": norm, "shift": shift,
              "scale": scale, "pixels": [data.channels, side, side]}  # fmt: skip
    channels = int(autoencoder.config.latent_channels)
    with latents_writer(out, 2 * channels, side // factor) as writer, talk.progress(len(data), "encoding") as update:
        for start in range(0, len(data), size):
            images, labels = data.batch(torch.arange(start, min(start + size, len(data))))
            found = encode(autoencoder, images, shift, scale).half().numpy()
            if not np.isfinite(found).all():
                raise DataError(f"the autoencoder {place} gives latents that are no half-precision numbers.")
            for row, image in enumerate(found):
                writer.append_planar(image, None if labels is None else int(labels[row]))
            update(completed=start + len(found))
        return writer.finish({**dict(data.info.as_dict()), "class_names": list(data.class_names or ()) or None,
                              "classes": data.classes, "latent": latent})  # fmt: skip


def _recorded(place: str) -> str:
    """Return what names an autoencoder from every folder: a whole path, or the name on the hub."""
    return place if _folder(place) is None else str(Path(place).expanduser().absolute())


@lru_cache(maxsize=1)
def _known(place: str, digest: str) -> Any:
    """Return the autoencoder of this hash: from its place, or from a folder of its name in the working folder."""
    name = Path(place).name
    if not Path(place).expanduser().exists() and Path(name).is_dir():
        place = name
    back = f"put its folder back, or a copy of it named {name} into the working folder"
    try:
        autoencoder = open_autoencoder(place)
    except DataError as error:
        raise DataError(f"the autoencoder that the latents were made with is not here: {error.message}", back) from None
    if weights_hash(autoencoder) != digest:
        raise DataError(f"the autoencoder {place} is another than the one that the latents were made with.", back)
    return autoencoder


def encoder(latent: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return what turns pictures (B, 3, H, W) in [-1, 1] into mean normalized latents (B, C', h, w) of such a data set.

    Raises:
        UserError, DataError: the autoencoder is not here, or another one by now.
    """
    autoencoder = _known(str(latent["autoencoder"]), str(latent["hash"]))

    def mean(images: Tensor) -> Tensor:
        return encode(autoencoder.to(images.device), images, latent["shift"], latent["scale"]).chunk(2, dim=1)[0]

    return mean


def decoder(latent: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return what turns normalized latents (B, C', h, w) of such a data set into pictures (B, 3, H, W) in [-1, 1].

    Raises:
        UserError, DataError: the autoencoder is not here, or another one by now.
    """
    autoencoder = _known(str(latent["autoencoder"]), str(latent["hash"]))

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        model = autoencoder.to(z.device)
        whole = z.float() / _by_channel(latent["scale"], z.float()) + _by_channel(latent["shift"], z.float())
        _, height, width = latent["pixels"]
        parts = whole.split(max(1, BATCH_PIXELS // (height * width)))
        return torch.cat([model.decode(part).sample.clamp(-1, 1) for part in parts])

    return decode


def in_latents(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Return a run's settings with the shape of its latents; they are the same for pictures.

    Images are not mirrored: the latent of a mirrored picture is not the mirrored latent.

    Raises:
        ConfigError: a part of the run does not fit latents, or their shape.
    """
    if dataset.latent is None:
        return config
    shape = {"resolution": dataset.resolution, "channels": dataset.channels, "flip": False}
    if config.data.condition is not None:
        raise ConfigError("data.condition is computed from pictures, and these data are latents.")
    changed = config.model_copy(update={"data": config.data.model_copy(update=shape)})
    try:
        check_combination(changed)
    except ValueError as error:
        raise ConfigError(f"the latents are {shape['resolution']} x {shape['resolution']}: {error}.") from None
    return changed
