"""The ablations of the consistency-models paper at small scale, and which of its findings hold there.

    python benchmarks/ablations.py --out runs/ablations [--seeds 3] [--steps 2000] [--teacher-steps 2500]
    python benchmarks/ablations.py --out runs/ablations --only solver distance
    python benchmarks/ablations.py --out runs/ablations --set network.channels=16 --steps 500

Distillation runs share one teacher per seed and one number of steps. `--set` changes the preset for every run,
including teachers. A finding holds if the mean difference over seeds has the published sign and its 95 % interval (see
`trial.verdict`) excludes zero; it is open otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import trial as trials

from cmtool.losses.perceptual import backbone_path


@dataclass(frozen=True)
class Arm:
    """One setting of an ablation: its name, recipe, changes, and the evaluations that it is judged with.

    `tuned`: starts from the teacher's weights although its recipe does not require it.
    """

    name: str
    recipe: str
    sets: tuple[str, ...] = ()
    nfe: tuple[int, ...] = (1,)
    tuned: bool = False


@dataclass(frozen=True)
class Ablation:
    """Arms, and published findings as pairs (better, worse) of arm names, `@k` for k evaluations."""

    title: str
    arms: tuple[Arm, ...]
    findings: tuple[tuple[str, str], ...]


def distances() -> Ablation:
    """L1, l2 and LPIPS; the last only if its backbone is on disk."""
    kinds = ["l1", "l2", "pseudo_huber"] + (["lpips"] if backbone_path().is_file() else [])
    arms = tuple(Arm(kind, "cd", (f'recipe.distance.kind="{kind}"',)) for kind in kinds)
    return Ablation("distance of distillation", arms, (("lpips", "l2"), ("lpips", "l1")) if "lpips" in kinds else ())


SIZES = (9, 12, 18, 36, 60, 80, 120)
FIXED = ('recipe.curriculum.scales="fixed"', "recipe.target.adaptive=false")
LONG = (*FIXED, "recipe.curriculum.s1=120", "recipe.target.ema=0.99")
ABLATIONS = {
    "distance": distances(),
    "solver": Ablation(
        "solver of the teacher's step",
        (
            Arm("heun", "cd"),
            Arm("euler", "cd-euler"),
            Arm("2m", "cd-2m"),
            Arm("euler, twice", "cd-euler", ("recipe.direction.substeps=2",)),
        ),
        (("heun", "euler"),),
    ),
    "levels": Ablation(
        "number of levels N of distillation",
        tuple(Arm(f"N={n}", "cd", (f"recipe.curriculum.s1={n}",)) for n in SIZES),
        (("N=18", "N=9"),),
    ),
    "schedule": Ablation(
        "fixed and adaptive N and mu of consistency training",
        (
            Arm("adaptive", "ct"),
            Arm("N=10, mu=.9", "ct", (*FIXED, "recipe.curriculum.s1=10", "recipe.target.ema=0.9")),
            Arm("N=40, mu=.99", "ct", (*FIXED, "recipe.curriculum.s1=40", "recipe.target.ema=0.99")),
            Arm("N=120, mu=.99", "ct", LONG),
        ),
        (("adaptive", "N=10, mu=.9"), ("adaptive", "N=120, mu=.99")),
    ),
    "time": Ablation(
        "discrete and continuous time",
        (
            Arm("cd", "cd"),
            Arm("cd-inf", "cd-inf"),
            Arm("cd-inf-full", "cd-inf-full"),
            Arm("scd", "scd"),
            # The paper compares both from the teacher's weights, with a fine grid (Appendix B.3).
            Arm("ct from the teacher", "ct", LONG, tuned=True),
            Arm("ct-inf", "ct-inf"),
        ),
        (("cd", "cd-inf"), ("cd-inf", "cd-inf-full"), ("ct-inf", "ct from the teacher")),
    ),
    "progressive": Ablation(
        "progressive against consistency distillation",
        # A student of progressive distillation is made for one number of steps, where its stages end.
        (
            *(Arm(f"pd to {n}", "pd", (f"recipe.curriculum.s1={n}",), (n,)) for n in (1, 2, 4, 8)),
            Arm("cd", "cd", (), (1, 2, 4, 8)),
        ),
        tuple((f"cd@{n}", f"pd to {n}@{n}") for n in (1, 2, 4, 8)),
    ),
}


def digest(trial: trials.Trial, steps: int) -> str:
    """Eight characters for a trial's resolved settings: the same run under two names is trained once."""
    return hashlib.sha256(trial.config(steps).model_dump_json().encode()).hexdigest()[:8]


def run(arm: Arm, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Train one arm and judge it."""
    shared = tuple(args.sets)
    out = args.out / trials.file_name(args.preset, args.teacher_steps, args.steps, *shared)
    out.mkdir(parents=True, exist_ok=True)
    teacher = trials.train(
        trials.Trial(args.preset, "edm", seed, shared), args.teacher_steps, out / f"edm-{seed}.safetensors"
    )
    starts = arm.tuned or trials.needs(args.preset, arm.recipe) != "nothing"
    entry = trials.Trial(args.preset, arm.recipe, seed, (*shared, *arm.sets), teacher if starts else None)
    path = trials.train(entry, args.steps, out / f"{arm.recipe}-{digest(entry, args.steps)}-{seed}.safetensors")
    return {f"fd{nfe}": trials.quality(path, nfe, args.preset)["distance"] for nfe in arm.nfe}


def values(rows: list[dict], key: str, name: str) -> list[float]:
    """Return the distances of one arm (name or name@evaluations) by seed."""
    arm, _, nfe = name.partition("@")
    own = sorted((row for row in rows if row["ablation"] == key and row["arm"] == arm), key=lambda row: row["seed"])
    return [row[f"fd{nfe or 1}"] for row in own]


def report(rows: list[dict]) -> str:
    """Return one table per ablation, and the verdict on each published finding."""
    lines = []
    for key, ablation in ABLATIONS.items():
        own = [row for row in rows if row["ablation"] == key]
        if not own:
            continue
        lines += [f"### {ablation.title}", "", "| setting | seeds | evaluations | FD |", "| --- | --- | --- | --- |"]
        for arm, nfe in itertools.chain.from_iterable(((a, n) for n in a.nfe) for a in ablation.arms):
            found = values(rows, key, f"{arm.name}@{nfe}")
            if found:
                lines.append(f"| {arm.name} | {len(found)} | {nfe} | {trials.spread(found)} |")
        for better, worse in ablation.findings:
            pair = values(rows, key, better), values(rows, key, worse)
            if all(pair) and len(pair[0]) == len(pair[1]):
                lines.append(f"\nPublished: {better} better than {worse}; {trials.verdict(*pair)}.")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=("digits", "shapes"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--teacher-steps", type=int, default=2500)
    parser.add_argument("--only", nargs="*", choices=tuple(ABLATIONS), default=tuple(ABLATIONS))
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="ARM", help='settings not to train, e.g. "N=60"')
    trials.add_sets(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "ablations.jsonl"
    marks = {"preset": args.preset, "steps": args.steps, "teacher_steps": args.teacher_steps, "sets": args.sets}
    for seed, key in itertools.product(range(args.seeds), args.only):
        for arm in (arm for arm in ABLATIONS[key].arms if arm.name not in args.leave_out):
            place = {**marks, "ablation": key, "arm": arm.name, "seed": seed}
            if not any(place.items() <= row.items() for row in trials.rows_of(results)):
                trials.append(results, {**place, **run(arm, seed, args)})
    print(report([row for row in trials.rows_of(results) if marks.items() <= row.items()]))


if __name__ == "__main__":
    main()
