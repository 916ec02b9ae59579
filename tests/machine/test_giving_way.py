"""Waiting threads stay awake while the machine is quiet, sleep while it is crowded, and nothing else changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmtool.machine.giving_way import CROWDED, FREE, PATIENCE, Crowd, give_way, thread_library, waited

ROOT = Path(__file__).resolve().parents[2]
WITH_GNU_THREADS = pytest.mark.skipif(
    thread_library() is None or waited() is None, reason="needs GNU OpenMP and Linux's counts of waiting threads"
)


def test_one_look_at_a_crowd_is_enough_and_one_quiet_look_is_not():
    crowd = Crowd()
    assert not crowd.look(0.05)
    assert crowd.look(0.6)
    assert all(crowd.look(0.0) for _ in range(PATIENCE - 1))
    assert not crowd.look(0.0)


def test_a_look_in_between_starts_the_count_anew():
    crowd = Crowd()
    crowd.look(1.0)
    for waiting in (0.0,) * (PATIENCE - 1) + ((CROWDED + FREE) / 2,) + (0.0,) * (PATIENCE - 1):
        assert crowd.look(waiting)
    assert not crowd.look(0.0)


def test_what_is_neither_quiet_nor_crowded_keeps_what_was():
    middle, crowd = (CROWDED + FREE) / 2, Crowd()
    assert not any(crowd.look(middle) for _ in range(10))
    crowd.look(1.0)
    assert all(crowd.look(middle) for _ in range(10))


def two_threads(code: str) -> str:
    """Run Python with two threads and all of the machine's cores, whatever the tests themselves were given."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    start = "import os\nos.sched_setaffinity(0, range(os.cpu_count()))\nimport torch\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@WITH_GNU_THREADS
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_sleeping_team_ends_the_waiting_awake_and_its_end_brings_it_back():
    """In processor time, which does not depend on who else computes: a thread without work burns milliseconds of it."""
    spent = two_threads("""
import time
from cmtool.machine.giving_way import SleepingTeam, thread_library
x = torch.ones(1 << 18)
def spent():
    began = time.process_time()
    for _ in range(20):
        torch.add(x, 1.0, out=x)
        time.sleep(0.02)
    return time.process_time() - began
spent()
team = SleepingTeam(thread_library())
awake = spent()
assert team.gather(2) and not team.gather(2)
asleep = spent()
assert team.dismiss() and not team.dismiss()
time.sleep(0.2)
again = spent()
print(awake, asleep, again)
""")
    awake, asleep, again = map(float, spent.split())
    assert asleep < 0.35 * min(awake, again), spent


@WITH_GNU_THREADS
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_run_beside_busy_processes_gives_way_and_computes_the_same():
    said = two_threads("""
import subprocess, sys, threading, time
from cmtool.machine import giving_way
weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
x = torch.randn(32, 64, 16, 16, generator=torch.Generator().manual_seed(1))
def result():
    w = weight.clone().requires_grad_()
    torch.nn.functional.conv2d(x, w, padding=1).square().sum().backward()
    return w.grad
before = result()
assert giving_way.give_way() and giving_way.give_way()
loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
try:
    until = time.monotonic() + 60
    while time.monotonic() < until and not any(t.name == "cmtool-team" for t in threading.enumerate()):
        result()
    print(any(t.name == "cmtool-team" for t in threading.enumerate()), torch.equal(result(), before))
finally:
    for loop in loops:
        loop.kill()
print(sum(t.name == "cmtool-watch" for t in threading.enumerate()))
""")
    assert said.split() == ["True", "True", "1"]


@WITH_GNU_THREADS
def test_short_turns_leave_niceness_and_other_scheduling_classes_as_they_are():
    """A thread's turn is what sched_getattr(2) tells since Linux 6.12; before that it stays 0."""
    said = two_threads("""
import ctypes, platform, struct
from cmtool.machine.giving_way import ask_for_turns
os.nice(3)
def attributes():
    space = ctypes.create_string_buffer(56)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, space, 56, 0) == 0
    return struct.unpack("=IIQiIQQQII", space.raw)
usual = attributes()
ask_for_turns(100)
short = attributes()
ask_for_turns(0)
again = attributes()
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
ask_for_turns(100)
batch = attributes()
print(usual[3], short[3], again[3], batch[1] == os.SCHED_BATCH, short[5] in (0, 100_000), again[5] == usual[5])
""")
    assert said.split() == ["3", "3", "3", "True", "True", "True"]


def test_other_libraries_and_systems_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("cmtool.machine.giving_way._watching", False)
    monkeypatch.setattr("cmtool.machine.giving_way.TASKS", tmp_path / "none")
    assert waited() is None
    assert not give_way()
