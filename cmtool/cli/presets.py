"""`cmtool presets`: the list, or one preset written out in full."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Json
from cmtool.cli.output import Output
from cmtool.config.find import list_presets, shown
from cmtool.config.toml import read_toml
from cmtool.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PresetsCommand:
    """The options of `cmtool presets`."""

    name: Annotated[str | None, typer.Argument(help="A preset's name or file; left out: list them all.")] = None
    json_mode: Json = False


@command
def presets(given: PresetsCommand) -> None:
    """List the presets with their published figures, or print one in full as TOML.

    Examples: cmtool presets digits | cmtool presets digits > my.toml, then: cmtool train-ct --preset my.toml
    """
    out = Output(given.json_mode)
    if given.name is None:
        _list(out)
    else:
        _show(given.name, out)


def _list(out: Output) -> None:
    documents = [_summary(name, path) for name, path in list_presets().items()]
    out.json(documents)
    rows = [[d["name"], d["resolution"], _wrapped(d["recipes"]), _figures(d), d["note"]] for d in documents]
    out.table("", ["preset", "px", "recipes", "FID in 1 / 2", "note"], rows)
    out.say("cmtool presets NAME shows one in full; cmtool train-ct --preset NAME trains it.")


def _summary(name: str, path: Path) -> dict[str, Any]:
    """Return a preset's entry in the list, read without the schema: one damaged file must not hide the others."""
    label = shown(path)
    try:
        tables, problem = read_toml(path, label), ""
    except ConfigError as error:
        tables, problem = {}, error.message
    about, data, recipes = (_dict(tables.get(key)) for key in ("about", "data", "recipe"))
    expected = {recipe: _dict(_dict(table).get("expected")) for recipe, table in recipes.items()}
    return {
        "name": name,
        "file": label,
        "title": about.get("title", ""),
        "note": problem or about.get("note", ""),
        "paper": about.get("paper", ""),
        "resolution": data.get("resolution"),
        "channels": data.get("channels", 3),
        "recipes": list(recipes),
        "default": _dict(_dict(tables.get("train")).get("default")),
        "expected": {recipe: table for recipe, table in expected.items() if table},
    }


def _wrapped(names: list[str]) -> str:
    """Join names with commas into short lines."""
    return textwrap.fill(", ".join(names), 14, break_long_words=False, break_on_hyphens=False)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _figures(document: dict[str, Any]) -> str:
    """Return the figures of the recipes that have some for one or two evaluations, one recipe a line."""
    known = {recipe: table for recipe, table in document["expected"].items() if "nfe1" in table or "nfe2" in table}
    return "\n".join(f"{recipe} {_fid(table, 'nfe1')} / {_fid(table, 'nfe2')}" for recipe, table in known.items())


def _fid(table: dict[str, Any], key: str) -> str:
    """Format a figure with as many digits as papers give: 8.70, but 13.0."""
    value = table.get(key)
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _show(name: str, out: Output) -> None:
    from cmtool.config.load import read_preset
    from cmtool.config.show import preset_document
    from cmtool.config.toml import write_toml

    document = preset_document(name)
    preset = read_preset(name)
    out.json({"name": preset.name, "file": preset.label, **document})
    out.result(f"# {preset.label}, every setting written out\n\n{write_toml(document)}")
