"""The experiment behind the plan: untouched plans beside settings by hand, in equal minutes, on four data sets.

    python -m benchmarks plan-laws --pictures FOLDER --out runs/plan-laws [--minutes 5,20,60] [--sets mnist32,...]
        [--variations plan,...] [--seeds N] [--list | --table]

FOLDER holds avatars16.npz, toon64.npz, emoji64.zip and mnist32.npz; `--sets robots.zip` takes the PNGs of another zip
there, of which a fifth is held out. Each run is the command that a user types, `cmtool train-ct --data PICTURES --time
M`, with a variation's words behind it; its minutes include everything it does. Its samples in one, two and four steps,
brought to the size of the pictures, are judged in `imagenet` features by up to 2,000 pictures that no run saw: Frechet
distance, precision, recall, and copies, the share of samples nearer to a training picture than to a held-out one. Five
minutes are run with three seeds, more with one.

A line of JSON goes into OUT/results.jsonl after each run, and the same command goes on with what is missing: a run that
was stopped starts over, one that failed is tried again. `--list` says what is left, `--table` prints what there is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
SIDE, MOST = 32, 2000
STEPS = (1, 2, 4)
# What says how large a network is.
SIZED = ("channels", "width", "depth", "patch")
# Seeds of a budget in minutes where there are several.
SEEDS = {5: 3}
# What is varied by hand, each a line of words behind the plan's command.
VARIATIONS: dict[str, str] = {
    "plan": "",
    "two-stages": "--recipe icd",
    "polish": "--recipe polish",
    "scratch": "--recipe ict-pm",
    "width-16": "--set network.channels=16 --set network.head_channels=16",
    "width-32": "--set network.channels=32 --set network.head_channels=32",
    "width-64": "--set network.channels=64 --set network.head_channels=32 --set train.lr=5e-4",
    "batch-16": "--batch-size 16",
    "batch-64": "--batch-size 64",
    "rate-5e-4": "--set train.lr=5e-4",
    "rate-1e-3": "--set train.lr=1e-3",
    "rate-4e-3": "--set train.lr=4e-3",
    "rate-8e-3": "--set train.lr=8e-3",
    "radam": "--set train.optimizer=radam",
    "dit-64": "--set network.kind=dit --set network.width=64 --set network.depth=4 --set network.heads=2",
    "dit-96": "--set network.kind=dit --set network.width=96 --set network.depth=4 --set network.heads=3",
    "dit-128": "--set network.kind=dit --set network.width=128 --set network.depth=6 --set network.heads=4",
    "dit-fine": "--set network.kind=dit --set network.patch=2",
    "16px": "--resolution 16",
    "32px": "--resolution 32",
}


@dataclass(frozen=True)
class Pictures:
    """A data set: its file, how many pictures train, and what its arrays are read by."""

    file: str
    train: int | None  # None: all but a fifth
    read: Callable[[Path], dict[str, NDArray[Any]]]


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def halved(path: Path) -> dict[str, NDArray[Any]]:
    """Return pictures of half the size: the mean of each 2 x 2 pixels."""
    whole = arrays(path)["arr_0"]
    count, height, width, channels = whole.shape
    parts = whole.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return {"arr_0": parts.round().astype(np.uint8)}


def drawn(path: Path) -> dict[str, NDArray[Any]]:
    """Return the PNGs of a zip on white at `SIDE` pixels, in an order that has nothing to do with their names."""
    from PIL import Image

    rows = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".png")):
            with archive.open(name) as stream, Image.open(stream) as picture:
                image = picture.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            rows.append(np.asarray(white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)))
    return {"arr_0": np.stack(rows)[np.random.default_rng(0).permutation(len(rows))]}


SETS = {
    "avatars16": Pictures("avatars16.npz", 8000, arrays),
    "toon64": Pictures("toon64.npz", 5000, halved),
    "emoji64": Pictures("emoji64.zip", 3000, drawn),
    "mnist32": Pictures("mnist32.npz", 4000, arrays),
}


@dataclass(frozen=True)
class Run:
    """One run: a data set, minutes, a variation, a seed."""

    set: str
    minutes: float
    variation: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.set}-{self.minutes:g}min-{self.variation}-{self.seed}"

    @property
    def key(self) -> dict[str, Any]:
        """What its line in the results begins with."""
        return {"set": self.set, "minutes": self.minutes, "variation": self.variation, "seed": self.seed}

    def words(self, out: Path) -> list[str]:
        """The command as it is typed."""
        place = ["--data", str(out / "data" / f"{self.set}-train.npz"), "--out", str(out / self.name)]
        length = ["--time", f"{60 * self.minutes:g}s", "--seed", str(self.seed)]
        return ["train-ct", *place, *length, *shlex.split(VARIATIONS[self.variation])]


def set_named(name: str) -> Pictures:
    """Return a data set of the experiment, or the zip of this name."""
    return Pictures(name, None, drawn) if name.endswith(".zip") else SETS[name]


def prepare(name: str, pictures: Path, out: Path) -> tuple[Path, Path]:
    """Write the pictures that train and those that judge, and return both files."""
    paths = out / "data" / f"{name}-train.npz", out / "data" / f"{name}-held.npz"
    if not all(path.is_file() for path in paths):
        one = set_named(name)
        found = one.read(pictures / one.file)
        train = one.train or len(found["arr_0"]) * 4 // 5
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, (slice(train), slice(train, train + MOST)), strict=True):
            np.savez(path, **{key: array[rows] for key, array in found.items()})
    return paths


def train(words: Sequence[str], log: Path) -> None:
    """Type the command; what it says goes into a file."""
    with open(log, "w", encoding="utf-8") as stream:
        subprocess.run([sys.executable, "-m", "cmtool", *words], check=True, stdout=stream, stderr=subprocess.STDOUT)


def sized(images: Pixels, side: int) -> Pixels:
    """Return pictures (N, H, W, C) brought to `side` pixels."""
    if images.shape[1] == side:
        return images
    import torch

    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def judge(folder: Path, training: Path, held: Path) -> dict[str, dict[str, float]]:
    """Return the figures of a run's samples by the number of steps."""
    import cmtool
    from cmtool.data import to_uint8
    from cmtool.evaluation.judge import Judge
    from cmtool.evaluation.references import Reference
    from cmtool.evaluation.samples import from_array

    real = from_array(arrays(held)["arr_0"], "held-out")
    seen = from_array(arrays(training)["arr_0"][: real.count], "training")
    judged = Judge.of(Reference("held-out", str(held), real, "imagenet", real.count, training=seen))
    model, found = cmtool.load(folder, "cpu"), {}
    for steps in STEPS:
        samples = model.sample(real.count, steps=steps, seed=1, batch_size=250)
        made = from_array(sized(to_uint8(samples).permute(0, 2, 3, 1).numpy(), real.shape[0]), f"{steps} steps")
        figures = judged(made, ("fid", "pr", "copies"), use_cache=False).known
        found[str(steps)] = {key: round(float(value), 4) for key, value in figures.items()}
    return found


