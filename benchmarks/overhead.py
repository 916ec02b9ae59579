"""Where the processor time of a training step goes: everything except the networks must stay under a tenth."""

from __future__ import annotations

import argparse
import json
import time

import torch

from cmtool.config.load import resolve
from cmtool.data.load import load_dataset
from cmtool.training.bench import PARTS, overhead, profile
from cmtool.training.setup import prepare


def measure(preset: str, recipe: str, steps: int) -> dict[str, float]:
    """Milliseconds of processor time by part, and the share spent outside the networks."""
    config = resolve(preset, recipe=recipe).config
    parts = profile(prepare(config, load_dataset(config.data), torch.device("cpu")), steps, time.process_time)
    return {**{name: 1e3 * value for name, value in parts.items()}, "overhead": overhead(parts)}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one table."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--preset", default="digits")
    made.add_argument("--recipes", default="ict-pm,ict,edm")
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", action="store_true")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    rows = {recipe: measure(asked.preset, recipe, asked.steps) for recipe in asked.recipes.split(",")}
    if asked.json:
        print(json.dumps(rows, indent=2))
        return
    print("| recipe | " + " | ".join((*PARTS, "overhead")) + " |")
    print("|---" * (len(PARTS) + 2) + "|")
    for recipe, row in rows.items():
        cells = [f"{row[part]:.2f}" for part in PARTS]
        print(f"| {recipe} | {' | '.join(cells)} | {100 * row['overhead']:.1f} % |")


if __name__ == "__main__":
    main()
