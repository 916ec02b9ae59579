"""Whether two configurations are the same run."""

from __future__ import annotations

from typing import Any

from cmtool.config.schema import RunConfig

INTERVALS = ("log_every", "checkpoint_every", "sample_every", "eval_every", "keep_every", "snapshot_every")
# What may differ between two starts of one run: descriptions, intervals, the use of the machine, the reaction to a bad
# step, and what happens to the finished model.
MACHINE = ("threads", "micro_batch", "bad_step", "compile", "cuda_graphs", "shard")
FREE = {f"train.{key}" for key in (*INTERVALS, *MACHINE)} | {"recipe.title"}
FREE_TABLES = ("about.", "edit.", "recipe.expected.")


def differing_keys(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in `a`, value in `b`) for every setting that makes two runs different.

    Intervals, threads and micro-batches do not, nor does a precision that one of the two leaves to the machine
    ("auto").
    """
    left, right = _flat(a), _flat(b)
    keys = [key for key in left | right if left.get(key) != right.get(key) and not _free(key)]
    automatic = "auto" in (a.train.precision, b.train.precision)
    return [(key, left.get(key), right.get(key)) for key in keys if not (automatic and key == "train.precision")]


def _free(key: str) -> bool:
    return key in FREE or key.startswith(FREE_TABLES) or key == "recipe.expected"


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(table: dict[str, Any], path: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            else:
                flat[f"{path}{key}"] = value

    walk(config.model_dump(), "")
    return flat
