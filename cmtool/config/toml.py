"""TOML in and out: files are read with clear errors, and nested tables are written so that reading restores them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from cmtool.errors import ConfigError

_LARGEST = 1_000_000  # bytes; presets and settings have a few thousand, and parsing a hostile file takes seconds per MB
_DEEPEST = 50  # presets have three levels


def read_toml(path: Path, label: str | None = None) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: unreadable, not UTF-8, or not TOML; names the file (as `label`) and the line.
    """
    label = label or str(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ConfigError(f"{label} is larger than {_LARGEST // 10**6} MB; no preset is.")
        document = tomli.loads(data.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{label} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{label} is not a text file in UTF-8") from None
    except tomli.TOMLDecodeError as error:
        raise ConfigError(_syntax(label, str(error))) from None
    except RecursionError:
        raise ConfigError(f"{label} is nested too deeply.") from None
    if _is_deep(document):
        raise ConfigError(f"{label} is nested too deeply.")
    return document


def _is_deep(document: dict[str, Any]) -> bool:
    """Whether tables and lists are nested `_DEEPEST` levels deep; how much a parser can take depends on its release."""
    level: list[Any] = [document]
    for _ in range(_DEEPEST):
        inside = [value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer)]
        level = [value for value in inside if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _syntax(label: str, problem: str) -> str:
    found = re.search(r"(.*) \(at line (\d+), column (\d+)\)", problem, re.DOTALL)
    if not found:
        return f"{label} is not valid TOML: {problem}"
    what, line, column = found.groups()
    return f"{label}, line {line}, column {column}: not valid TOML: {what}"


def parse_value(text: str) -> Any:
    """Read one value as TOML would (3, 1e-4, true, [1, 2], {a = 1}); anything else is a string, no text is None."""
    if not text.strip():
        return None
    try:
        document = tomli.loads(f"value = {text}")
    except (tomli.TOMLDecodeError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def write_toml(tables: dict[str, Any]) -> str:
    """Write nested dictionaries as TOML; keys whose value is None are left out."""
    return tomli_w.dumps(_without_none(tables))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in table.items() if value is not None}
    return {key: _without_none(value) if isinstance(value, dict) else value for key, value in kept.items()}
