"""Small feature networks for the built-in data sets, which Inception knows nothing about.

A classifier of three convolutions is trained on the real images themselves (`train_classifier`); the 64 activations
before its last layer are the features. Distances measured with them are distances of that one network: their
size means nothing beside an Inception FID, and they are never printed without the name of the network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cmtool.evaluation.statistics import Array

EPOCHS = {"digits": 6, "shapes": 8}
FEATURES = 64


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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sum in one order: the trained weights then do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
def extract(model: Classifier, images: Tensor, batch_size: int = 512) -> tuple[Array, Array]:
    """Features (N, 64) and class probabilities (N, classes), both float64 arrays, of images (N, C, H, W) in [-1, 1]."""
    parts = [model.features(batch) for batch in images.split(batch_size)]
    features = torch.cat(parts)
    return features.double().numpy(), model.logits(features).double().softmax(dim=1).numpy()
