"""Do the shares of classes survive training? Recipes on an imbalanced `shapes`, judged by a classifier.

    python benchmarks/class_shares.py --out runs/shares [--recipes ct ict ict-pm cd] [--seeds 3] [--steps 2000]
        [--set network.channels=16]

The training images of class k are thinned to a share in proportion to 2^-k. Consistency training with a distance that
is not quadratic follows the median instead of the mean flow and sends too little to rare modes: of two points with
shares .3 and .7 the rare one keeps .096 (l1, exact), and a pseudo-Huber distance lies between that and l2. The table
shows the total variation between the shares of the generated and of the training images, which the finite number of
samples and the classifier's own mistakes keep above the floor given below it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trial as trials
from digits_quality import lesson, measured

from cmtool.data.load import load_dataset
from cmtool.evaluation import domain
from cmtool.models import load
from cmtool.samplers.generate import generate
from cmtool.training.setup import prepare

PRESET = "shapes"


class Thinned:
    """A data set of which only some indices are seen."""

    def __init__(self, whole: Any, keep: torch.Tensor) -> None:
        self.whole, self.keep = whole, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __len__(self) -> int:
        return len(self.keep)

    def batch(self, indices: torch.Tensor) -> Any:
        """Return images and labels of `indices` among the kept ones."""
        return self.whole.batch(self.keep[indices])


def thinned(whole: Any) -> Thinned:
    """Keep every image of class 0, half of class 1, a quarter of class 2, ..."""
    labels = whole.batch(torch.arange(len(whole)))[1]
    keep = torch.rand(len(whole), generator=torch.Generator().manual_seed(0)) < 0.5 ** labels.double()
    return Thinned(whole, keep.nonzero().flatten())


def shares(images: torch.Tensor) -> np.ndarray:
    """Shares of the classifier's classes (shape and color) among images, summed to shapes."""
    model, _ = measured(PRESET)
    chosen = domain.extract(model, images.clamp(-1, 1))[1].argmax(1)
    kinds = np.asarray(lesson(PRESET).labels)[chosen]
    return np.bincount(kinds, minlength=kinds.max() + 1) / len(kinds)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation between two lists of shares; a class that one lacks counts as zero."""
    size = max(len(one), len(other))
    return float(np.abs(np.pad(one, (0, size - len(one))) - np.pad(other, (0, size - len(other)))).sum() / 2)


def run(recipe: str, seed: int, args: argparse.Namespace, source: Path | None) -> Path:
    """Train a recipe on the thinned images and return its model file."""
    path = args.out / f"{trials.file_name(recipe, seed, args.steps, *args.sets)}.safetensors"
    if not path.is_file():
        config = trials.Trial(PRESET, recipe, seed, tuple(args.sets), source).config(args.steps)
        trainer = prepare(config, thinned(load_dataset(config.data)), trials.CPU)
        trainer.run_to(args.steps)
        trainer.state.export(path)
    return path


def main() -> None:
    """Train, classify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=["ct", "ict", "ict-pm", "ict-cauchy", "cd"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    trials.add_sets(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    config = trials.Trial(PRESET, "edm", 0).config(1)
    data = thinned(load_dataset(config.data))
    images = data.batch(torch.arange(len(data)))[0]
    wanted = shares(images)
    half = apart(shares(images[::2]), shares(images[1::2]))
    print("| recipe | share error, 1 step | 2 steps |\n| --- | --- | --- |")
    for recipe in args.recipes:
        found: dict[int, list[float]] = {1: [], 2: []}
        for seed in range(args.seeds):
            needs = trials.needs(PRESET, recipe)
            source = run("edm", seed, args, None) if needs != "nothing" else None
            model = load(run(recipe, seed, args, source))
            for nfe, errors in found.items():
                made = generate(model, trials.plan_for(model, nfe), range(trials.SAMPLES), batch_size=256)
                errors.append(100 * apart(shares(torch.cat([batch.x0 for batch in made])), wanted))
        print(f"| {recipe} | {trials.spread(found[1])} % | {trials.spread(found[2])} % |", flush=True)
    print(
        f"\nTraining shares {np.round(wanted, 3).tolist()}; halves of the training images differ by {100 * half:.1f} %."
    )


if __name__ == "__main__":
    main()
