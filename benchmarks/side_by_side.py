"""What a run keeps of its speed on a busy machine: beside another run, and beside one busy process.

    python -m benchmarks side-by-side [--presets digits,shapes] [--work train,sample] [--base OTHER_CHECKOUT]

Every run is a process in a session of its own, as in a terminal of its own. All of them stay alive and take turns:
alone, two at once, one beside a busy loop, and so on for `--rounds` rounds; the table has medians. With `--base` the
speed alone is compared with that of another checkout, in turns as well. At the end a training that starts anew beside
the busy loop must come to the same weights, bit for bit, as one alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
# Least share of the speed alone that a run keeps beside another run, beside a busy loop, and of the base's alone.
LEAST = {"pair": 0.40, "busy": 0.45, "base": 0.97}
# Seconds before each measurement, in which a run notices how busy the machine is.
SETTLE = 2.5
IMAGES, STEPS = 16, 4


class Run:
    """A process that trains or samples for so many seconds whenever it is asked."""

    def __init__(self, work: str, preset: str, checkout: Path) -> None:
        words = [sys.executable, str(Path(__file__).resolve()), "--worker", work, "--presets", preset]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(words, cwd=checkout, env=environment, start_new_session=True, **pipes)

    def ask(self, question: str) -> None:
        """Send a line: seconds to work for, or "weights"."""
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """Wait for the answer: images a second, or a digest."""
        line = self._process.stdout.readline().strip()
        if not line:
            sys.exit("a run ended early; its message stands above.")
        return line

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def speeds(runs: list[Run], seconds: float) -> list[float]:
    """Let runs work at once and return images a second of each, counted once they have settled."""
    for asked in (SETTLE, seconds):
        for run in runs:
            run.ask(str(asked))
        found = [float(run.answer()) for run in runs]
    return found


@contextmanager
def busy() -> Iterator[None]:
    """Keep one core busy with something that has nothing to do with us."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def measure(work: str, preset: str, asked: argparse.Namespace) -> dict[str, float]:
    """Return medians in images a second: alone, of the slower of a pair, beside a busy loop, of the base alone."""
    runs = [Run(work, preset, ROOT) for _ in range(2)]
    base = Run(work, preset, asked.base) if asked.base else None
    found: dict[str, list[float]] = {"alone": [], "pair": [], "busy": [], "base": []}
    try:
        for run in (*runs, *([base] if base else [])):
            run.answer()
        for _ in range(asked.rounds):
            found["alone"] += speeds(runs[:1], asked.seconds)
            if base is not None:
                found["base"] += speeds([base], asked.seconds)
            found["pair"].append(min(speeds(runs, asked.seconds)))
            with busy():
                found["busy"] += speeds(runs[:1], asked.seconds)
        if work == "train":
            found["same"] = [float(same_weights(runs[0]))]
    finally:
        for run in (*runs, *([base] if base else [])):
            run.end()
    return {name: median(values) for name, values in found.items() if values}


def same_weights(run: Run) -> bool:
    """Whether some steps from the start lead to the same weights alone and beside a busy loop."""
    run.ask("weights")
    alone = run.answer()
    with busy():
        speeds([run], 0.1)
        run.ask("weights")
        return run.answer() == alone


def serve(work: str, preset: str) -> None:
    """Be the process of a `Run`: answer each line of stdin."""
    step, weights = {"train": training, "sample": sampling}[work](preset)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "weights":
            print(weights(), flush=True)
            continue
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < float(line):
            images += step()
        print(images / (time.perf_counter() - began), flush=True)


def training(preset: str) -> tuple[Callable[[], int], Callable[[], str]]:
    """Return what does a step and tells its images, and what trains from the start and tells the weights' digest."""
    from cmtool.config.load import resolve
    from cmtool.data.load import load_dataset
    from cmtool.training import setup

    config = resolve(preset).config
    try:
        from cmtool.machine.device import choose_device, set_up_torch

        device = choose_device("cpu")
        set_up_torch(config.train.threads, config.train.deterministic)
    except ImportError:  # a base from before that room
        device = setup.choose_device("cpu")
        setup.set_up_torch(config.train)
    data = load_dataset(config.data)
    trainer = setup.prepare(config, data, device)

    def step() -> int:
        trainer.step()
        if trainer.state.step % 10 == 0:
            trainer.report()
        return config.train.batch_size

    def weights() -> str:
        fresh = setup.prepare(config, data, device)
        for _ in range(STEPS):
            fresh.step()
        found = hashlib.sha256()
        for tensor in fresh.state.student.network.state_dict().values():
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    return step, weights


def sampling(preset: str) -> tuple[Callable[[], int], Callable[[], str]]:
    """Return what samples a batch in two steps and tells how many images, and nothing to tell of weights."""
    import cmtool

    model = cmtool.load(f"demo/{preset}")
    return lambda: len(model.sample(IMAGES, steps=2, seed=0)), lambda: ""


def row(name: str, found: dict[str, float]) -> tuple[str, bool]:
    """Return the line of a table and whether every share is large enough."""
    against = {"pair": found["alone"], "busy": found["alone"], "base": found.get("base")}
    values = {"pair": found["pair"], "busy": found["busy"], "base": found["alone"]}
    cells, good = [f"{found['alone']:,.0f}"], True
    for key, least in LEAST.items():
        whole = against[key]
        if whole is None:
            cells.append("-")
            continue
        share = values[key] / whole
        speed = whole if key == "base" else values[key]
        cells.append(f"{speed:,.0f} ({share:.0%}{'' if share >= least else f', below {least:.0%}'})")
        good = good and share >= least
    same = found.get("same")
    cells.append("-" if same is None else "same" if same else "DIFFER")
    return f"| {name} | {' | '.join(cells)} |", good and same != 0


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table; exit code 1 where a share is too small or weights differ."""
    made = argparse.ArgumentParser(prog="python -m benchmarks side-by-side", description=__doc__.splitlines()[0])
    made.add_argument("--presets", default="digits,shapes")
    made.add_argument("--work", default="train,sample")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    made.add_argument("--base", type=Path, help="a checkout whose speed alone is to be kept")
    made.add_argument("--out", type=Path, help="file for JSON")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    asked = made.parse_args(arguments)
    if asked.worker:
        serve(asked.worker, asked.presets)
        return
    print("Images a second (share of the speed alone; of the base's for the base). Weights: alone and beside a loop.\n")
    print("| run | alone | two at once | beside a busy loop | base alone | weights |\n|---|---|---|---|---|---|")
    rows, good = {}, True
    for preset in asked.presets.split(","):
        for work in asked.work.split(","):
            found = measure(work, preset, asked)
            line, fine = row(f"{work} {preset}", found)
            print(line, flush=True)
            rows[f"{work} {preset}"], good = found, good and fine
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
