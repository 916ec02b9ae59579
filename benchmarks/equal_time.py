"""One step and two after equal minutes on the same pictures: cmtool's plan against what else trains on a CPU.

    python -m benchmarks equal-time --minutes 10 --data avatars [--peers ect,diffusers] [--ect-path CHECKOUT]

* **cmtool**: `cmtool train-ct --data PICTURES --time M`, untouched; the minutes include everything it does.
* **ect**: ECT's own network (DDPM++ of the same widths), loss and loop body. It tunes a diffusion model; `cmtool
  train-edm` makes that in two fifths of the minutes, and ECT's stages share the rest.
* **diffusers**: improved consistency training as its research script sets it up (lognormal levels, pseudo-Huber loss,
  10 to 1,280 levels, RAdam at 1e-4, EMAModel), with UNet2DModel of the same widths.

Samples come from each program's averaged weights at seeds 0 to N - 1, levels 80 and 80, 0.8, are brought to the size of
the pictures where a plan chose another, and judged by `cmtool eval --features imagenet` against pictures that none of
them saw. Absent peers are named and skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if not __package__:  # typed as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ect_step import EctStep, disagreement
from benchmarks.matched import TOLERANCE, checkout, diffusers_peer
from benchmarks.plan_laws import sized
from cmtool.config.load import resolve
from cmtool.data.dataset import Dataset, from_tensors
from cmtool.models import Model, load
from cmtool.training.setup import fresh_student

LEVELS = {"1": (80.0,), "2": (80.0, 0.8)}
SIGMA_MIN, SIGMA_DATA, RATE = 0.002, 0.5, 1e-4
# The part of the minutes for the diffusion model that ECT tunes.
TEACHER = 0.4
STAGES = 8
Answer = Callable[[Tensor, Tensor], Tensor]


def halves(source: str, folder: Path, held: int) -> tuple[Path, Path, Dataset]:
    """Write the pictures that train and those that judge as .npz; return both paths and the former as a data set."""
    if source.endswith(".npz"):
        with np.load(source, allow_pickle=False) as archive:
            images = archive["arr_0"]
    else:
        from cmtool.data.load import load_dataset

        data = load_dataset(resolve(source).config.data)
        images = data.images[: len(data)].permute(0, 2, 3, 1).numpy()
    order = np.random.default_rng(0).permutation(len(images))
    train, judge = folder / "train.npz", folder / "held.npz"
    np.savez(train, arr_0=images[order[held:]])
    np.savez(judge, arr_0=images[order[:held]])
    tensors = torch.from_numpy(np.ascontiguousarray(images[order[held:]])).permute(0, 3, 1, 2).contiguous()
    return train, judge, from_tensors(tensors, None, source)


def cmtool(*words: object) -> str:
    """Run a command and return what it prints on stdout."""
    line = [sys.executable, "-m", "cmtool", *map(str, words)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def judged(
    answer: Answer, shape: tuple[int, ...], asked: argparse.Namespace, held: Path, folder: Path
) -> dict[str, Any]:
    """Sample images of `shape` (C, H, W) with each list of levels and return what `cmtool eval` says."""
    found = {}
    with np.load(held, allow_pickle=False) as archive:
        side = archive["arr_0"].shape[1]
    for steps, levels in LEVELS.items():
        made = []
        for start in range(0, asked.num, 250):
            seeds = range(start, min(start + 250, asked.num))
            noise = [torch.randn(len(levels), *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            z = torch.stack(noise, 1)
            x = levels[0] * z[0]
            for i, level in enumerate(levels):
                if i:
                    x = x + math.sqrt(level**2 - SIGMA_MIN**2) * z[i]
                with torch.no_grad():
                    x = answer(x, torch.full((len(x),), level)).clamp(-1, 1)
            made.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
        path = folder / f"samples-{steps}.npz"
        np.savez(path, arr_0=sized(np.concatenate(made), side))
        words = ("eval", path, "--ref", held, "--features", "imagenet", "--json")
        found[steps] = json.loads(cmtool(*words))["results"][0]["metrics"]
    return found


def ours(asked: argparse.Namespace, train: Path, data: Dataset, folder: Path) -> tuple[Answer, int]:
    """The plan of `cmtool train-ct`."""
    out = folder / "cmtool"
    cmtool("train-ct", "--data", train, "--time", f"{asked.minutes}m", "--out", out)
    model = load(out)
    return model, int(model.header["step"])


def settings(data: Dataset) -> tuple[str, ...]:
    """What adapts a preset to pictures without classes."""
    channels, side, _ = data.images.shape[1:]
    return (f"data.resolution={side}", f"data.channels={channels}", "data.labels=false", "train.label_dropout=0")


def sizes(asked: argparse.Namespace, data: Dataset, preset: str = "shapes") -> Model:
    """A fresh model of ours with the network of a preset, in 32 groups of channels as diffusers has them."""
    sets = (*settings(data), "network.group_channels=1")
    return fresh_student(resolve(preset, recipe=asked.recipe, sets=sets).config, data)


def ect(asked: argparse.Namespace, train: Path, data: Dataset, folder: Path) -> tuple[Answer, int]:
    """ECT's loop from a diffusion model of its own network."""
    checkout(asked.ect_path, "--ect-path", "ECT_PATH")
    heads = f"network.head_channels={1 << 20}"
    network = ("network.kind=song", "network.scale_shift=false", "network.group_channels=4", heads)
    words = (*network, "network.embedding=positional", "network.resample_filter=[1,1]", *settings(data))
    sets = [word for text in words for word in ("--set", text)]
    until = f"{60 * asked.minutes * TEACHER:.0f}s"
    cmtool("train-edm", "--preset", "shapes", "--data", train, *sets, "--time", until, "--out", folder / "edm")
    teacher = load(folder / "edm")
    step = EctStep(teacher, data, argparse.Namespace(**vars(asked), device="cpu"))
    if (apart := disagreement(teacher, step)) > TOLERANCE:
        raise AssertionError(f"ECT's network with the same weights differs by {apart:.2e}")
    began, seconds, count = time.monotonic(), 60 * asked.minutes * (1 - TEACHER), 0
    while (passed := time.monotonic() - began) < seconds:
        step.loss.update_schedule(int(STAGES * passed / seconds))
        step()
        count += 1
    return step.average, count


