"""The system says no: full disk, failing fsync, no permission. One sentence, nothing half-written, and on it goes after."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.commands import LINES, Command, half_done
from tests.faults.harness import Ended, broken_files, fail_at, fsync_fails, trial, without_root
from tests.faults.test_kill import checkpoints


def assert_said(ended: Ended, *says: str) -> None:
    """One sentence on stderr that says why, exit code 1, no traceback."""
    assert ended.code == 1, (ended.code, ended.err)
    assert ended.err.count("Error: ") == 1 and "Traceback" not in ended.err
    assert "should not happen" not in ended.err, ended.err
    assert any(word in ended.err.lower() for word in says), ended.err


def refuse(command: Command, place: Path, number: int, code: int, *says: str) -> bool:
    """Let the `number`-th change and all later ones fail; return False when the command no longer gets that far."""
    folder = command.folder(place)
    ended = trial("refused", command.words, folder, arm=fail_at(number, code))
    if ended.code == 0:
        return False
    assert_said(ended, *says)
    assert not broken_files(folder), broken_files(folder)
    command.assert_recovers(folder)
    shutil.rmtree(folder)
    return True


FULL = (errno.ENOSPC, "disk is full", "no space left")
DENIED = (errno.EACCES, "no permission", "permission denied")


@pytest.mark.parametrize(("name", "number"), [("train", 12), ("train", 38), ("sample", 1), ("import", 2), ("pack", 2)])
def test_a_disk_that_is_full_from_some_change_on(known, tmp_path, name, number):
    assert refuse(known[name], tmp_path / "w", number, *FULL)


@pytest.mark.slow
@pytest.mark.parametrize("code", [FULL, DENIED], ids=["full", "denied"])
@pytest.mark.parametrize("name", LINES)
def test_refused_from_every_change_on(known, tmp_path, name, code):
    number = 1
    while refuse(known[name], tmp_path / str(number), number, *code):
        number += 2 if name == "train" else 1
    assert number > (30 if name == "train" else 2)


@pytest.mark.parametrize("number", [1, 4, 9])
def test_a_failing_fsync_stops_the_run_and_loses_nothing(known, tmp_path, number):
    folder = known["train"].folder(tmp_path / "w")
    assert_said(trial("fsync", known["train"].words, folder, arm=fsync_fails(number)), "could not be written")
    known["train"].assert_recovers(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_every_fsync_fails_once(known, tmp_path, name):
    for number in range(1, 200):
        folder = known[name].folder(tmp_path / str(number))
        ended = trial("fsync", known[name].words, folder, arm=fsync_fails(number))
        if ended.code == 0:
            break
        assert_said(ended, "could not be written", "input/output error")
        known[name].assert_recovers(folder)
    assert number > 1, "a result that is never synced does not survive a power cut"


@pytest.fixture
def small_disk(tmp_path):
    """Mount file systems of some kilobytes: small_disk(kilobytes) -> folder."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        place = tmp_path / f"disk{kilobytes}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True)
        if done.returncode != 0:
            pytest.skip("mounting a small tmpfs needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def no_forecast() -> None:
    """Let a run start on a disk that is too small for it; an `arm`."""
    import cmtool.training.forecast

    cmtool.training.forecast.check_disk = lambda folder, needed: None


def fill(command: Command, disk: Path) -> Ended:
    """Run the command on a small disk, then enlarge the disk: it must go on to the same bytes."""
    folder = command.folder(disk / "w")
    ended = trial("small disk", command.words, folder, arm=no_forecast)
    if ended.code != 0:
        assert_said(ended, "disk is full", "no space left", "needs")
    assert not broken_files(folder), broken_files(folder)
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    command.assert_recovers(folder)
    return ended


@pytest.mark.parametrize("kilobytes", [1500])
def test_a_real_disk_fills_up(known, small_disk, kilobytes):
    assert fill(known["train"], small_disk(kilobytes)).code == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_real_disks_of_many_sizes(known, small_disk, name):
    sizes = range(100, 6000, 300) if name == "train" else range(8, 200, 24)
    ended = [fill(known[name], small_disk(size)).code for size in sizes]
    assert 1 in ended


def test_a_disk_too_small_for_the_run_is_refused_at_once(known, small_disk):
    folder = known["train"].folder(small_disk(800) / "w")
    ended = trial("small disk", known["train"].words, folder)
    assert_said(ended, "free and the run needs")
    assert not (folder / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("locked", [".", "run", "run/checkpoints", "run/samples", "run/checkpoints/*"])
def test_no_permission_to_write(known, tmp_path, locked):
    folder = half_done(known["train"], tmp_path)
    if locked == ".":
        shutil.rmtree(folder / "run")
    for place in (folder / "run").glob("checkpoints/*"):
        if not (place / "state.safetensors").exists():  # the one that was being written: the next is to need a folder
            shutil.rmtree(place)
    before = checkpoints(folder)
    places = list(folder.glob(locked)) if "*" in locked else [folder / locked]
    for place in places:
        place.chmod(0o555)
    ended = trial("permission", known["train"].words, folder, arm=without_root)
    for place in places:
        place.chmod(0o755)
    if locked != "run/checkpoints/*":  # only new checkpoints are written, none is changed
        assert_said(ended, "no permission")
        assert checkpoints(folder) == before
    known["train"].assert_recovers(folder)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_no_permission_to_read_is_not_called_damage(known, tmp_path):
    folder = half_done(known["train"], tmp_path)
    (folder / "run/config.toml").chmod(0o000)
    ended = trial("permission", known["train"].words, folder, arm=without_root)
    assert_said(ended, "no permission to read run/config.toml")
    assert "--fresh" not in ended.err and "damaged" not in ended.err
    (folder / "run/config.toml").chmod(0o644)
    known["train"].assert_recovers(folder)
    place = tmp_path / "eval"
    place.mkdir()
    shutil.copytree(known["eval"].start, place / "start")
    (place / "start/samples.npz").chmod(0o000)
    ended = trial("permission", known["eval"].words, place, arm=without_root)
    assert_said(ended, "no permission to read start/samples.npz")


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("name", ["sample", "eval", "import", "pack"])
def test_no_permission_to_write_a_result(known, tmp_path, name):
    folder = known[name].folder(tmp_path / "w")
    folder.chmod(0o555)
    ended = trial("permission", known[name].words, folder, arm=without_root)
    folder.chmod(0o755)
    assert_said(ended, "no permission", "permission denied")
    known[name].assert_recovers(folder)


def test_a_home_that_cannot_be_written(known, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o555)

    def arm() -> None:
        os.environ["HOME"] = str(home)
        for variable in ("CMTOOL_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "TORCH_HOME"):
            os.environ.pop(variable, None)
        without_root()

    for name, command in known.items():
        folder = command.folder(tmp_path / name)
        ended = trial("home", command.words, folder, arm=arm)
        assert ended.code == 0, (name, ended.err)
        command.assert_results(folder)
    assert not list(home.iterdir())
