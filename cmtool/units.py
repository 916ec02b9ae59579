"""Sizes and lengths of time as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def human_bytes(count: float) -> str:
    """Return a size as people read it: 1.5 GB, 12 MB, 640 bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # From 999.5 of a unit on, rounding to three digits gives one of the next unit.
        if count >= 0.9995 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{int(count)} bytes"


def human_time(seconds: float) -> str:
    """Return a length of time as people read it: 40 s, 12 min, 3 h 05 min, 3.4 days, 35 days."""
    minutes, days = round(seconds / 60), seconds / 86_400
    if seconds < 90:
        return f"{seconds:.0f} s"
    if days >= 3:
        return f"{days:.2g} days" if days < 9.95 else f"{days:,.0f} days"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_ints(values: Sequence[int]) -> str:
    """Write whole numbers shortly, with ranges; `cli.options.parse_ints` reads it back."""
    parts: list[str] = []
    start = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[index - 1] + 1:
            run = values[start:index]
            parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            start = index
    return ",".join(parts)
