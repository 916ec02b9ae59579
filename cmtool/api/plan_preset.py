"""A choice written down: the preset with its [plan] table, in which everything stands that was named."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from cmtool.api.plan import Choice, Planned, Wishes, named_settings
from cmtool.config import laws
from cmtool.config.load import Preset, resolve
from cmtool.config.methods import METHODS
from cmtool.config.overrides import Override
from cmtool.config.sources import SOURCES, named_source, source_of_path

if TYPE_CHECKING:
    from cmtool.data.look import Look


def preset_of(choice: Choice, look: Look, wishes: Wishes, lines: Sequence[str] = ()) -> Preset:
    """Return the plan as a preset whose [plan] table lists its stages; what was named stands in it."""
    named = named_source(look.path)
    data: dict[str, Any] = {"source": named} if named else {"source": source_of_path(look.path), "path": look.path}
    data |= {"resolution": choice.resolution, "channels": choice.channels}
    data |= {"labels": choice.labels}
    data |= {"small": "upscale"} if look.smaller_than(choice.resolution) else {}
    tables: dict[str, Any] = {
        "about": {"title": f"a plan for {look.path}", "note": "\n".join(lines)},
        "data": data,
        "network": choice.size.network(choice.resolution),
        "train": _train_table(choice),
        "sample": {"times": dict(laws.SAMPLING_TIMES)},
        "plan": {
            **({"time": float(wishes.seconds)} if wishes.steps is None else {}),
            "stages": [_stage_row(one) for one in choice.stages],
            "asked": asked(wishes, look),
        },
        "recipe": {one.stage.recipe: _recipe_row(one, choice) for one in choice.stages},
    }
    if laws.PLACES["augment"] is not None:
        _put(tables, tuple(laws.PLACES["augment"].split(".")), choice.augment)
    for key, value in laws.ALSO.items():
        _put(tables, tuple(key.split(".")), value)
    if named and SOURCES[named].usual == (choice.resolution, choice.channels):
        _put(tables, ("eval", "reference"), named)
    for override in named_settings(wishes):
        _name(tables, override, choice.stages[-1].stage.recipe)
    for one in choice.stages:
        rate = tables["train"]["lr"]
        if one.stage.lr != 1 and isinstance(rate, int | float):
            tables["recipe"][one.stage.recipe].setdefault("lr", one.stage.lr * rate)
    default: dict[str, str] = {one.stage.family: one.stage.recipe for one in reversed(choice.stages)}
    return Preset("plan", "plan.toml", tables, default)


def _train_table(choice: Choice) -> dict[str, Any]:
    most = max(one.steps for one in choice.stages)
    return {
        "steps": choice.stages[-1].steps,
        "batch_size": choice.batch,
        "optimizer": laws.OPTIMIZER,
        "lr": choice.size.lr,
        "warmup": 0.02,
        "decay": "linear",
        "decay_start": 0.3,
        "decay_end": 0.02,
        **({"label_dropout": 0.1} if choice.labels else {}),
        "ema": {"kind": "power", "std": 0.10},
        "log_every": max(1, min(10, most // 20)),
    }


def _stage_row(one: Planned) -> dict[str, Any]:
    return {"recipe": one.stage.recipe, "share": one.stage.share, "folder": one.stage.folder}


def _recipe_row(one: Planned, choice: Choice) -> dict[str, Any]:
    row = {"method": one.stage.recipe, "steps": one.steps, **deepcopy(one.stage.row)}
    row |= {"lr": choice.size.teacher_lr} if one.stage.family == "edm" else {}
    row |= {"micro_batch": one.micro} if one.micro else {}
    # The least of both: a plan made while the machine was busy foresees fewer steps than there will be.
    row |= {"checkpoint_every": max(50, one.steps // 20), "sample_every": max(200, one.steps // 3)}
    if METHODS[one.stage.recipe].get("curriculum", {}).get("scales") == "doubling":
        row["curriculum"] = {"s1": laws.by_least(laws.INTERVALS, one.steps)}
    if one.until is not None:
        before = [other.until for other in choice.stages if other.until is not None and other.until < one.until]
        row["time"] = round(one.until - max(before, default=0.0), 1)
    place = laws.PLACES["dropout"]
    if place is not None and choice.dropout and not _is_fixed(one.stage.recipe, tuple(place.split("."))):
        _put(row, tuple(place.split(".")), choice.dropout)
    return row


def _is_fixed(method: str, keys: tuple[str, ...]) -> bool:
    """Whether the row of a method says what a setting is."""
    return keys[1] in METHODS[method].get(keys[0], {})


def _put(tables: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        tables = tables.setdefault(key, {})
    tables[keys[-1]] = value


def _name(tables: dict[str, Any], override: Override, last: str) -> None:
    """Put a named setting where it counts for every stage; what the rows of the recipes say of it goes."""
    keys = override.keys
    if keys in (("train", "steps"), ("train", "time")):
        return  # the plan is made for them
    if keys[0] == "recipe":
        return _put(tables["recipe"][last], keys[1:], override.value)
    for name, row in tables["recipe"].items():
        if keys[0] == "train":
            row.pop(keys[1], None)
        elif keys[0] in row:
            row[keys[0]].pop(keys[1], None)
        if len(keys) > 1 and _is_fixed(name, keys):
            _put(row, keys, override.value)
    _put(tables, keys, override.value)


def asked(wishes: Wishes, look: Look) -> dict[str, Any]:
    """Return what a second call must ask for as well to go on with the plan; its time may be another."""
    given = {"family": wishes.family, "recipe": wishes.recipe, "steps": wishes.steps, "resolution": wishes.resolution}
    given |= {"batch_size": wishes.batch_size, "teacher": wishes.teacher, "data": look.path}
    named = {".".join(o.keys): _plain(o.value) for o in named_settings(wishes) if o.keys != ("train", "time")}
    return {key: value for key, value in given.items() if value is not None} | ({"set": named} if named else {})


def _plain(value: Any) -> Any:
    """Return a value as a TOML file gives it back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_preset(preset: Preset, wishes: Wishes) -> None:
    """Refuse settings that the schema does not take, in the words of the option that named them.

    Raises:
        ConfigError: as `resolve`.
    """
    stages = preset.tables["plan"]["stages"]
    if wishes.settings:
        resolve(preset, recipe=stages[-1]["recipe"], sets=wishes.settings)
    for row in stages:
        resolve(preset, recipe=row["recipe"])
