"""Two processes, started once for all tests that look at what they found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.training.tiny import teacher_file

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """The folder that both processes of tests/training/shard_worker.py have written into.

    The workers of one run of pytest share it: the first to come starts the processes, the others wait.
    """
    together = tmp_path_factory.getbasetemp()
    together = together.parent if os.environ.get("PYTEST_XDIST_WORKER") else together
    folder = together / "two"
    with FileLock(together / "two.lock"):
        if not folder.is_dir():
            folder.mkdir()
            teacher_file(folder / "teacher.safetensors")
            teacher_file(folder / "weak.safetensors", seed=6)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command += ["-m", "tests.training.shard_worker", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT)
            (folder / "ended.txt").write_text(f"{done.returncode}\n{done.stderr[-3000:]}")
    ended = (folder / "ended.txt").read_text()
    assert ended.startswith("0\n"), ended
    return folder
