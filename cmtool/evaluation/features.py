"""Feature networks by name, behind one small interface: images in, features out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cmtool.data import from_uint8
from cmtool.errors import DataError, install_extra
from cmtool.evaluation import domain, pretrained
from cmtool.evaluation.choices import check_features, check_mode
from cmtool.evaluation.inception import WEIGHTS, load_inception, load_script, tile_channels
from cmtool.evaluation.statistics import Array
from cmtool.files.cache import sha256


@dataclass(frozen=True)
class Batch:
    """A network's output for a batch: features (B, D), and spatial features and probabilities if it has them."""

    features: Array
    spatial: Array | None = None
    probabilities: Array | None = None


@dataclass(frozen=True)
class Features:
    """A feature network: `call` maps uint8 (B, H, W, C) to a `Batch`.

    `name` is printed with every metric, `fingerprint` identifies the exact network and its resizing, `accepts` raises
    `DataError` for images (H, W, C) that it cannot judge, and `labels` maps its classes to labels if they have some,
    which `class_names` names. `extras` go into the protocol of every result, and `caveat` is what to read figures with.
    """

    name: str
    fingerprint: str
    call: Callable[[Array], Batch]
    accepts: Callable[[tuple[int, int, int]], None] = lambda shape: None
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    domain: bool = False
    extras: dict[str, str] = field(default_factory=dict)
    caveat: str = ""

    @property
    def distance(self) -> str:
        """What the Frechet distance is called: FID only with Inception, else with the features' name."""
        return "FID" if self.name.startswith("inception") else f"FD ({self.name})"


def usual_features(otherwise: str = "inception") -> str:
    """Return the best network on this machine for pictures of which nothing is known, `otherwise` if there is none."""
    if WEIGHTS.path.is_file():
        return "inception"
    return "imagenet" if pretrained.has_imagenet() else otherwise


def general_features() -> str:
    """Return the network for pictures that none of ours was trained on, whose figures never are FID."""
    return "imagenet" if pretrained.has_imagenet() else "small"


