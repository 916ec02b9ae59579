"""Settings given on the command line (`--set a.b=c` and flags), and where the keys of a recipe belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmtool.config.explain import BY_PROGRAM, table_of, unknown_key
from cmtool.config.parts import RecipeConfig
from cmtool.config.schema import RunConfig, TrainConfig
from cmtool.config.toml import parse_value
from cmtool.errors import ConfigError, nearest

SHARED_TABLES = ("data", "network", "process", "train", "sample", "edit", "eval")
EXAMPLES = {
    "data": "data.path",
    "network": "network.channels",
    "process": "process.sigma_max",
    "train": "train.lr",
    "sample": "sample.steps",
    "edit": "edit.inpaint.first",
    "eval": "eval.count",
    "recipe": "recipe.curriculum.s1",
}
RECIPE_KEYS = tuple(key for key in RecipeConfig.model_fields if key not in ("method", "family"))


@dataclass(frozen=True)
class Override:
    """One value from the command line: its path below `RunConfig`, the value, and how it was written."""

    keys: tuple[str, ...]
    value: Any
    origin: str


def route(keys: tuple[str, ...], place: str) -> tuple[str, ...]:
    """Return the path below `RunConfig` of a key written in a recipe.

    Parts (`distance.kind`) stay in the recipe, `network.channels` leads to that table, and a plain setting of
    training (`lr`) to `train`.

    Raises:
        ConfigError: no such key; `place` says where it was written.
    """
    head = keys[0]
    if head in SHARED_TABLES:
        return keys
    if head in RECIPE_KEYS:
        return ("recipe", *keys)
    if head in TrainConfig.model_fields:
        return ("train", *keys)
    raise ConfigError(unknown_key(place, head, [*RECIPE_KEYS, *TrainConfig.model_fields, *SHARED_TABLES]))


def parse_sets(sets: Sequence[str] | Mapping[str, Any], recipe_name: str) -> list[Override]:
    """Read the values of `--set key=value`, in order, or a Python program's {key: value}.

    Raises:
        ConfigError: no equals sign, or a key that no table has.
    """
    if not isinstance(sets, Mapping):
        return [_parse_set(text, recipe_name) for text in sets]
    found = []
    for key, value in sets.items():
        origin = f"{BY_PROGRAM} {key}"
        found.append(Override(_locate(tuple(key.split(".")), origin, recipe_name), value, origin))
    return found


def _parse_set(text: str, recipe_name: str) -> Override:
    key, equals, value = text.partition("=")
    keys = tuple(part.strip() for part in key.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"--set '{text}' must look like key=value", "For example: --set train.lr=1e-4")
    origin = f"--set {'.'.join(keys)}"
    return Override(_locate(keys, origin, recipe_name), parse_value(value.strip()), origin)


def _locate(keys: tuple[str, ...], origin: str, recipe_name: str) -> tuple[str, ...]:
    if keys[0] in (*SHARED_TABLES, "recipe") and len(keys) == 1:
        raise ConfigError(f"{origin} is a whole table; name one of its settings, such as {EXAMPLES[keys[0]]}")
    if keys[0] not in (*SHARED_TABLES, "recipe"):
        raise ConfigError(f"{origin} names no setting{_where(keys[-1])}", "cmtool presets NAME shows every setting.")
    if keys[0] != "recipe":
        return keys
    if len(keys) > 2 and keys[1] == recipe_name:
        keys = ("recipe", *keys[2:])
    if keys[1] in ("method", "family"):
        raise ConfigError(f"{origin} cannot be set: --recipe chooses the method", "cmtool presets NAME lists recipes.")
    return route(keys[1:], origin)


def _where(key: str) -> str:
    """Name the tables that have a setting of this name or the nearest to it."""
    homes = {}
    for table in SHARED_TABLES:
        model = table_of(RunConfig, table)
        homes.update({f"{table}.{name}": name for name in (model.model_fields if model else ())})
    homes.update({f"recipe.{name}": name for name in RECIPE_KEYS})
    exact = [path for path, name in homes.items() if name == key]
    close = exact or [path for path, name in homes.items() if name in nearest(key, set(homes.values()), count=1)]
    return f". Did you mean {' or '.join(close)}?" if close else ""


FLAG_NAMES = {"data.path": "--data", "data.source": "--data", "train.extra_emas": "--set train.extra_emas"}


def flag_overrides(flags: dict[str, Any]) -> list[Override]:
    """Turn flags (dotted key -> value, None where the flag was not given) into overrides named as options."""
    given = {key: value for key, value in flags.items() if value is not None}
    return [Override(tuple(key.split(".")), value, _flag(key)) for key, value in given.items()]


def _flag(key: str) -> str:
    return FLAG_NAMES.get(key, "--" + key.rpartition(".")[2].replace("_", "-"))
