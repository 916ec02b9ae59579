"""What is counted while tests run, by name and kind; said at the end of the run (see conftest.py)."""

from __future__ import annotations

from collections import Counter

COUNTED: dict[str, Counter[str]] = {"fault trials": Counter(), "fuzz inputs": Counter()}


def lines() -> list[str]:
    """One line for each name of which anything was counted."""
    return [
        f"{name}: {sum(kinds.values()):,} ({', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))})"
        for name, kinds in COUNTED.items()
        if kinds
    ]
