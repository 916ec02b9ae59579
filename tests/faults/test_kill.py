"""SIGKILL at any moment: nothing is half-written, no finished checkpoint is lost, the next command ends the same."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from cmtool.training.run_folder import RunFolder
from tests.faults.commands import LINES, Command
from tests.faults.harness import broken_files, kill_at, trial

# Random moments of each command in the slow tier: 240 in all.
MOMENTS = {"train": 100, "sample": 35, "eval": 35, "import": 35, "pack": 35}


def kill_at_random(command: Command, place: Path, seed: int) -> bool:
    """Kill at up to three random moments in a row, then let it finish; return whether SIGKILL ever found it alive."""
    moments = random.Random(f"{command.name} {seed}")
    folder = command.folder(place)
    struck = False
    for _ in range(moments.choice((1, 1, 1, 2, 3))):
        before = checkpoints(folder)
        ended = trial("kill", command.words, folder, kill_after=moments.uniform(0.0, command.seconds))
        struck |= ended.killed
        assert ended.killed or ended.code == 0, ended.err
        assert not broken_files(folder), broken_files(folder)
        after = checkpoints(folder)
        assert not before or (after and max(after) >= max(before)), f"checkpoints {before} became {after}"
    command.assert_recovers(folder)
    return struck


def checkpoints(folder) -> list[int]:
    """Steps of the checkpoints of the run in `folder`."""
    return [step for step, _ in RunFolder(folder / "run").checkpoints()]


@pytest.mark.parametrize("name", LINES)
def test_killed_at_a_random_moment(known, tmp_path, name):
    kill_at_random(known[name], tmp_path / "w", seed=-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_killed_at_many_random_moments(known, tmp_path, name):
    struck, command = [], known[name]
    for seed in range(MOMENTS[name]):
        if seed % 10 == 0:  # how long it takes depends on what else the machine does
            folder = command.folder(tmp_path / f"clock-{seed}")
            command = replace(command, seconds=trial("undisturbed", command.words, folder).seconds)
        struck.append(kill_at_random(command, tmp_path / str(seed), seed))
    assert sum(struck) > len(struck) // 3, "most kills must find the command at work"


def changes_of(command: Command, place, limit: int = 400) -> list[int]:
    """Kill the command before its first, second, ... change of the file system until it gets through."""
    done = []
    for number in range(1, limit):
        folder = command.folder(place / str(number))
        ended = trial("kill at a change", command.words, folder, arm=kill_at(number))
        if not ended.killed:
            assert ended.code == 0, ended.err
            return done
        command.assert_recovers(folder)
        done.append(number)
    raise AssertionError("it never gets through")


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_killed_before_every_change_of_the_file_system(known, tmp_path, name):
    done = changes_of(known[name], tmp_path)
    assert len(done) >= {"train": 50, "sample": 3, "eval": 3, "import": 3, "pack": 3}[name]


@pytest.mark.parametrize("number", [1, 7, 18, 29, 43])
def test_training_killed_before_some_change_of_the_file_system(known, tmp_path, number):
    folder = known["train"].folder(tmp_path / "w")
    assert trial("kill at a change", known["train"].words, folder, arm=kill_at(number)).killed
    known["train"].assert_recovers(folder)


def test_training_killed_again_and_again_still_arrives(known, tmp_path):
    """Every attempt dies a little later; each goes on from the newest whole checkpoint of the one before."""
    folder, numbers = known["train"].folder(tmp_path / "w"), range(9, 400, 11)
    deaths = 0
    for number in numbers:
        ended = trial("kill at a change", known["train"].words, folder, arm=kill_at(number))
        assert not broken_files(folder)
        deaths += ended.killed
        if not ended.killed:
            break
    assert ended.code == 0 and deaths >= 2
    for name, data in known["train"].results.items():
        same = (folder / name).read_bytes() == data
        assert same, name
