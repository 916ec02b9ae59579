"""Commands as people type them, made quick: smaller networks, fewer steps and images; and the files they name."""

from __future__ import annotations

import shutil
from pathlib import Path

from cmtool.cli.app import run
from tests.reporting.run_makers import write_run

TINY_NETWORK = ["network.channels=8", "network.channel_mult=[1]", "network.head_channels=8", "network.attention=[]"]
SIZES = [word for value in TINY_NETWORK for word in ("--set", value)]


def tiny(words: list[str]) -> list[str]:
    """Return a command with settings that make it quick."""
    name, given = words[0], set(words)
    if name.startswith("train-"):
        more = [] if {"--dry-run", "--list-recipes"} & given else ["--set", "train.log_every=2"]
        planned = "--data" in given and not {"--preset", "-p", "--extend"} & given
        more += ["--anyway"] if planned else []  # of the few pictures here
        if any(word.startswith("train.snapshot_every") for word in words):
            more += ["--set", "train.snapshot_every=2"]
        return (
            [*words, "--steps", "12"]
            if "--extend" in given
            else [*words, *more, *SIZES, "--batch-size", "8", "--steps", "6"]
        )
    if name == "plan":
        return [*words, "--anyway"]
    if name in ("eval", "search-times") and "--make-ref" not in given:
        few = ["--num", "30"] if not {"ours.npz", "photo.png", "a.npz"} & given else []
        return [*words, *few, *(["--metrics", "fid,pr"] if name == "eval" and "--metrics" not in given else [])]
    if name == "sample" and {"ours.npz", "big.npz"} & given:
        return [*words, "--num", "40"]
    if name == "interpolate":
        return [*words, "--num", "4"]
    if name == "bench":
        return [*words, *SIZES, "--set", "train.batch_size=4", "--seconds", "0.1"]
    return words


# What is there before: files of the reader's, whose names the examples use.
POINTS = "0.1,0.2\n-0.3,0.4\n0.5,-0.6\n-0.2,-0.1\n"


def lay_out(folder: Path) -> None:
    """Put the reader's files into `folder`: pictures under the names that examples give them, samples, a model."""
    for name in ("a", "b"):
        shutil.copy(folder / "photo.png", folder / f"{name}.png")
        write_run(folder / "runs", name)
        shutil.rmtree(folder / name, ignore_errors=True)
        assert run(["sample", "--model", f"runs/{name}", "--num", "40", "--out", f"{name}.npz"]) == 0
        assert run(["sample", "--model", f"runs/{name}", "--num", "40", "--out", f"{name}/"]) == 0
    shutil.copy(folder / "mask.png", folder / "m.png")
    write_run(folder / "elsewhere", "c")
    shutil.copy(folder / "runs" / "a" / "model.safetensors", folder / "model.safetensors")
    (folder / "points.csv").write_text(POINTS, encoding="utf-8")
