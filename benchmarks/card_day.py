"""Half an hour of a GPU, spent in order of worth: each part has its own limit, and writes what it found at once.

    python -m benchmarks card-day --minutes 25 --out results/ [--toon toon64.npz] [--dry-run]

1. `tests`: all tests that need a GPU, and the kernels compiled for it.
2. `card`: the step of ImageNet-64 in pairs, with fused normalization, with both passes of a pair in step, recorded, and
   compiled by blocks; its teacher's; and what each of the five convolutions of a pair costs.
3. `peers`: OpenAI's and diffusers' step beside ours (absent peers are named), and ECT's.
4. `toon`: pictures of 64 x 64 by the plan for ten minutes, judged in features of photographs; needs `--toon`.
5. `long`: iCT-GC for 2,000 steps at 64 pixels in bfloat16, for what only long runs show.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other; `share` of the minutes that they may take together."""

    name: str
    share: float
    commands: tuple[tuple[str, ...], ...]


def python(*words: str) -> tuple[str, ...]:
    """A module as a command of this interpreter."""
    return (sys.executable, "-m", *words)


def parts(out: Path, toon: Path | None, minutes: float) -> Iterator[Part]:
    """Yield what to do, the most worthwhile first."""
    tests = ("tests/test_gpu.py", "tests/networks/test_fused.py")
    yield Part("tests", 0.2, (python("pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests),))
    formats = ("--formats", "pair,fused,step,replayed,compiled", "--batches", "64,128")
    teacher = ("--recipe", "edm", "--formats", "all,compiled", "--batches", "128")
    card = python("benchmarks", "card")
    yield Part(
        "card",
        0.2,
        (
            (*card, *formats, "--out", str(out / "card-ct.json")),
            (*card, *teacher, "--out", str(out / "card-edm.json")),
            python("benchmarks", "pair-cost", "--device", "cuda", "--out", str(out / "pair-cost.json")),
        ),
    )
    peers = ("--device", "cuda", "--recipes", "ct", "--batch", "64", "--side", "64", "--channels", "128", "--compile")
    step = python("benchmarks", "train-step", *peers, "--peers-in-half", "--out", str(out))
    yield Part("peers", 0.12, (step, python("benchmarks", "ect-step", "--device", "cuda", "--out", str(out))))
    if toon is not None:
        run = str(out / "toon")
        made = ("cmtool", "train-ct", "--data", str(toon), "--resolution", "64", "--time", f"{0.35 * minutes:.0f}m")
        judged = ("cmtool", "eval", "--model", run, "--features", "imagenet", "--num", "2000")
        yield Part("toon", 0.43, (python(*made, "--out", run), python(*judged), python(*judged, "--steps", "2")))
    words = ("--preset", "shapes64", "--recipe", "ict-gc", "--precision", "bf16", "--steps", "2000")
    yield Part("long", 0.15, (python("cmtool", "train-ct", *words, "--out", str(out / "ict-gc")),))


def run(part: Part, out: Path, seconds: float) -> dict[str, object]:
    """Run a part's commands within `seconds`; everything they print goes to a file of its own as it is printed."""
    began, codes = time.monotonic(), []
    with open(out / f"{part.name}.log", "w", encoding="utf-8") as log:
        for command in part.commands:
            left = seconds - (time.monotonic() - began)
            print(f"$ {' '.join(command)}", file=log, flush=True)
            try:
                done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(left, 1))
                codes.append(str(done.returncode))
            except subprocess.TimeoutExpired:
                codes.append("out of time")
                break
    return {"seconds": round(time.monotonic() - began, 1), "exit_codes": codes}


def main(arguments: list[str] | None = None) -> None:
    """Do the parts in turn; after each the summary is written anew."""
    made = argparse.ArgumentParser(prog="python -m benchmarks card-day", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--minutes", type=float, default=25)
    made.add_argument("--out", type=Path, default=Path("card-day"))
    made.add_argument("--toon", type=Path, help="images of 64 x 64 to train on (.npz or a folder)")
    made.add_argument("--only", help="names of parts, separated by commas")
    made.add_argument("--dry-run", action="store_true", help="print the commands and their limits")
    asked = made.parse_args(arguments)
    out, only = asked.out.resolve(), asked.only.split(",") if asked.only else None
    toon = None if asked.toon is None else asked.toon.resolve()
    wanted = [part for part in parts(out, toon, asked.minutes) if only is None or part.name in only]
    if asked.dry_run:
        for part in wanted:
            print(f"{part.name}: at most {part.share * asked.minutes:.1f} minutes")
            print("\n".join(f"    {' '.join(command)}" for command in part.commands))
        return
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {}
    for part in wanted:
        found[part.name] = run(part, out, 60 * part.share * asked.minutes)
        (out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"{part.name}: {json.dumps(found[part.name])}", flush=True)


if __name__ == "__main__":
    main()
