"""Samples made by several processes are those of one."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cmtool.api.sample import make_in, place_of_share
from cmtool.cli.app import run
from cmtool.machine.world import World
from tests.cli.tiny import write_model


def make(folder, out, processes, *options):
    words = ["sample", "-n", "7", "--device", "cpu", "--out", out, *options]
    if processes == 1:
        with contextlib.chdir(folder):
            return run(words)  # in this process, which has imported torch already
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*start, "cmtool", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)


def test_two_processes_make_the_samples_of_one(tmp_path):
    write_model(tmp_path, num_classes=3)
    assert make(tmp_path, "one.npz", 1) == 0
    done = make(tmp_path, "two.npz", 2)
    assert done.stdout.strip() == "two.npz"
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["arr_1"], two["arr_1"])
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"].astype(int)).max() <= 1
        assert one["arr_0"].shape == (7, 8, 8, 3)
    assert not list(tmp_path.glob(".*share*"))


@pytest.mark.slow
@pytest.mark.parametrize("out", ["folder", "grid.png"])
def test_more_processes_than_needed_fill_folders_and_grids(tmp_path, out):
    write_model(tmp_path)
    make(tmp_path, "one-" + out, 1, "-n", "2")
    make(tmp_path, "three-" + out, 3, "-n", "2")
    if out == "folder":
        assert sorted(p.name for p in (tmp_path / "three-folder").glob("*.png")) == ["000000.png", "000001.png"]
    assert (tmp_path / f"three-{out}").exists()
    assert not list(tmp_path.glob(".*share*"))


class Process:
    """Process `rank` of `size` whose others are asked one after another: flags are its own, nobody is waited for."""

    def __init__(self, rank, size):
        self.rank, self.size, self.main, self.local_rank = rank, size, rank == 0, 0

    def any(self, flag, device):
        return flag

    def rows(self, total):
        return World(self.rank, self.size).rows(total)

    def wait(self):
        pass


def test_a_finished_share_is_not_made_again(tmp_path, monkeypatch):
    """Killed when one share was whole, or while they were put together: what is there is taken as it is."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path, num_classes=3)
    assert make(tmp_path, "one.npz", 1) == 0
    job = {}
    monkeypatch.setattr("cmtool.api.sample.make", lambda made, *rest: job.update(made=made))
    assert make(tmp_path, "all.npz", 1) == 0
    assert make_in(Process(1, 2), job["made"], None, "cpu") is None
    share = tmp_path / (place_of_share(Path("all.npz"), 1, 2).name + ".partial")
    assert share.name == ".all.npz.share-1-of-2.partial"
    before = {file.name: file.stat().st_mtime_ns for file in share.iterdir()}
    (tmp_path / ".all.npz.share-0-of-5.partial").mkdir()
    with monkeypatch.context() as unable:
        unable.setattr("cmtool.api.sample.load_model", lambda *_: pytest.fail("the share is there"))
        assert make_in(Process(1, 2), job["made"], None, "cpu") is None
    assert {file.name: file.stat().st_mtime_ns for file in share.iterdir()} == before
    assert make_in(Process(0, 2), job["made"], None, "cpu") == Path("all.npz")
    with np.load("one.npz") as one, np.load("all.npz") as made:
        assert np.array_equal(one["arr_1"], made["arr_1"])
        assert np.abs(one["arr_0"].astype(int) - made["arr_0"].astype(int)).max() <= 1
    assert not list(tmp_path.glob(".*share*"))
