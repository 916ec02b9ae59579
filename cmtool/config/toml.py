"""TOML in and out: files read with clear errors, plain tables written so that reading gives them back."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from cmtool.errors import ConfigError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")


def read_toml(path: Path, label: str | None = None) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: unreadable, not UTF-8, or not TOML; names the file (as `label`) and the line.
    """
    label = label or str(path)
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{label} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{label} is not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax(label, str(error))) from None


def _syntax(label: str, problem: str) -> str:
    found = re.search(r"(.*) \(at line (\d+), column (\d+)\)", problem, re.DOTALL)
    if not found:
        return f"{label} is not valid TOML: {problem}"
    what, line, column = found.groups()
    return f"{label}, line {line}, column {column}: not valid TOML: {what}"


def parse_value(text: str) -> Any:
    """Read one value as TOML would (3, 1e-4, true, [1, 2], {a = 1}); what is no TOML is a string; empty is None."""
    if not text.strip():
        return None
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return document["value"] if len(document) == 1 else text


def write_toml(tables: dict[str, Any]) -> str:
    """Write nested dictionaries as TOML; keys whose value is None are left out."""
    return "\n".join(_table(tables, ())).strip() + "\n"


def _table(table: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict) and value is not None}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    if path and (lines or not table):
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _table(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if _BARE_KEY.match(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value if item is not None) + "]"
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return "{ " + inner + " }" if inner else "{}"
    return str(value)