def planned(folder: Path) -> dict[str, Any]:
    """Return what the plan of a run chose, and with how many steps its stages ended."""
    import tomllib

    from cmtool.checkpoint import read_header

    tables = tomllib.loads((folder / "plan.toml").read_text(encoding="utf-8"))
    rows, last = tables["plan"]["stages"], len(tables["plan"]["stages"]) - 1
    places = [folder if index == last else folder / row["folder"] for index, row in enumerate(rows)]
    ended = {
        row["recipe"]: read_header(place / "model.safetensors")["step"] for row, place in zip(rows, places, strict=True)
    }
    network = {key: tables["network"][key] for key in ("kind", *SIZED) if key in tables["network"]}
    chosen = {"resolution": tables["data"]["resolution"], "network": network}
    return {**chosen, "batch_size": tables["train"]["batch_size"], "lr": tables["train"]["lr"], "steps": ended}


def results(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the results; a last one that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def done(path: Path) -> set[Run]:
    """Return the runs that the results hold figures of."""
    return {Run(*(row[key] for key in Run.__annotations__)) for row in results(path) if "figures" in row}


def runs(asked: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs, the shortest budgets first, and of each the untouched plan of all sets before the others."""
    for minutes, variation, name in product(sorted(asked.minutes), asked.variations, asked.sets):
        for seed in range(asked.seeds or SEEDS.get(int(minutes), 1)):
            yield Run(name, minutes, variation, seed)


Train = Callable[[Sequence[str], Path], None]
Judged = Callable[[Path, Path, Path], dict[str, dict[str, float]]]


def work(asked: argparse.Namespace, trains: Train, judges: Judged) -> None:
    """Do the runs that are missing, and keep a line of each."""
    path = asked.out / "results.jsonl"
    ready = done(path)
    for run in runs(asked):
        if run in ready:
            continue
        training, held = prepare(run.set, asked.pictures, asked.out)
        folder = asked.out / run.name
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{time.strftime('%H:%M')} {run.name}", flush=True)
        began = time.monotonic()
        row: dict[str, Any] = run.key
        try:
            trains(run.words(asked.out), asked.out / f"{run.name}.log")
            row["seconds"] = round(time.monotonic() - began, 1)
            row |= {"plan": planned(folder), "figures": judges(folder, training, held)}
        except (subprocess.CalledProcessError, OSError) as error:
            row["error"] = str(error)
            print(f"  failed: {error} (see {asked.out / run.name}.log)", flush=True)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown: a row for each variation, its seeds averaged, the nearest in one step first."""
    lines = [
        "| set | min | variation | seeds | FD 1 | 2 | 4 | to the best | precision | recall | copies | stages |",
        "| --- " * 12 + "|",
    ]
    groups: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "figures" in row:
            groups.setdefault((row["set"], row["minutes"]), {}).setdefault(row["variation"], []).append(row)
    for (name, minutes), found in sorted(groups.items()):
        order = sorted(found.items(), key=lambda entry: average(entry[1], 1, "fid"))
        best = average(order[0][1], 1, "fid")
        for variation, those in order:
            distances = [f"{average(those, steps, 'fid'):.1f}" for steps in STEPS]
            shares = [f"{average(those, 1, key):.2f}" for key in ("precision", "recall", "copies")]
            last = those[-1]["plan"]
            stages = " ".join(f"{recipe} {steps}" for recipe, steps in last["steps"].items())
            network = " ".join(str(value) for value in last["network"].values())
            chosen = f"{last['resolution']} px, {network}, {stages}"
            ratio = f"{average(those, 1, 'fid') / best:.2f}"
            cells = [name, f"{minutes:g}", variation, len(those), *distances, ratio, *shares, chosen]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def average(rows: Sequence[dict[str, Any]], steps: int, key: str) -> float:
    """Return the mean over runs of a figure of their samples in so many steps."""
    return mean(row["figures"][str(steps)][key] for row in rows)


def listing(asked: argparse.Namespace) -> str:
    """Return the commands of the runs that are missing, and the time for all of them."""
    ready, every = done(asked.out / "results.jsonl"), list(runs(asked))
    left = [run for run in every if run not in ready]
    lines = [f"cmtool {shlex.join(run.words(asked.out))}" for run in left]
    hours = sum(run.minutes for run in left) / 60
    return "\n".join([*lines, f"{len(left)} of {len(every)} runs are left, {hours:.1f} hours of training"])


def _chosen(known: Sequence[str], ending: str | None = None) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known and not (ending and name.endswith(ending)):
                others = f" or a file that ends in {ending}" if ending else ""
                raise argparse.ArgumentTypeError(f"unknown {name!r}; choose {', '.join(known)}{others}")
        return names

    return chosen


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pictures", type=Path, help="folder with the four files")
    made.add_argument("--out", type=Path, default=Path("runs/plan-laws"))
    made.add_argument(
        "--minutes", type=lambda text: [float(part) for part in text.split(",")], default=[5.0, 20.0, 60.0]
    )
    made.add_argument("--sets", type=_chosen(list(SETS), ".zip"), default=list(SETS))
    made.add_argument("--variations", type=_chosen(list(VARIATIONS)), default=list(VARIATIONS))
    made.add_argument("--seeds", type=int, help="of every budget; usually 3 of five minutes, else 1")
    made.add_argument("--list", action="store_true", help="say what is left and stop")
    made.add_argument("--table", action="store_true", help="print the results and stop")
    return made


def main(words: Sequence[str] | None = None, trains: Train = train, judges: Judged = judge) -> None:
    """Run, list, or print."""
    asked = parser().parse_args(words)
    if asked.list:
        return print(listing(asked))
    if not asked.table:
        if asked.pictures is None:
            raise SystemExit("--pictures FOLDER is needed to run")
        asked.out.mkdir(parents=True, exist_ok=True)
        work(asked, trains, judges)
    print(table(results(asked.out / "results.jsonl")))


if __name__ == "__main__":
    main()
