"""The allocator keeps what was freed: the next tensors of the same sizes fault no pages in."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from cmtool.machine.device import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    # As in a forward pass: many are alive at once, all are freed at the end.
    return len([torch.ones(1 << 20) for _ in range(40)])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    # Both begin where every tensor is mapped by itself; glibc's own moving thresholds make "leave" a matter of chance.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, env=fixed)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an allocator of glibc")
def test_kept_memory_is_not_mapped_anew() -> None:
    kept, plain = faults("keep"), faults("leave")
    assert kept < 1000
    assert plain > 20 * max(kept, 1)
