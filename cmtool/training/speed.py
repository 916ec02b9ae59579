"""How fast this machine trains the networks that a plan chooses from, measured in seconds."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from cmtool.config.laws import Size
from cmtool.config.schema import RunConfig
from cmtool.errors import ConfigError
from cmtool.samplers.generate import out_of_memory
from cmtool.training.bench import stand_in_data, trial

# A trial takes about this many steps: the first ones choose algorithms, and two more are timed.
STEPS = 4
# Networks of different kinds do as much work in times that differ by up to about this factor.
UNALIKE = 4.0


def measure(
    candidates: Sequence[tuple[Size, int]],
    config_of: Callable[[Size, int], RunConfig],
    device: torch.device,
    seconds: float,
) -> dict[tuple[str, int], float]:
    """Return training images a second by (network, resolution) of as many candidates as `seconds` allow.

    Of each network the candidates with the least work come first; at least one is measured. A candidate that would take
    more than half of the remaining time, judged by those of its kind, is skipped: its speed is inferred from the work
    of a similar one.

    Args:
        candidates: networks with resolutions.
        config_of: the settings of a run of one; its batch is what is timed.
        device: where.
        seconds: the time for all but the first one, whose trial pays for imports too.
    """
    found: dict[tuple[str, int], float] = {}
    ends, paces = math.inf, dict[str, float]()
    for size, resolution in sorted(candidates, key=lambda one: one[0].work(one[1])):
        try:
            config = config_of(size, resolution)
        except ConfigError:  # a named setting does not fit this one
            continue
        batch = config.train.batch_size if device.type == "cuda" else min(config.train.batch_size, 32)
        pace = paces.get(size.kind) or UNALIKE * max(paces.values(), default=math.inf)
        if STEPS * batch * size.work(resolution) / pace > (ends - time.monotonic()) / 2:
            continue
        try:
            timed = trial(config, stand_in_data(config), device, config.train.precision, batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            continue
        if not found:
            ends = time.monotonic() + seconds
        found[size.name, resolution] = timed.images_per_s
        paces[size.kind] = max(paces.get(size.kind, 0.0), timed.images_per_s * size.work(resolution))
    return found


def free_memory(device: torch.device) -> float | None:
    """Return the bytes free on the device, in main memory for a CPU; None where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.M)
        return None if found is None else 1024.0 * int(found[1])
    return None
