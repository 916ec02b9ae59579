"""Train the feature networks that are shipped with the package, from the built-in data and a fixed seed.

    python -m cmtool.evaluation.train_features [digits-8 shapes-16 ...]

writes `weights/NAME.safetensors`. The classes of digits are the ten digits. Those of shapes are all pairs of shape and
color, because a network that only has to tell shapes apart would not see colors and could not judge them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmtool.config.schema import DataConfig
from cmtool.data import from_uint8, load_dataset
from cmtool.data.shapes import COLORS, SHAPES, shapes_attributes
from cmtool.evaluation import domain

SHAPES_COUNT = 5000


class Lesson(NamedTuple):
    """What a network is trained on: images in [-1, 1], their classes, passes over the data, and each class's label."""

    images: Tensor
    classes: Tensor
    epochs: int
    labels: list[int]


def digits_lesson(resolution: int = 8) -> Lesson:
    """All 1,797 digits in scikit-learn's own 17 levels (v / 8 - 1, before any rounding to bytes); class = label."""
    from sklearn.datasets import load_digits

    table = load_digits()
    images = torch.from_numpy(table.images / 8 - 1).float()[:, None]
    if resolution != images.shape[-1]:
        raise ValueError(f"the digits' network is for 8 pixels, not {resolution}")
    return Lesson(images, torch.from_numpy(table.target).long(), 6, list(range(10)))


def shapes_lesson(resolution: int = 16) -> Lesson:
    """The first 5,000 shapes; class = shape x color."""
    data = load_dataset(DataConfig(source="shapes", resolution=resolution, channels=3, labels=True, size=SHAPES_COUNT))
    assert data.labels is not None
    colors = list(COLORS)
    shades = torch.tensor([colors.index(shapes_attributes(index).color) for index in range(len(data))])
    labels = [shape for shape in range(len(SHAPES)) for _ in colors]
    # Large pictures are learned in fewer passes, and each pass takes longer.
    return Lesson(from_uint8(data.images), data.labels * len(colors) + shades, 8 if resolution <= 16 else 3, labels)


LESSONS = {"digits": digits_lesson, "shapes": shapes_lesson}
SHIPPED = ("digits-8", "shapes-16", "shapes-64")


def train(name: str, seed: int = 0) -> tuple[domain.Classifier, dict[str, Any]]:
    """Train the network NAME ("digits-8") and return it with the facts recorded about it."""
    data, resolution = name.rsplit("-", 1)
    lesson = LESSONS[data](int(resolution))
    model = domain.train_classifier(lesson.images, lesson.classes, lesson.epochs, seed)
    _, probabilities = domain.extract(model, lesson.images)
    accuracy = float((torch.from_numpy(probabilities).argmax(dim=1) == lesson.classes).double().mean())
    about = {
        "data": data,
        "resolution": int(resolution),
        "channels": lesson.images.shape[1],
        "classes": len(lesson.labels),
        "labels": lesson.labels,
        "images": len(lesson.images),
        "epochs": lesson.epochs,
        "seed": seed,
        "train_accuracy": round(accuracy, 4),
    }
    return model, about


def main(names: list[str], folder: Path | None = None) -> None:
    """Train and write the named networks, or all that are shipped."""
    for name in names or SHIPPED:
        model, about = train(name)
        data, resolution = name.rsplit("-", 1)
        path = domain.weights_path(data, int(resolution))
        domain.save_classifier(model, folder / path.name if folder else path, about)
        print(f"{path.name}: training accuracy {about['train_accuracy']}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
