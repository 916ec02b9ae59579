"""Small feature networks for the built-in data sets, which Inception was not trained for.

A classifier of three convolutions is trained on the real images themselves (`train_classifier`); the 64 activations
before its last layer are the features. Distances in these features belong to that one network: they cannot be compared
with an Inception FID, and they are never printed without the network's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cmtool.data.shapes import SHAPES
from cmtool.errors import DataError
from cmtool.evaluation.statistics import Array
from cmtool.files.atomic import atomic_write
from cmtool.machine.device import one_thread

FEATURES = 64
# What the labels of each data set's network mean.
CLASS_NAMES = {"digits": tuple("0123456789"), "shapes": SHAPES}


class Classifier(nn.Module):
    """Three convolutions (32, 64, 64 channels, strides 1, 2, 2), a 2 x 2 mean pool, 64 ReLU features, logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 4, FEATURES)
        self.logits = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, C, H, W) in [-1, 1]."""
        x = images
        for conv in (self.conv1, self.conv2, self.conv3):
            x = conv(x).relu()
        return self.hidden(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, classes) of images (B, C, H, W) in [-1, 1]."""
        return self.logits(self.features(images))


def train_classifier(images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> Classifier:
    """Train on images (N, C, H, W) in [-1, 1] with labels (N,): Adam 2e-3, batches of 32; 3 s for 1,797 digits."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], int(labels.max()) + 1)
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=order).split(32):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def extract(model: Classifier, images: Tensor) -> tuple[Array, Array]:
    """Return float64 features (N, 64) and class probabilities (N, classes) of images (N, C, H, W) in [-1, 1]."""
    parts = [model.features(batch) for batch in images.split(512)]
    features = torch.cat(parts)
    return features.double().numpy(), model.logits(features).double().softmax(dim=1).numpy()


def class_agreement(probabilities: Array, labels: Array, class_labels: Sequence[int]) -> dict[str, float]:
    """Return, for each label, the share of samples that a network recognizes as what they were made for.

    Args:
        probabilities: (N, classes) of the network.
        labels: (N,) labels that the samples were made for.
        class_labels: the label that each of the network's classes belongs to.
    """
    groups = np.asarray(class_labels)
    by_label = np.stack([probabilities[:, groups == label].sum(axis=1) for label in range(groups.max() + 1)], axis=1)
    right = by_label.argmax(axis=1) == labels
    return {str(label): float(right[labels == label].mean()) for label in np.unique(labels)}


@dataclass(frozen=True)
class Trained:
    """A shipped network: the classifier, what its file says about it, and the SHA-256 of the file."""

    model: Classifier
    about: dict[str, Any]
    digest: str


def weights_path(data: str, resolution: int) -> Path:
    """Return the path of the shipped weights for a data set at a resolution."""
    return Path(__file__).parent / "weights" / f"{data}-{resolution}.safetensors"


def shipped_resolutions(data: str) -> list[int]:
    """Return the resolutions that a data set's features are shipped for, ascending."""
    return sorted(
        int(path.stem.rsplit("-", 1)[1]) for path in weights_path(data, 0).parent.glob(f"{data}-*.safetensors")
    )


def save_classifier(model: Classifier, path: Path, about: dict[str, Any]) -> None:
    """Write weights and the facts recorded about them."""
    with atomic_write(path) as temporary:
        save_file(model.state_dict(), str(temporary), metadata={"about": json.dumps(about, sort_keys=True)})


def load_classifier(data: str, resolution: int) -> Trained:
    """Load shipped weights.

    Raises:
        DataError: none are shipped for this resolution, or the file is damaged.
    """
    path = weights_path(data, resolution)
    if not path.is_file():
        known = ", ".join(f"{side} x {side}" for side in shipped_resolutions(data))
        raise DataError(
            f"the {data} features are for images of {known} pixels, not {resolution} x {resolution}.",
            "use --features inception, or a TorchScript module of your own (--features FILE.pt)",
        )
    try:
        with safe_open(path, framework="pt") as archive:
            about = json.loads(archive.metadata()["about"])
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        model = Classifier(about["channels"], about["classes"])
        model.load_state_dict(tensors)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"the feature weights {path} are damaged: {error}.", "reinstall cmtool") from error
    return Trained(model.eval().requires_grad_(False), about, hashlib.sha256(path.read_bytes()).hexdigest())
