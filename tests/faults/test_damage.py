"""Every file of a run folder truncated, emptied and bit-flipped: named and passed over, or of no consequence."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.commands import Command, half_done
from tests.faults.harness import TRIALS, Ended, broken_files, trial


@pytest.fixture(scope="session")
def runs(known, tmp_path_factory):
    """A finished run, and one that was killed between its second checkpoint and its end."""
    place = tmp_path_factory.mktemp("runs")
    command = known["train"]
    finished = command.folder(place / "finished")
    assert command.again(finished).code == 0
    cut = half_done(command, place)
    return {"finished": finished, "cut": cut}


def names(folder: Path) -> list[str]:
    """Files of the run in `folder`."""
    return sorted(str(file.relative_to(folder)) for file in (folder / "run").rglob("*") if file.is_file())


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return `data` cut, emptied, with flipped bits, with a block of zeros or with garbage at its end."""
    kind = rng.choice(("flip", "flip", "flip", "cut", "empty", "zeros", "more"))
    if kind == "cut" and data:
        return data[: rng.randrange(len(data))]
    if kind == "empty" or not data:
        return b""
    if kind == "more":
        return data + rng.randbytes(rng.randrange(1, 50))
    changed = bytearray(data)
    start = rng.randrange(len(data))
    if kind == "zeros":
        changed[start : start + 512] = bytes(len(changed[start : start + 512]))
    else:
        changed[start] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage_one(command: Command, source: Path, place: Path, name: str, seed: int) -> Ended:
    """Copy a run, damage one file, type the command again and judge what happens."""
    rng = random.Random(f"{name} {seed}")
    folder = place / "w"
    shutil.copytree(source, folder, symlinks=True)
    good = (folder / name).read_bytes()
    bad = damaged(good, rng)
    (folder / name).write_bytes(bad)
    done = trial("damage", command.words, folder)
    judge(command, folder, name, done, good != bad)
    shutil.rmtree(folder)
    return done


def judge(command: Command, folder: Path, name: str, done: Ended, changed: bool) -> None:
    """The command either ends with the right bytes, or says in one sentence which file is at fault."""
    assert "Traceback" not in done.err and "should not happen" not in done.err, done.err
    if done.code != 0:
        assert name.endswith("config.toml"), f"{name} must not stop the run: {done.err}"
        assert done.err.count("Error: ") == 1
        assert "config.toml" in done.err or "another configuration" in done.err
        return
    for result, data in command.results.items():
        if result != name or result.endswith("model.safetensors"):
            # Said in a word: pytest would look for the differences of two files, which takes minutes under CI.
            same = (folder / result).read_bytes() == data
            assert same, f"{result} differs after damage to {name}"
    if changed and name.endswith("/model.safetensors"):
        assert name in done.err and "damaged" in done.err
    left = [line for line in broken_files(folder) if "damaged.safetensors" not in line]
    assert all(line.startswith(name) for line in left), left


def newest_checkpoint(folder: Path) -> str:
    """Name of the newest checkpoint's file."""
    return [name for name in names(folder) if name.endswith("state.safetensors")][-1]


@pytest.mark.parametrize("which", ["finished", "cut"])
def test_every_file_damaged_once(known, runs, tmp_path, which):
    for name in names(runs[which]):
        damage_one(known["train"], runs[which], tmp_path, name, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["finished", "cut"])
def test_every_file_damaged_many_times(known, runs, tmp_path, which):
    before = TRIALS["damage"]
    for name in names(runs[which]):
        for seed in range(1, 16):
            damage_one(known["train"], runs[which], tmp_path, name, seed)
    assert TRIALS["damage"] - before >= 100


def test_a_damaged_newest_checkpoint_is_named(known, runs, tmp_path):
    name = newest_checkpoint(runs["cut"])
    for seed in range(2):
        done = damage_one(known["train"], runs["cut"], tmp_path, name, 100 + seed)
        assert name in done.err and "An older checkpoint is used" in done.err


def test_both_checkpoints_damaged_is_a_new_start(known, runs, tmp_path):
    folder = tmp_path / "w"
    shutil.copytree(runs["cut"], folder, symlinks=True)
    for file in (folder / "run/checkpoints").glob("*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    done = known["train"].again(folder)
    assert done.code == 0 and done.err.count("An older checkpoint is used") == 2
    for result, data in known["train"].results.items():
        same = (folder / result).read_bytes() == data
        assert same, result


@pytest.mark.parametrize("name", ["sample", "eval"])
def test_a_damaged_model_or_sample_file_is_named(known, tmp_path, name):
    command = known[name]
    source = {"sample": "model.safetensors", "eval": "samples.npz"}[name]
    for cut in (1, 200):
        folder = tmp_path / str(cut)
        folder.mkdir()
        shutil.copytree(command.start, folder / "start")
        file = folder / "start" / source
        file.write_bytes(file.read_bytes()[:-cut])
        done = trial("damage", command.words, folder)
        assert done.code == 1 and source in done.err and "Traceback" not in done.err, done.err
        assert "should not happen" not in done.err
        assert not any((folder / result).exists() for result in command.results)