def diffusers(asked: argparse.Namespace, train: Path, data: Dataset, folder: Path) -> tuple[Answer, int]:
    """Improved consistency training as the research script of diffusers does it."""
    from diffusers.training_utils import EMAModel

    peer = diffusers_peer(sizes(asked, data))
    network = peer.network.train()
    optimizer = torch.optim.RAdam(network.parameters(), lr=RATE)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    began, seconds, count = time.monotonic(), 60 * asked.minutes, 0
    c = 0.00054 * math.sqrt(math.prod(tuple(data.images.shape[1:])))
    while (passed := time.monotonic() - began) < seconds:
        points = 10 * 2 ** min(int(8 * passed / seconds), 7) + 1
        ramp = torch.linspace(0, 1, points)
        levels = (SIGMA_MIN ** (1 / 7) + ramp * (80 ** (1 / 7) - SIGMA_MIN ** (1 / 7))) ** 7
        edges = torch.erf((levels.log() + 1.1) / (2 * math.sqrt(2)))
        at = torch.multinomial(edges.diff(), asked.batch, replacement=True)
        images = data.images[torch.randint(0, len(data.images), (asked.batch,))].float() / 127.5 - 1
        z, (r, t) = torch.randn_like(images), (levels[at], levels[at + 1])
        seed = torch.random.get_rng_state()
        answer = answered(peer.raw, images + t.view(-1, 1, 1, 1) * z, t)
        torch.random.set_rng_state(seed)
        with torch.no_grad():
            target = answered(peer.raw, images + r.view(-1, 1, 1, 1) * z, r)
        loss = ((answer - target).square().flatten(1).sum(1) + c**2).sqrt() - c
        optimizer.zero_grad(set_to_none=True)
        (loss / (t - r)).mean().backward()
        optimizer.step()
        average.step(network.parameters())
        count += 1
    average.copy_to(network.parameters())
    network.eval()
    return lambda x, t: answered(peer.raw, x, t), count


def answered(raw: Answer, x: Tensor, t: Tensor) -> Tensor:
    """The consistency function around a raw network (Song et al. 2023, Appendix C)."""
    level, s = t.view(-1, 1, 1, 1), SIGMA_DATA
    root = (level**2 + s**2).sqrt()
    c_skip, c_out = s**2 / ((level - SIGMA_MIN) ** 2 + s**2), s * (level - SIGMA_MIN) / root
    return c_skip * x + c_out * raw(x / root, 250 * (t + 1e-44).log())


PROGRAMS = {"cmtool": ours, "ect": ect, "diffusers": diffusers}


def main(arguments: list[str] | None = None) -> None:
    """Train each program in turn, judge, and print one table."""
    made = argparse.ArgumentParser(prog="python -m benchmarks equal-time", description=__doc__.splitlines()[0])
    made.add_argument("--data", default="avatars", help="a preset whose pictures are meant, or an .npz")
    made.add_argument("--minutes", type=float, default=10)
    made.add_argument("--peers", default="ect,diffusers")
    made.add_argument("--recipe", default="ict")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--num", type=int, default=2000)
    made.add_argument("--held", type=int, default=2000)
    made.add_argument("--ect-path", default=os.environ.get("ECT_PATH"))
    made.add_argument("--out", type=Path, help="file for JSON")
    asked = made.parse_args(arguments)
    rows: dict[str, Any] = {}
    print("| program | steps | minutes | FD, 1 step | 2 steps | precision | recall |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        train, held, data = halves(asked.data, Path(scratch), asked.held)
        for name in ("cmtool", *asked.peers.split(",")):
            torch.manual_seed(0)
            began = time.monotonic()
            try:
                answer, count = PROGRAMS[name](asked, train, data, Path(scratch))
            except (ImportError, SystemExit) as error:
                print(f"| {name} | absent: {error} | | | | | |", flush=True)
                continue
            minutes = (time.monotonic() - began) / 60
            rows[name] = {"steps": count, "minutes": minutes, "seed": 0}
            shape = answer.image_shape if isinstance(answer, Model) else tuple(data.images.shape[1:])
            rows[name] |= judged(answer, shape, asked, held, Path(scratch))
            one, two = rows[name]["1"], rows[name]["2"]
            print(f"| {name} | {count} | {minutes:.1f} | {cells(one, two)} |", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=2) + "\n")


def cells(one: dict[str, Any], two: dict[str, Any]) -> str:
    """FD at one and two steps, precision and recall of one."""
    return " | ".join(f"{value:.3g}" for value in (one["fid"], two["fid"], one["precision"], one["recall"]))


if __name__ == "__main__":
    main()
