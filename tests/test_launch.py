"""How one of several processes ends."""

import os
import subprocess
import sys

import pytest

from cmtool.machine.launch import in_world, is_first

PROGRAM = """
import atexit, sys
from cmtool.machine.launch import main_of_a_rank

class Loud:
    def __del__(self):
        sys.__stderr__.write("finalized\\n")

loud = Loud()

def main():
    import threading, time
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    atexit.register(print, "handler")
    print("said", end=" ")
    if "raise" in sys.argv:
        raise RuntimeError("broken")
    return 3

main_of_a_rank(main)
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("broken", [False, True])
def test_a_rank_flushes_joins_and_runs_its_handlers_but_not_the_end_of_the_interpreter(processes, broken):
    env = os.environ | {"WORLD_SIZE": str(processes)}
    words = [sys.executable, "-c", PROGRAM, *(["raise"] if broken else [])]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "said thread\nhandler\n"
    assert done.returncode == (1 if broken else 3)
    assert ("RuntimeError: broken" in done.stderr) == broken
    assert ("finalized" in done.stderr) == (processes == 1)


@pytest.mark.parametrize(
    ("raised", "wanted"), [("SystemExit(7)", 7), ("SystemExit('why')", 1), ("KeyboardInterrupt", 130)]
)
def test_a_rank_keeps_the_exit_codes_of_python(raised, wanted):
    code = f"from cmtool.machine.launch import main_of_a_rank\ndef main():\n    raise {raised}\nmain_of_a_rank(main)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"WORLD_SIZE": "2"}, timeout=60)
    assert done.returncode == wanted


@pytest.mark.parametrize(
    ("size", "rank", "several", "first"),
    [
        ("", "", False, True),
        ("many", "1", False, True),
        ("1", "3", False, True),
        ("2", "0", True, True),
        ("2", "1", True, False),
    ],
)
def test_who_speaks(monkeypatch, size, rank, several, first):
    """A rank alone, as some schedulers set it, silences nobody."""
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    assert (in_world(), is_first()) == (several, first)


# Threads other than the first get no time while others compute: gloo's let go of their last tensor late.
STARVED = """
import os, sys, threading
import torch, torch.distributed as dist
from cmtool.machine.launch import main_of_a_rank

def main():
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    globals()["held"] = dist.group.WORLD
    dist.all_reduce(torch.ones(10))
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != threading.get_native_id():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    for _ in range(5):
        dist.all_reduce(torch.ones(10))
    dist.destroy_process_group()
    return 0

if sys.argv[3] == "plain":
    sys.exit(main())
main_of_a_rank(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="starves threads by Linux's scheduler")
def test_threads_of_gloo_do_not_abort_a_rank_that_ends(tmp_path):
    """Without `main_of_a_rank` more than half of these processes die of SIGABRT (`plain` for the last argument)."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        for trial in range(4):
            words = [sys.executable, "-c", STARVED, str(tmp_path / str(trial))]
            env = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            ranks = [subprocess.Popen([*words, str(rank), "ours"], env=env) for rank in range(2)]
            assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for process in busy:
            process.kill()
            process.wait()
