"""What augmentation buys with few pictures: teachers on some avatars with and without it, judged on unseen faces.

    python benchmarks/little_data.py --out runs/little [--images 500] [--steps 3600] [--p 0 0.12] [--seeds 0]
        [--num 2000] [--features shapes] [--recipe edm]

One row a run: the Frechet distance, precision and recall of its samples against 2,000 held-out faces, and copies:
the share of samples that lie nearer to a face of the training set than to any of as many held-out faces. Chance is one
half; other held-out faces in place of samples show what chance gives. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import cmtool
from cmtool.config.schema import DataConfig
from cmtool.data import from_uint8
from cmtool.data.load import load_dataset


def faces(kind: str) -> Tensor:
    """All faces of a part of the data set, flat and in [-1, 1]."""
    data = load_dataset(DataConfig(source="avatars", resolution=16, channels=3, kind=kind))
    return from_uint8(data.images).flatten(1)


def copies(samples: Tensor, trained: Tensor, held_out: Tensor) -> float:
    """Share of samples (N, D) nearer to one of `trained` than to any of `held_out`; both hold as many images."""
    nearest = [torch.cdist(samples, images).amin(1) for images in (trained, held_out)]
    return float((nearest[0] < nearest[1]).double().mean())


def row(out: Path, recipe: str, images: int, steps: int, p: float, seed: int, num: int, features: str) -> str:
    """Train one model, or take it as it is, and return its row."""
    settings = {"data.size": images, "recipe.augment.p": p, "train.sample_every": steps}
    run = cmtool.train(
        preset="avatars", recipe=recipe, steps=steps, seed=seed, settings=settings, out=out / f"{recipe}-{p:g}-{seed}"
    )
    assert run.model is not None
    model = cmtool.load(run.model, "cpu")
    samples = model.sample(num, seed=1, batch_size=250)
    figures = cmtool.evaluate(samples, "avatars", features=features, metrics=("fid", "pr"), device="cpu")
    trained, held_out = faces("train")[:images], faces("heldout")[:images]
    share = copies(samples.flatten(1), trained, held_out)
    found = [f"{figures[name]:.3g}" for name in ("fid", "precision", "recall")]
    return " | ".join(["", f"{p:g}", str(seed), *found, f"{share:.3f}", ""])


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--recipe", default="edm")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--p", type=float, nargs="+", default=[0.0, 0.12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num", type=int, default=2000, help="samples")
    parser.add_argument("--features", default="shapes")
    given = parser.parse_args()
    held_out = faces("heldout")
    chance = copies(held_out[given.images :], faces("train")[: given.images], held_out[: given.images])
    print(f"{given.images} faces, {given.recipe}, {given.steps} steps; copies by chance {chance:.3f}\n")
    print("| p | seed | FD | precision | recall | copies |\n| --- | --- | --- | --- | --- | --- |")
    for seed in given.seeds:
        for p in given.p:
            asked = (given.out, given.recipe, given.images, given.steps, p, seed, given.num, given.features)
            print(row(*asked).strip(), flush=True)


if __name__ == "__main__":
    main()
