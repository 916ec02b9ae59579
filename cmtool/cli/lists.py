"""Lists as people type them: 80,0.8 and 0,22,39 and 37,40-47; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmtool.errors import UsageError, unknown
from cmtool.samplers.plan import SEED_BLOCK as BLOCK

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


def format_ints(values: Sequence[int]) -> str:
    """Write whole numbers shortly, with ranges; `parse_ints` reads it back."""
    parts: list[str] = []
    start = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[index - 1] + 1:
            run = values[start:index]
            parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            start = index
    return ",".join(parts)


def choose_seeds(num: int | None, seed: int | None, seeds: str | None, usual: int) -> Sequence[int]:
    """Return one seed for each sample: those listed, else `num` (or the usual number) from the block of `seed` (0).

    Raises:
        UsageError: if a list and a seed or another number are given, or the list cannot be read.
    """
    if seeds is None:
        count, block = usual if num is None else num, BLOCK * (seed or 0)
        return range(block, block + count)
    if seed is not None:
        raise UsageError("--seed and --seeds both name the seeds; give one of them.")
    listed = parse_ints(seeds, "--seeds")
    if num is not None and num != len(listed):
        raise UsageError(f"--num {num} and the {len(listed)} seeds of --seeds disagree; leave --num out.")
    return listed


def choose_labels(
    given: Sequence[str] | None, num_classes: int | None, names: Sequence[str] | None
) -> list[int] | None:
    """Return class numbers for names, numbers and "all"; None if nothing is given.

    Raises:
        UsageError: for a model without classes, or a label that it does not have.
    """
    if not given:
        return None
    if num_classes is None:
        raise UsageError("--label: this model is not conditioned on classes.", "leave --label out")
    chosen: list[int] = []
    for label in given:
        chosen.extend(_classes(label.strip(), num_classes, list(names or [])))
    return chosen


def choose_label(given: str | None, data: Mapping[str, Any]) -> int | None:
    """Return the one class that `given` names in a header's data table; None if nothing is given.

    Raises:
        UsageError: as `choose_labels`, or for "all".
    """
    chosen = choose_labels([given] if given else None, data.get("num_classes"), data.get("class_names"))
    if chosen and len(chosen) > 1:
        raise UsageError("--label all: one class is wanted here; name it.")
    return chosen[0] if chosen else None


def _classes(label: str, num_classes: int, names: list[str]) -> list[int]:
    if label.lower() == "all":
        return list(range(num_classes))
    by_name = {name.lower(): index for index, name in enumerate(names)}
    # A name wins over a number: the class called "3" may not be the third.
    if label.lower() in by_name:
        return [by_name[label.lower()]]
    if label.isdecimal() and int(label) < num_classes:
        return [int(label)]
    shown = names if 0 < len(names) <= 40 else [f"0 to {num_classes - 1}", "all"]
    raise UsageError(unknown("label", label, shown))
