"""Two processes, started once for all tests that look at what they found."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.tiny import teacher_file

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """The folder that both processes of tests/training/shard_worker.py have written into."""
    folder = tmp_path_factory.mktemp("two")
    teacher_file(folder / "teacher.safetensors")
    teacher_file(folder / "weak.safetensors", seed=6)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.shard_worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
