"""Samples made by several processes are those of one."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest

from cmtool.cli.app import run
from cmtool.cli.sample_together import place_of_share, read_share
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


def test_a_share_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("cmtool.cli.sample_together.ROWS", 2)
    place = place_of_share(tmp_path / "a.npz", 1, 3)
    assert place.name == ".a.npz.share-1-of-3.npz"
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
    np.savez(place, arr_0=images, arr_1=np.arange(5))
    blocks = list(read_share(place))
    assert [len(samples) for samples, _ in blocks] == [2, 2, 1]
    assert np.array_equal(np.concatenate([samples for samples, _ in blocks]), images)
    assert [int(labels[0]) for _, labels in blocks] == [0, 2, 4]
