"""Do the shares of classes survive training? Recipes train on imbalanced data without labels; samples are classified.

    python benchmarks/class_shares.py --out runs/shares [--recipes ct ict ict-pm cd] [--seeds 3] [--steps 2000]
        [--teacher-steps 2000] [--set network.channels=16]
    python benchmarks/class_shares.py --out runs/shares --preset toy2d

The training images of class k are thinned to a share in proportion to 2^-k, and the network is not told the class: it
has to get the shares right itself. Consistency training with a distance that is not quadratic follows the median
instead of the mean flow and sends too little to rare modes: of two points with shares .3 and .7 the rare one keeps .096
(l1, exact), and a pseudo-Huber distance lies between that and l2. Shapes are told apart by the classifier of
`digits_quality.py`, points by the nearest of the eight modes. The table shows the total variation between the shares of
the generated and of the training images, and the share of the rarer half of the classes. The finite number of samples
and the classifier's own mistakes keep the total variation above the floor given below the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import trial as trials
from digits_quality import lesson, measured

from cmtool.config.load import resolve
from cmtool.data.dataset import Dataset
from cmtool.data.load import load_dataset
from cmtool.data.toy import RING_RADIUS
from cmtool.evaluation import domain
from cmtool.models import load
from cmtool.samplers.generate import generate
from cmtool.training.setup import prepare

# A network that is told the class samples every class equally often, so there would be no shares to measure.
UNLABELED = "data.labels=false"
MODES = 8


def thinned(preset: str) -> Dataset:
    """Keep every image of class 0, half of class 1, a quarter of class 2, ..., without labels."""
    config = resolve(preset, recipe="edm", sets=("data.labels=true",)).config
    labeled = load_dataset(config.data)
    assert labeled.labels is not None
    keep = torch.rand(len(labeled), generator=torch.Generator().manual_seed(0)) < 0.5 ** labeled.labels.double()
    plain = load_dataset(config.data.model_copy(update={"labels": False}))
    return plain.subset(keep.nonzero().flatten())


def classes_of(images: torch.Tensor, preset: str) -> np.ndarray:
    """Classes (N,) of images in [-1, 1] or of points: by the trained classifier, or by the nearest mode."""
    if preset == "toy2d":
        angle = torch.arange(MODES) * (2 * torch.pi / MODES)
        modes = RING_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
        return torch.cdist(images.flatten(1), modes).argmin(1).numpy()
    model, _ = measured(preset)
    chosen = domain.extract(model, images.clamp(-1, 1))[1].argmax(1)
    return np.asarray(lesson(preset).labels)[chosen]


def shares(images: torch.Tensor, preset: str) -> np.ndarray:
    """Share of each class among images or points."""
    kinds = classes_of(images, preset)
    count = MODES if preset == "toy2d" else max(lesson(preset).labels) + 1
    return np.bincount(kinds, minlength=count) / len(kinds)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation between two lists of shares."""
    return float(np.abs(one - other).sum() / 2)


def rare(found: np.ndarray) -> float:
    """Share of the rarer half of the classes: the later ones."""
    return float(found[(len(found) + 1) // 2 :].sum())


def run(recipe: str, seed: int, args: argparse.Namespace, source: Path | None) -> Path:
    """Train a recipe on the thinned images and return its model file."""
    steps = args.teacher_steps if source is None and recipe == "edm" else args.steps
    path = args.out / f"{trials.file_name(args.preset, recipe, seed, steps, *args.sets)}.safetensors"
    if not path.is_file():
        config = trials.Trial(args.preset, recipe, seed, (UNLABELED, *args.sets), source).config(steps)
        trainer = prepare(config, thinned(args.preset), trials.CPU)
        while trainer.state.step < steps:
            trainer.step()
        trainer.state.export(path)
    return path


def row(recipe: str, wanted: np.ndarray, args: argparse.Namespace) -> str:
    """Train and judge a recipe for every seed; return its line of the table."""
    wrong: dict[int, list[float]] = {1: [], 2: []}
    small: list[float] = []
    for seed in range(args.seeds):
        source = run("edm", seed, args, None) if trials.needs(args.preset, recipe) != "nothing" else None
        model = load(run(recipe, seed, args, source))
        for nfe, errors in wrong.items():
            made = generate(model, trials.plan_for(model, nfe), range(args.samples), batch_size=512)
            found = shares(torch.cat([batch.x0 for batch in made]), args.preset)
            errors.append(100 * apart(found, wanted))
            if nfe == 1:
                small.append(100 * rare(found))
    return f"| {recipe} | {trials.spread(wrong[1])} | {trials.spread(wrong[2])} | {trials.spread(small)} |"


def main() -> None:
    """Train, classify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("shapes", "toy2d"), default="shapes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=["ct", "ict", "ict-pm", "ict-cauchy", "cd", "icd"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=4000)
    trials.add_sets(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    data = thinned(args.preset)
    images = data.batch(torch.arange(len(data)))[0]
    wanted = shares(images, args.preset)
    half = apart(shares(images[::2], args.preset), shares(images[1::2], args.preset))
    print("| recipe | share error in %, 1 step | 2 steps | rarer half in %, 1 step |\n| --- | --- | --- | --- |")
    for recipe in args.recipes:
        print(row(recipe, wanted, args), flush=True)
    print(f"\n{len(images)} training images of shares {np.round(wanted, 3).tolist()}, of which the rarer half")
    print(f"{100 * rare(wanted):.1f} %; halves of the images differ by {100 * half:.1f} %.")


if __name__ == "__main__":
    main()
