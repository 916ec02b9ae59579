"""How threads wait for one another: awake while the machine is free, asleep while other programs want it too.

torch's thread pool on Linux is GNU OpenMP. After each parallel loop its threads stay awake for some milliseconds, since
the next loop usually comes sooner than a sleeping thread wakes up: `digits` trains 1.5 times as fast that way. On a
busy machine the same habit is ruinous. A thread that waits awake takes the core on which the thread it waits for would
have to run, and two trainings side by side fall to a twentieth of their speed.

libgomp cuts the wait to some hundred turns while it counts more threads in its teams than there are cores. So a second
team, which sleeps for good, puts threads to sleep quickly, and its end lets them wait awake again. Neither changes how
work is divided: results are the same to the bit.

Meanwhile threads ask the scheduler for short time slices (Linux 6.12 and later): one that was asleep then gets its core
back sooner from a process that never sleeps, and the rest of its team waits less.

Settings of the user's own (OMP_WAIT_POLICY, GOMP_SPINCOUNT) stay in force: what already sleeps at once still does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import threading
import time
from pathlib import Path

import torch

# Seconds between two checks of the machine.
EVERY = 0.5
# Threads that are ready to run and wait for a core, on average over one look: 0.01 to 0.05 on a quiet machine, 0.5 and
# more next to one busy process.
CROWDED, FREE = 0.2, 0.1
# Checks in a row that must find the machine free before threads wait awake again.
PATIENCE = 4

# Microseconds of a time slice while the machine is crowded; a few thousand are usual.
TURN = 100

TASKS = Path("/proc/self/task")
# The number of sched_setattr(2), which the C library has no name for.
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())


class Crowd:
    """Decides from how long threads waited for a core whether the machine is crowded; slow to call it free again."""

    def __init__(self) -> None:
        self.here = False
        self._free = 0

    def look(self, waiting: float) -> bool:
        """Return whether the machine is crowded, where `waiting` threads waited for a core on average of late."""
        self._free = self._free + 1 if waiting < FREE else 0
        self.here = waiting > CROWDED or (self.here and self._free < PATIENCE)
        return self.here


class SleepingTeam:
    """A second team of OpenMP threads that does nothing; libgomp only counts it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._end: threading.Event | None = None

    def gather(self, size: int) -> bool:
        """Start a team of `size` threads; False if there is one already."""
        if self._end is not None:
            return False
        there, self._end = threading.Event(), threading.Event()
        threading.Thread(target=self._hold, args=(size, there, self._end), name="cmtool-team", daemon=True).start()
        there.wait()
        return True

    def dismiss(self) -> bool:
        """Let the team end; False if there is none."""
        if self._end is None:
            return False
        self._end.set()
        self._end = None
        return True

    def _hold(self, size: int, there: threading.Event, end: threading.Event) -> None:
        # Each thread of the team calls free(NULL), which does nothing. libgomp keeps a team for as long as the thread
        # that started it lives.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        self._library.GOMP_parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
        there.set()
        end.wait()


def thread_library() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library that torch has loaded, None where it uses another or none."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        return library if hasattr(library, "GOMP_parallel") else None
    except OSError:
        return None


def ask_for_turns(microseconds: int) -> None:
    """Ask the scheduler for time slices of this length for this process's threads; 0: the usual ones.

    Niceness stays, and so do threads of another scheduling class. A system without such slices ignores it.
    """
    if SCHED_SETATTR is None:
        return
    system = ctypes.CDLL(None)
    for task in (int(name) for name in os.listdir(TASKS)):
        with contextlib.suppress(OSError):  # the thread has ended
            if os.sched_getscheduler(task) == os.SCHED_OTHER:
                nice = os.getpriority(os.PRIO_PROCESS, task)
                wish = struct.pack("=IIQiIQQQII", 56, os.SCHED_OTHER, 0, nice, 0, microseconds * 1000, 0, 0, 0, 0)
                system.syscall(ctypes.c_long(SCHED_SETATTR), ctypes.c_int(task), wish, ctypes.c_uint(0))


def waited() -> float | None:
    """Return the seconds for which threads of this process were ready and had no core; None if they are not counted."""
    total = 0
    try:
        for task in os.scandir(TASKS):
            try:
                total += int(Path(task.path, "schedstat").read_text().split()[1])
            except (ProcessLookupError, FileNotFoundError):
                if not os.path.exists("/proc/self/schedstat"):
                    return None  # the kernel was built without these numbers
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9


_started = threading.Lock()
_watching = False


def give_way() -> bool:
    """From now on, watch whether other programs want the machine, and let waiting threads sleep while they do.

    Returns whether this machine and its libraries can do that; calling it again changes nothing.
    """
    global _watching
    with _started:
        library = thread_library()
        if _watching or library is None or waited() is None:
            return _watching
        threading.Thread(target=_watch, args=(SleepingTeam(library),), name="cmtool-watch", daemon=True).start()
        _watching = True
    return True


def _watch(team: SleepingTeam) -> None:
    crowd, cores = Crowd(), len(os.sched_getaffinity(0))
    before, then = waited(), time.perf_counter()
    while before is not None:
        time.sleep(EVERY)
        after, now = waited(), time.perf_counter()
        if after is None:
            return
        # When a thread ends, its seconds leave the sum.
        crowd.look(max(after - before, 0.0) / (now - then))
        before, then = after, now
        threads = torch.get_num_threads()
        if crowd.here and threads > 1:
            if team.gather(max(cores - threads, 0) + 2):
                ask_for_turns(TURN)
        elif team.dismiss():
            ask_for_turns(0)
