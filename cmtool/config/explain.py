"""What the schema refuses, in one sentence: where it was written, what was given, what would be right."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, create_model

from cmtool.errors import ConfigError, nearest

# How the origin of a value begins that a Python program gave; that of a typed one is its option.
BY_PROGRAM = "settings"
_MUST = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "too_short": "a list of at least {min_length} values",
    "too_long": "a list of at most {max_length} values",
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a table",
    "model": "a table",
}


def table_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the table (pydantic model) that the field `key` of `model` holds, or None where it holds a value.

    If tables are told apart by their `kind`, it has the settings of all of them.
    """
    tables = _tables(model.model_fields[key].annotation) if key in model.model_fields else []
    return _merged(tuple(tables)) if len(tables) > 1 else next(iter(tables), None)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for arg in get_args(annotation) for found in _tables(arg)]
    return []


@functools.cache
def _merged(tables: tuple[type[BaseModel], ...]) -> type[BaseModel]:
    """Return one table with the settings of several, to name choices by; nothing is checked against it."""
    fields = {name: field for table in reversed(tables) for name, field in table.model_fields.items()}
    order = [name for name in getattr(tables[0], "ORDER", ()) if name in fields]
    kinds = tuple(table.model_fields["kind"].default for table in tables)
    named: dict[str, Any] = {name: (fields[name].annotation, fields[name]) for name in (*order, *fields)}
    return create_model("Tables", **named | {"kind": (Literal[kinds], kinds[0])})


def explain(error: ValidationError, model: type[BaseModel], origins: Mapping[str, str], default: str) -> ConfigError:
    """Turn the most telling complaint of pydantic into a `ConfigError`.

    Args:
        error: what pydantic raised for `model`.
        model: the schema, to name the choices of an unknown key.
        origins: dotted key -> where its value was written, e.g. "presets/my.toml: recipe.ict.distance.kind".
        default: where a key without an origin belongs, e.g. "presets/my.toml".
    """
    problems = error.errors(include_url=False)
    # A misspelt key is also a missing one: name the spelling.
    problem = _of_its_kind(next((found for found in problems if found["type"] == "extra_forbidden"), problems[0]))
    owner, keys = _resolve(model, problem["loc"])
    key = ".".join(keys)
    place = _place(key, origins, default)
    kind = problem["type"]
    if kind == "missing" and isinstance(problem["loc"][-1], int):
        return ConfigError(f"{place} has too few values: {problem['loc'][-1]}")
    if kind == "missing":
        return ConfigError(f"{default}: {key} is missing")
    if kind == "extra_forbidden":
        return ConfigError(unknown_key(place, keys[-1], list(owner.model_fields)))
    if kind == "value_error":
        return ConfigError(f"{place}: {problem['ctx']['error']}")
    return ConfigError(f"{place} = {shown_value(problem['input'])} {_requirement(problem, owner, keys[-1])}")


def _of_its_kind(problem: Any) -> Any:
    """Return a complaint about the kind of a table as one about its key `kind`."""
    if problem["type"] != "union_tag_invalid":
        return problem
    return {**problem, "type": "literal_error", "loc": (*problem["loc"], "kind"), "input": problem["input"]["kind"]}


def is_given(origin: str) -> bool:
    """Whether a value was typed or given by a program, and not written in a file."""
    return origin.startswith(("--", BY_PROGRAM))


def explain_unfit(error: Exception, origins: Mapping[str, str], default: str) -> ConfigError:
    """Turn the complaint about settings that do not go together into a `ConfigError`; arguments as for `explain`.

    The file is blamed unless one of the settings named was given; the hint says what to type next.
    """
    named = re.findall(r"\b(?:recipe|train|network|data|process)(?:\.[a-z]\w*)+", str(error))
    typed = any(
        is_given(origin) and (key in named or any(key.startswith(table + ".") for table in named))
        for key, origin in origins.items()
    )
    shown = Path(default).stem if default.startswith("presets/") else default
    usual = f"cmtool presets {shown} shows every setting; --set KEY=VALUE changes one." if origins else None
    return ConfigError(f"{'' if typed else default + ': '}{error}.", getattr(error, "hint", None) or usual)


def unknown_key(place: str, key: str, choices: Sequence[str]) -> str:
    """Say that the key at `place` is unknown, name those that exist there and the nearest."""
    return f"{place} is an unknown key; choose {', '.join(choices)}.{_suggestion(key, choices)}"


def _suggestion(word: str, choices: Sequence[str]) -> str:
    close = nearest(word, choices)
    return f" Did you mean {close[0]}?" if close else ""


def _resolve(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """Follow pydantic's location down to the first value; what is inside it was not written as a key."""
    owner, keys, chosen = model, [], False
    for part in loc:
        if isinstance(part, int):
            break
        if chosen and part in _choices(owner.model_fields["kind"].annotation):
            chosen = False  # not a key: the kind by which pydantic chose among the tables
            continue
        keys.append(part)
        inner = table_of(owner, part)
        if inner is None:
            break
        owner, chosen = inner, len(_tables(owner.model_fields[part].annotation)) > 1
    return owner, keys


def _place(key: str, origins: Mapping[str, str], default: str) -> str:
    """Return where `key` was written; for a table, the place of the key in it that was written last."""
    if key in origins:
        return origins[key]
    inside = [place for dotted, place in origins.items() if dotted.startswith(key + ".")]
    given = [place for place in inside if is_given(place)]
    if given:
        return given[-1]
    parent = key.rpartition(".")[0]
    while parent:
        if parent in origins:
            return origins[parent]
        parent = parent.rpartition(".")[0]
    return f"{default}: {key}"


def shown_value(value: Any) -> str:
    """Return a value as messages show it: in Python's notation, but with TOML's true and false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def requirement(problem: Any) -> str:
    """Return what a value must be ("must be at least 1") according to one of pydantic's complaints."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _MUST:
        return "must be " + _MUST[kind].format(**context)
    stem = kind.split("_")[0]
    return f"must be {_KINDS[stem]}" if stem in _KINDS else f"is not right: {problem['msg']}"


def _requirement(problem: Any, owner: type[BaseModel], key: str) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        choices = _choices(owner.model_fields[key].annotation) or [str(context.get("expected", ""))]
        return f"is unknown; choose {', '.join(choices)}.{_suggestion(str(problem['input']), choices)}"
    stem = kind.split("_")[0]
    if kind not in _MUST and stem in _KINDS:
        return "must be " + _accepted(owner, key, stem)
    return requirement(problem)


def _accepted(owner: type[BaseModel], key: str, stem: str) -> str:
    """Name what a field takes; a field of two kinds (a number or a list of them) names both."""
    field = owner.model_fields.get(key)
    names = [_KINDS[stem]]
    for arg in get_args(field.annotation) if field else ():
        name = _KINDS.get(getattr(get_origin(arg) or arg, "__name__", ""))
        if name and get_origin(field.annotation if field else None) in (Union, types.UnionType) and name not in names:
            names.append(name)
    return " or ".join(names)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for arg in get_args(annotation) for choice in _choices(arg)]
