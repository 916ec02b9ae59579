"""The commands that misfortune befalls: training, sampling, evaluation, import and packing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.harness import Ended, broken_files, litter, trial

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

    def assert_recovers(self, place: Path) -> Ended:
        """Judge a folder after a misfortune: nothing half-written, and the next command ends with the same bytes."""
        assert not broken_files(place), broken_files(place)
        done = self.again(place)
        assert done.code == 0, done.err
        for name, data in self.results.items():
            assert (place / name).read_bytes() == data, f"{name} differs after {done.err}"
        assert not litter(place / "run"), "the run folder is swept"
        return done


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
        assert runs[0][0] == runs[1][0], f"{name} is not repeatable"
        found[name] = Command(name, words, warm / "start", runs[0][0], min(run[1] for run in runs))
    return found
