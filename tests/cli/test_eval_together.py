"""Figures found by several processes are those of one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cmtool.config.load import resolve, to_toml
from cmtool.evaluation.features import Batch, Features
from cmtool.evaluation.measure import _run, _together
from cmtool.evaluation.samples import from_array
from cmtool.files.atomic import atomic_text
from cmtool.machine.world import World
from tests.cli.tiny import write_model


@pytest.fixture
def judge(tmp_path, cmtool, monkeypatch):
    """`cmtool eval --json` with features of its own, on one thread each as torchrun sets it; one process is this one."""

    def judged(processes, *arguments):
        words = ["eval", *arguments, "--device", "cpu", "--json"]
        cache = str(tmp_path / f"cache-{processes}")
        if processes > 1:
            return _launched(tmp_path, processes, cache, words)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CMTOOL_CACHE", cache)
        assert torch.get_num_threads() == 1
        typed = cmtool(*words)
        assert typed.code == 0, typed.err
        return json.loads(typed.out)

    return judged


def _launched(folder, processes, cache, words):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*start, "cmtool", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CMTOOL_CACHE": cache}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=True)
    return json.loads(done.stdout)


def test_two_processes_find_the_figures_of_one(tmp_path, judge):
    g = np.random.default_rng(0)
    for name, count in (("a.npz", 150), ("b.npz", 70)):
        np.savez(tmp_path / name, arr_0=g.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8))
    arguments = ("a.npz", "b.npz", "--ref", "digits", "--batch-size", "32")
    one, two = (judge(processes, *arguments) for processes in (1, 2))
    assert one["results"][0]["metrics"]["fid"] > 0 and one["results"][1]["count"] == 70
    assert two == one


def test_samples_are_made_and_judged_together_with_one_log(tmp_path, judge):
    model = write_model(tmp_path, channels=1, source="digits")
    atomic_text(model.parent / "config.toml", to_toml(resolve("digits").config))
    arguments = ("--model", str(model), "--ref", "digits", "-n", "41", "--batch-size", "16", "--metrics", "fid,pr")
    two = judge(2, *arguments)
    rows = (model.parent / "evaluations.jsonl").read_text().splitlines()
    assert len(rows) == 1 and json.loads(rows[0])["count"] == 41
    files = list((tmp_path / "samples").iterdir())
    assert [path.suffix for path in files] == [".npz"]
    one = judge(1, *arguments)
    assert one["results"] == two["results"]


def test_shares_of_any_number_of_processes_fit_together():
    """Whole batches go to one process: every network call is the one that a single process makes."""

    def call(pixels):
        flat = pixels.reshape(len(pixels), -1).astype(np.float64)
        return Batch(flat[:, :4] + flat.sum(), flat[:, :3], flat[:, :2])

    images = from_array(np.random.default_rng(1).integers(0, 256, (53, 4, 4, 3), dtype=np.uint8), "x")
    network = Features("x", "x", call)
    one = _together([_run(images, network, 8, lambda n: None, World())])
    for size in (2, 3, 11):
        done = []
        shares = [_run(images, network, 8, done.append, World(rank, size)) for rank in range(size)]
        several = _together(shares)
        assert np.array_equal(several.features, one.features)
        assert np.array_equal(several.probabilities, one.probabilities)
        np.testing.assert_allclose(several.spatial.covariance, one.spatial.covariance, rtol=1e-12)
        assert several.spatial.count == 53
