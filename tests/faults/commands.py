"""The commands that misfortune befalls: training, sampling, evaluation, import and packing."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmtool.training.run_folder import RunFolder
from tests.faults.harness import Ended, broken_files, kill_at, litter, trial

# Four tensors of every kind: student, target, two averages; nothing that only costs time.
PRESET = """
[data]
source = "digits"
resolution = 8
channels = 1
size = 64
[network]
channels = 8
head_channels = 8
attention = [4]
[process]
noise_scale = 250.0
[train]
steps = 9
batch_size = 4
lr = 1e-3
optimizer = "adam"
log_every = 2
checkpoint_every = 3
sample_every = 4
ema = { kind = "power", std = 0.1 }
extra_emas = [{ decay = 0.5 }]
"""
TRAIN = ("train-ct", "--preset", "start/tiny.toml", "--recipe", "ct")
LINES = {
    "train": (*TRAIN, "--out", "run"),
    "sample": ("sample", "--model", "start/model.safetensors", "--num", "96", "--batch-size", "8", "--out", "s.npz"),
    "eval": ("eval", "start/samples.npz", "--ref", "digits", "--metrics", "fid", "--out", "result.json"),
    "import": (
        "import",
        "start/ct_tiny.pt",
        "--form",
        "consistency",
        "--resolution",
        "8",
        "--out",
        "imported.safetensors",
    ),
    "pack": ("data", "make", "start/photos", "--resolution", "8", "--out", "photos.cmdata"),
}
# What each must have made in the end, to the byte.
RESULTS = {
    "train": ("run/model.safetensors", "run/ema-0.safetensors"),
    "sample": ("s.npz",),
    "eval": ("result.json",),
    "import": ("imported.safetensors",),
    "pack": ("photos.cmdata",),
}


@dataclass(frozen=True)
class Command:
    """A command line, what it makes when nothing happens, and how many seconds that takes."""

    name: str
    words: tuple[str, ...]
    start: Path
    results: dict[str, bytes]
    seconds: float

    def folder(self, place: Path) -> Path:
        """Return a fresh working folder with what the command starts from."""
        place.mkdir(parents=True)
        (place / "start").symlink_to(self.start, target_is_directory=True)
        return place

    def again(self, place: Path) -> Ended:
        """Type the same line once more."""
        return trial("repeat", self.words, place)

    def assert_results(self, place: Path) -> None:
        """Compare what was made with what is made when nothing happens."""
        for name, data in self.results.items():
            made = (place / name).read_bytes()
            if name.endswith(".json"):  # LAPACK rounds by where its memory lies
                assert _rounded(json.loads(made)) == _rounded(json.loads(data)), name
            else:
                assert made == data, f"{name} differs"

    def assert_recovers(self, place: Path) -> Ended:
        """Judge a folder after a misfortune: nothing half-written, and the next command ends with the same bytes."""
        assert not broken_files(place), broken_files(place)
        done = self.again(place)
        assert done.code == 0, done.err
        self.assert_results(place)
        assert not litter(place / "run"), "the run folder is swept"
        return done


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def half_done(command: Command, place: Path) -> Path:
    """Return a folder with a run that was killed between its second checkpoint (of three) and its end."""
    for number in range(60, 20, -2):
        folder = command.folder(place / f"cut-{number}")
        trial("prepare", command.words, folder, arm=kill_at(number))
        run = RunFolder(folder / "run")
        if [step for step, _ in run.checkpoints()] == [6, 3] and not run.finished():
            return folder
    raise AssertionError("no kill found the run between its second checkpoint and its end")


def warm_up(folder: Path) -> None:
    """Make what the commands start from, in this process: it imports all that the trials need."""
    import os

    from cmtool.cli.app import run

    start = folder / "start"
    start.mkdir()
    (start / "tiny.toml").write_text(PRESET)
    photos = start / "photos"
    rng = np.random.default_rng(0)
    for index in range(40):
        (photos / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"class{index % 2}" / f"{index}.png")
    before = Path.cwd()
    os.chdir(folder)
    try:
        lines = [(*TRAIN, "--out", "made"), ("export", "made", "--format", "openai", "--out", "start/ct_tiny.pt")]
        for line in lines:
            assert run([*line, "--quiet"]) == 0, line
        shutil.copy("made/model.safetensors", "start/model.safetensors")
        assert (
            run(["sample", "--model", "start/model.safetensors", "--num", "64", "--out", "start/samples.npz", "-q"])
            == 0
        )
        for name, line in LINES.items():
            assert run([*line, "--quiet"]) == 0, name
    finally:
        os.chdir(before)


def commands(warm: Path, place: Path) -> dict[str, Command]:
    """Run every command twice where nothing happens; the bytes must agree."""
    found = {}
    for name, words in LINES.items():
        runs = []
        for turn in (1, 2):
            bare = Command(name, words, warm / "start", {}, 0.0)
            folder = bare.folder(place / f"{name}-{turn}")
            done = trial("undisturbed", words, folder)
            assert done.code == 0, done.err
            assert not broken_files(folder) and not litter(folder)
            runs.append(({file: (folder / file).read_bytes() for file in RESULTS[name]}, done.seconds))
        if name != "eval":
            assert runs[0][0] == runs[1][0], f"{name} is not repeatable"
        found[name] = Command(name, words, warm / "start", runs[0][0], min(run[1] for run in runs))
    return found
