"""Choose a benchmark: those that compare with peers are modules, the others are separate scripts."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODULES = {
    "train-step": "train_step",
    "ect-step": "ect_step",
    "sample": "sampling",
    "teacher": "teacher_sampling",
    "equal-time": "equal_time",
    "eval": "eval_speed",
    "averages": "averages",
    "overhead": "overhead",
    "scale": "scale",
    "card": "card",
    "pair-cost": "pair_cost",
    "card-day": "card_day",
    "side-by-side": "side_by_side",
    "plan-laws": "plan_laws",
}
SCRIPTS = {
    "data": "data_loading",
    "digits-quality": "digits_quality",
    "editing-quality": "editing_quality",
    "editing-times": "editing_times",
}


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names with the rest; returns the exit code."""
    name = arguments[0] if arguments else ""
    if name in MODULES:
        importlib.import_module(f"benchmarks.{MODULES[name]}").main(arguments[1:])
        return 0
    if name in SCRIPTS:
        sys.argv = [f"benchmarks {name}", *arguments[1:]]
        sys.path.insert(0, str(HERE))
        runpy.run_path(str(HERE / f"{SCRIPTS[name]}.py"), run_name="__main__")
        return 0
    print(f"usage: python -m benchmarks {'|'.join([*MODULES, *SCRIPTS])} [options]", file=sys.stderr)
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
