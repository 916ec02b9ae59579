"""All recipes at an equal budget of network evaluations: one table of 1- and 2-step quality with error bars.

    python benchmarks/recipe_shootout.py --out runs/shootout [--preset digits] [--seeds 5] [--budget 600]
    python benchmarks/recipe_shootout.py --out runs/shootout --table

The budget is in thousands of forward passes of one image and pays for everything: a recipe that starts from a teacher
or from a consistency model gets what training that left over (half of the budget). Costs are counted operations, so
that a backward pass, a second network or a forward-mode derivative weigh what they cost. Rows go to results.jsonl;
the same command goes on where it was cut off.

What it says: which recipe to take at this size and budget. What it does not say: which wins on large images with a
thousand times the budget; several were made for that. `pd` and `kd` are trained for one step alone, and their figures
for two say no more than that. Distances below 6 to 7 cannot be told from real data on digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import trial as trials

from cmtool.config.load import read_preset
from cmtool.config.methods import METHODS

SOURCE_SHARE = 0.5
NFE = (1, 2)


def source_for(preset: str, recipe: str, seed: int, budget: float, out: Path) -> Path | None:
    """Train (once a seed) what the recipe starts from with its share of the budget, and return it."""
    needs = trials.needs(preset, recipe)
    if needs == "nothing":
        return None
    first = trials.Trial(preset, "ict" if needs == "consistency_init" else "edm", seed)
    steps = int(budget * SOURCE_SHARE / trials.evaluations_per_step(first))
    return trials.train(first, max(steps, 2), out / f"source-{first.recipe}-{seed}.safetensors")


def run(preset: str, recipe: str, seed: int, budget: float, out: Path) -> dict[str, object]:
    """Train one recipe with what is left of the budget and judge it."""
    source = source_for(preset, recipe, seed, budget, out)
    entry = trials.Trial(preset, recipe, seed, source=source)
    left = budget * (1 - SOURCE_SHARE) if source else budget
    cost = trials.evaluations_per_step(entry)
    steps = max(int(left / cost), 2)
    path = trials.train(entry, steps, out / f"{recipe}-{seed}.safetensors")
    row: dict[str, object] = {"recipe": recipe, "seed": seed, "steps": steps, "cost": round(cost, 1), "budget": budget}
    for nfe in NFE:
        row[f"nfe{nfe}"] = trials.quality(path, nfe, preset)
    return row


def table(rows: list[dict], budget: float) -> str:
    """Return the rows as a table of Markdown, best one-step distance first."""
    recipes = sorted({row["recipe"] for row in rows}, key=lambda name: _mean(rows, name))
    lines = [
        f"Budget: {budget / 1000:g} thousand forward passes of one image; mean ± standard deviation over seeds.",
        "",
        "| recipe | seeds | steps | FD, 1 step | P | R | FD, 2 steps | P | R |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in recipes:
        own = [row for row in rows if row["recipe"] == name]
        cells = [name, str(len(own)), str(own[0]["steps"])]
        for nfe in NFE:
            cells.append(trials.spread([row[f"nfe{nfe}"]["fd"] for row in own]))
            cells += [f"{sum(row[f'nfe{nfe}'][key] for row in own) / len(own):.2f}" for key in ("precision", "recall")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(rows: list[dict], name: str) -> float:
    values = [row["nfe1"]["fd"] for row in rows if row["recipe"] == name]
    return sum(values) / len(values)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=("digits", "shapes"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=600, help="thousands of forward passes of one image")
    parser.add_argument("--recipes", nargs="*", help="default: all but the teachers")
    parser.add_argument("--table", action="store_true", help="print what is there and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results, budget = args.out / "results.jsonl", args.budget * 1000
    recipes = args.recipes or [name for name in METHODS if METHODS[name]["family"] != "edm"]
    unknown = set(recipes) - set(read_preset(args.preset).fitting(None))
    if unknown:
        parser.error(f"unknown recipes: {', '.join(sorted(unknown))}")
    if not args.table:
        for seed in range(args.seeds):
            for recipe in recipes:
                done = {(row["recipe"], row["seed"]) for row in trials.rows_of(results) if row["budget"] == budget}
                if (recipe, seed) not in done:
                    trials.append(results, run(args.preset, recipe, seed, budget, args.out))
    rows = [row for row in trials.rows_of(results) if row["budget"] == budget]
    print(table(rows, budget) if rows else "nothing has been measured yet")


if __name__ == "__main__":
    main()
