"""A preset written out in full: the shared tables with every default, and each recipe with all of its parts."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, create_model

from cmtool.config.explain import explain
from cmtool.config.load import Preset, read_preset, resolve
from cmtool.config.networks import NETWORKS
from cmtool.config.overrides import SHARED_TABLES
from cmtool.config.schema import RunConfig


def preset_document(name: str) -> dict[str, Any]:
    """Return a preset fully resolved, as nested tables that form a valid preset file again.

    Every recipe holds its method, all of its parts, and in sub-tables the settings in which it differs from the
    shared ones; resolving any recipe of the document gives the same configuration as resolving it in the original.

    Raises:
        ConfigError: as `resolve` does, for the first recipe that is wrong.
    """
    preset = read_preset(name)
    shared = {table: _shared(preset, table) for table in SHARED_TABLES}
    recipes = {recipe: _recipe(name, recipe, shared) for recipe in preset.recipes}
    about = preset.tables.get("about", {})
    sizes = {kind: table for kind, table in preset.tables.get("network", {}).items() if kind in NETWORKS}
    shared["network"] = shared["network"] | sizes
    shared["train"] = shared["train"] | ({"default": preset.default} if preset.default else {})
    plan = {"plan": preset.tables["plan"]} if "plan" in preset.tables else {}
    return {"about": about, **shared, **plan, "recipe": recipes}


def _shared(preset: Preset, table: str) -> dict[str, Any]:
    field = RunConfig.model_fields[table]
    named: dict[str, Any] = {table: (field.annotation, field)}
    alone = create_model("Shared", **named)
    try:
        return alone.model_validate({table: preset.tables.get(table, {})}).model_dump()[table]
    except ValidationError as error:
        raise explain(error, alone, {}, preset.label) from None


def _recipe(name: str, recipe: str, shared: dict[str, Any]) -> dict[str, Any]:
    config = resolve(name, recipe=recipe).config.model_dump()
    parts = {key: value for key, value in config["recipe"].items() if key not in ("family", "method")}
    changed = {table: difference(shared[table], config[table]) for table in SHARED_TABLES}
    return {"method": config["recipe"]["method"], **parts, **{table: keys for table, keys in changed.items() if keys}}


def difference(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of `other` that differ from `base`, table by table."""
    found: dict[str, Any] = {}
    for key, value in other.items():
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            inner = difference(before, value)
            found |= {key: inner} if inner else {}
        elif value != before:
            found[key] = value
    return found
