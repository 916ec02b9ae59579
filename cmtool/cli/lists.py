"""Lists as people type them: 80,0.8 and 0,22,39 and 37,40-47; without torch."""

from __future__ import annotations

from cmtool.errors import UsageError

# A list of seeds typed by hand; a larger one is a slip of the keyboard and would only fill memory.
MOST_SEEDS = 10_000_000


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """Return the numbers of a comma-separated list.

    Raises:
        UsageError: if an entry is no number.
    """
    return tuple(_number(entry, option) for entry in _entries(text, option))


def _entries(text: str, option: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise UsageError(f"{option} '{text}' has an empty entry; write numbers with commas between them.")
    return entries


def _number(entry: str, option: str) -> float:
    try:
        return float(entry)
    except ValueError:
        raise UsageError(f"{option}: '{entry}' is no number.") from None


def parse_ints(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of a comma-separated list with ranges: "37,40-43" is 37, 40, 41, 42, 43.

    Raises:
        UsageError: if an entry is neither a whole number nor a rising range.
    """
    values: list[int] = []
    for entry in _entries(text, option):
        low, dash, high = entry.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise UsageError(f"{option}: '{entry}' is neither a whole number nor a range such as 40-47.")
        first, last = int(low), int(high or low)
        if last < first:
            raise UsageError(f"{option}: the range '{entry}' runs backwards.")
        if len(values) + last - first >= MOST_SEEDS:
            raise UsageError(f"{option} names more than {MOST_SEEDS:,} numbers.")
        values.extend(range(first, last + 1))
    return tuple(values)
