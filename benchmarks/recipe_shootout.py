"""All recipes at an equal budget of network evaluations: one table of 1- and 2-step quality with error bars.

    python benchmarks/recipe_shootout.py --out runs/shootout [--preset digits] [--seeds 5] [--budget 600]
    python benchmarks/recipe_shootout.py --out runs/shootout --set network.channels=16 --budget 300
    python benchmarks/recipe_shootout.py --out runs/shootout --table

The budget is in thousands of forward passes of one image and pays for everything: a recipe that starts from a teacher
or a consistency model gets what training that model left over (half of the budget), and one that learns from stored
pairs spends half of its own budget on them. Costs are counted operations, so a backward pass, a second network or a
forward-mode derivative counts for what it costs. `--set` changes the preset for every run, including sources. Rows go
to results.jsonl; the same command continues where it was cut off.

The result says which recipe to take at this size and budget. It does not say which wins on large images with a thousand
times the budget; several were made for that. `pd` and `kd` are trained for only one step, and their figures for two
steps say no more than that. Distances below 6 to 7 cannot be told from real data on digits;
on toy2d the distance is W1 of points in thousandths.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import trial as trials

from cmtool.config.load import read_preset
from cmtool.config.methods import METHODS

SOURCE_SHARE = 0.5
PAIR_SHARE = 0.5
NFE = (1, 2)
# The first is below the second with this many evaluations, as published or as one would expect.
FINDINGS = (
    ("cd", "cd-euler", 1, "Song et al. 2023: a second-order solver"),
    ("cd-2m", "cd-euler", 1, "no order published: four steps in a pair"),
    ("cd", "cd-l1", 1, "no order published"),
    ("cd", "pd", 1, "Song et al. 2023: above progressive distillation"),
    ("cd", "kd", 1, "Song et al. 2023: above knowledge distillation"),
    ("cd", "ct", 1, "Song et al. 2023: distillation above training"),
    ("cd-inf", "cd-inf-full", 1, "Song et al. 2023: stop-gradient in continuous time"),
    ("ict", "ct", 1, "Song & Dhariwal 2024"),
    ("ict-ot", "ict", 1, "Pooladian et al. 2023"),
    ("ict-gc", "ict", 1, "Issenhuth et al. 2025"),
    ("ict-gc", "ict-ot", 1, "Issenhuth et al. 2025"),
    ("ect-gc", "ect", 1, "Issenhuth et al. 2025"),
    ("ict-pm", "ict", 1, "variance-reduced targets (SCT)"),
    ("ect", "ict", 1, "Geng et al. 2025: from diffusion weights"),
    ("sct", "ect", 1, "Lu & Song 2025"),
    ("sct", "ct-inf", 1, "Lu & Song 2025: what makes continuous time stable"),
    ("scd", "cd-inf", 1, "Lu & Song 2025: what makes continuous time stable"),
    ("tcm", "ict", 1, "Lee et al. 2025: a second stage"),
    ("icd", "cd", 1, "no order published: iCT's parts in distillation"),
)


@dataclass
class Contest:
    """What all runs share; `out` holds only models of this budget and these changes. `costs` fills as it goes."""

    preset: str
    budget: float
    sets: tuple[str, ...]
    out: Path
    costs: dict[str, float] = field(default_factory=dict)

    def cost(self, entry: trials.Trial) -> float:
        """Return the cost of a step, counted once per recipe: it is the same for all seeds."""
        if entry.recipe not in self.costs:
            few = replace(entry, sets=(*entry.sets, "recipe.coupling.pairs=64")) if stores_pairs(entry) else entry
            self.costs[entry.recipe] = trials.evaluations_per_step(few)
        return self.costs[entry.recipe]

    @property
    def marks(self) -> dict[str, object]:
        """Return what tells the rows of this contest from others in the same file."""
        return {"preset": self.preset, "budget": self.budget, "sets": list(self.sets)}


def stores_pairs(entry: trials.Trial) -> bool:
    """Return whether a recipe learns from pairs that its teacher makes beforehand."""
    return entry.config(1).recipe.coupling.kind == "teacher"


def source_for(contest: Contest, recipe: str, seed: int) -> Path | None:
    """Train (once per seed) the model that the recipe starts from with its share of the budget, and return it."""
    needs = trials.needs(contest.preset, recipe)
    if needs == "nothing":
        return None
    first = trials.Trial(contest.preset, "ict" if needs == "consistency_init" else "edm", seed, contest.sets)
    steps = int(contest.budget * SOURCE_SHARE / contest.cost(first))
    return trials.train(first, max(steps, 2), contest.out / f"source-{first.recipe}-{seed}.safetensors")


def run(contest: Contest, recipe: str, seed: int) -> dict[str, object]:
    """Train one recipe with what is left of the budget and judge it."""
    source = source_for(contest, recipe, seed)
    entry = trials.Trial(contest.preset, recipe, seed, contest.sets, source)
    left = contest.budget * (1 - SOURCE_SHARE) if source else contest.budget
    cost = contest.cost(entry)
    if stores_pairs(entry):
        recipe_of = entry.config(1).recipe
        calls = recipe_of.curriculum.s1 if recipe_of.coupling.path else 2 * recipe_of.coupling.solver_steps - 1
        pairs = max(int(left * PAIR_SHARE / calls), 1)
        entry, left = replace(entry, sets=(*entry.sets, f"recipe.coupling.pairs={pairs}")), left - pairs * calls
    steps = max(int(left / cost), 2)
    started = time.monotonic()
    path = trials.train(entry, steps, contest.out / f"{recipe}-{seed}.safetensors")
    row: dict[str, object] = {**contest.marks, "recipe": recipe, "seed": seed, "steps": steps, "cost": round(cost, 1)}
    row["seconds"] = round(time.monotonic() - started, 1)
    for nfe in NFE:
        row[f"nfe{nfe}"] = trials.quality(path, nfe, contest.preset)
    return row


def table(rows: list[dict], contest: Contest) -> str:
    """Return the rows as a table of Markdown, best one-step distance first."""
    recipes = sorted({row["recipe"] for row in rows}, key=lambda name: _mean(rows, name))
    measure = trials.MEASURES[contest.preset]
    lines = [
        f"{contest.preset} {' '.join(contest.sets)}; budget {contest.budget / 1000:g} thousand forward passes of one "
        "image; mean ± standard deviation over seeds.",
        "",
        f"| recipe | seeds | steps | {measure}, 1 step | P | R | {measure}, 2 steps | P | R |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in recipes:
        own = [row for row in rows if row["recipe"] == name]
        cells = [name, str(len(own)), str(own[0]["steps"])]
        for nfe in NFE:
            cells.append(trials.spread([row[f"nfe{nfe}"]["distance"] for row in own]))
            cells += [f"{sum(row[f'nfe{nfe}'][key] for row in own) / len(own):.2f}" for key in ("precision", "recall")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def findings(rows: list[dict], measure: str) -> str:
    """Return a table of orders between two recipes and whether they hold here."""
    lines = [f"| better | worse | steps | {measure}, worse - better | from |", "| --- | --- | --- | --- | --- |"]
    for better, worse, nfe, source in FINDINGS:
        by_seed = [
            {row["seed"]: row[f"nfe{nfe}"]["distance"] for row in rows if row["recipe"] == name}
            for name in (better, worse)
        ]
        both = sorted(by_seed[0].keys() & by_seed[1].keys())
        if both:
            said = trials.verdict(*([found[seed] for seed in both] for found in by_seed))
            lines.append(f"| {better} | {worse} | {nfe} | {said} | {source} |")
    return "\n".join(lines)


def _mean(rows: list[dict], name: str) -> float:
    values = [row["nfe1"]["distance"] for row in rows if row["recipe"] == name]
    return sum(values) / len(values)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=tuple(trials.MEASURES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=600, help="thousands of forward passes of one image")
    parser.add_argument("--recipes", nargs="*", help="default: all, the teachers too")
    parser.add_argument("--table", action="store_true", help="print what is there and train nothing")
    trials.add_sets(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = trials.file_name(args.preset, f"{args.budget:g}k", *args.sets)
    contest = Contest(args.preset, args.budget * 1000, tuple(args.sets), args.out / name)
    contest.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    recipes = args.recipes or list(METHODS)
    unknown = set(recipes) - set(read_preset(args.preset).fitting(None))
    if unknown:
        parser.error(f"unknown recipes: {', '.join(sorted(unknown))}")
    if not args.table:
        for seed, recipe in itertools.product(range(args.seeds), recipes):
            place = {**contest.marks, "recipe": recipe, "seed": seed}
            if not any(place.items() <= row.items() for row in trials.rows_of(results)):
                trials.append(results, run(contest, recipe, seed))
    rows = [row for row in trials.rows_of(results) if contest.marks.items() <= row.items()]
    print(table(rows, contest) if rows else "nothing has been measured yet")
    if rows:
        print("\n" + findings(rows, trials.MEASURES[contest.preset]))


if __name__ == "__main__":
    main()