def build_features(
    name: str,
    shape: tuple[int, int, int],
    mode: str = "legacy_tensorflow",
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Features:
    """Return the network `name` for images of `shape` (H, W, C).

    Args:
        name: inception, imagenet, digits, shapes, small, points, timm:NAME, or the path of a TorchScript file ending
            in .pt.
        shape: the images it will see; a network for other images is refused immediately.
        mode: the resizing rule of Inception.
        device: where it runs.
        say: told about downloads and unverified weights.

    Raises:
        UsageError: unknown name or mode.
        DataError: it cannot judge such images, or its file is damaged.
        OfflineError: its weights are not here and cannot be downloaded.
    """
    check_mode(mode)
    check_features(name)
    if name == "inception":
        made = _inception(mode, device, say)
    elif name == "imagenet":
        made = _pretrained(name, pretrained.imagenet(device), device)
    elif name.startswith("timm:"):
        said = name.partition("@")[0]
        made = _pretrained(said, pretrained.timm_network(name, device, say), device)
    elif name in ("digits", "shapes"):
        made = _domain(name, shape)
    elif name == "small":
        made = _small()
    elif name == "points":
        made = Features("points", "points-1", _points, _only_points)
    else:
        made = _script(Path(name), device)
    made.accepts(shape)
    return made


def _inception(mode: str, device: str, say: Callable[[str], None]) -> Features:
    network, digest = load_inception(mode, say)
    network = network.to(device)

    def call(images: Array) -> Batch:
        tensor = torch.from_numpy(tile_channels(images)).to(device).permute(0, 3, 1, 2)
        pool, spatial, probabilities = (None if x is None else x.cpu().numpy() for x in network(tensor))
        assert pool is not None
        return Batch(pool, spatial, probabilities)

    extras = {"weights_sha256": digest, "resize": mode}
    return Features(f"inception ({mode})", f"inception-{mode}-{digest[:16]}", call, _only_images, extras=extras)


def _pretrained(name: str, network: pretrained.Network, device: str) -> Features:
    def call(images: Array) -> Batch:
        return Batch(network.features(images, device))

    extras = {"weights_sha256": network.digest, "resize": network.resize, "network": network.version}
    side = f"{network.side}-pillow" if network.pillow else network.side
    fingerprint = f"{name.replace(':', '-')}-{side}-{network.digest[:16]}"
    return Features(name, fingerprint, call, _only_images, extras=extras)


SMALL_SIDE = 16


def _small() -> Features:
    """Return the network of drawn shapes for pictures of any kind, brought to its size: better than no figures."""
    trained = domain.load_classifier("shapes", SMALL_SIDE)
    size = (SMALL_SIDE, SMALL_SIDE)

    def call(images: Array) -> Batch:
        x = from_uint8(torch.from_numpy(np.ascontiguousarray(tile_channels(images))).permute(0, 3, 1, 2))
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return Batch(domain.extract(trained.model, x)[0])

    extras = {"weights_sha256": trained.digest, "resize": f"{SMALL_SIDE} px, bilinear, antialiased"}
    caveat = (
        f"the small network knows drawn shapes of {SMALL_SIDE} pixels only: its distances are no FID, and see no "
        f"detail. Better features: {install_extra('features')}"
    )
    return Features("small", f"small-{trained.digest[:16]}", call, _only_images, extras=extras, caveat=caveat)


def _domain(name: str, shape: tuple[int, int, int]) -> Features:
    _only_images(shape)
    if shape[0] != shape[1]:
        raise DataError(f"the {name} features are for square images, not {shape[1]} x {shape[0]}.")
    trained = domain.load_classifier(name, shape[0])
    channels = trained.about["channels"]

    def accepts(other: tuple[int, int, int]) -> None:
        if other != (shape[0], shape[0], channels):
            wanted = f"{shape[0]} x {shape[0]} with {channels} channel{'s' if channels > 1 else ''}"
            raise DataError(
                f"the {name} features are for images of {wanted}; these are {_said(other)}.",
                "choose other --features, or bring the images to that size",
            )

    def call(images: Array) -> Batch:
        tensor = from_uint8(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))
        features, probabilities = domain.extract(trained.model, tensor)
        return Batch(features, None, probabilities)

    extras = {"weights_sha256": trained.digest}
    labels, names = tuple(trained.about["labels"]), domain.CLASS_NAMES[name]
    fingerprint = f"{name}-{shape[0]}-{trained.digest[:16]}"
    caveat = (
        f"{name} features are a small network trained on {name} by this project: its distances are no FID, and mean "
        "something only beside others of the same network."
    )
    return Features(name, fingerprint, call, accepts, labels, names, domain=True, extras=extras, caveat=caveat)


def _script(path: Path, device: str) -> Features:
    try:
        module = load_script(path, device)
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"{path} is no TorchScript module.", "write one with torch.jit.script(module).save('features.pt')"
        ) from error
    digest = sha256(path)

    def call(images: Array) -> Batch:
        tensor = torch.from_numpy(tile_channels(images)).to(device).permute(0, 3, 1, 2).contiguous()
        try:
            with torch.inference_mode():
                out = module(tensor)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DataError(f"{path} refuses uint8 images {tuple(tensor.shape)}: {reason}") from error
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(images) or not out.is_floating_point():
            found = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise DataError(
                f"{path} must return floats ({len(images)}, D) for {len(images)} images; it returns {found}."
            )
        return Batch(out.float().cpu().numpy())

    return Features(path.name, f"script-{digest[:32]}", call, _only_images, extras={"weights_sha256": digest})


def _points(batch: Array) -> Batch:
    return Batch(batch.reshape(len(batch), -1).astype(np.float64))


def _only_points(shape: tuple[int, int, int]) -> None:
    if shape[1:] != (1, 1):
        raise DataError(f"the points features are for points in the plane, not for images of {_said(shape)}.")


def _only_images(shape: tuple[int, int, int]) -> None:
    if shape[1:] == (1, 1):
        raise DataError("these samples are points, not images.", "use --features points")


def _said(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[0]} with {shape[2]} channel{'s' if shape[2] > 1 else ''}"
