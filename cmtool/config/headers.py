"""What a model's header must look like before anything trusts it. Uses the standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Entries whose type the readers rely on; the code that needs one reports it if it is missing or null.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "preset": str,
    "recipe_name": str,
    "step": int,
    "seed": int,
    "network": dict,
    "process": dict,
    "data": dict,
    "recipe": dict,
    "times": dict,
    "figures": dict,
    "sample": dict,
    "edit": dict,
    "eval": dict,
    "origin": dict,
    "versions": dict,
    "machine": dict,
    "label_dropout": (int, float),
}
_DATA: dict[str, type | tuple[type, ...]] = {
    "resolution": int,
    "channels": int,
    "num_classes": int,
    "class_names": list,
    "fingerprint": str,
    "source": str,
    "path": str,
    "kind": str,
    "condition": str,
    "latent": dict,
}
_LONGEST = 1000  # noise levels for one number of evaluations


def wrong_in_header(header: dict[str, Any]) -> str | None:
    """Say what is wrong with the form of a header, or return None. The code that uses the values checks them."""
    wrong = _wrong_type(header, _TYPES) or _wrong_type(header.get("data") or {}, _DATA)
    if wrong is not None:
        return wrong
    data = header.get("data") or {}
    if data.get("latent") is not None and wrong_latent(data["latent"], data.get("channels")):
        return "its latents are described wrongly"
    names = data.get("class_names") or ()
    if not all(isinstance(name, str) for name in names):
        return "its class names are no text"
    return _wrong_times(header.get("times") or {})


def wrong_latent(latent: Any, channels: Any) -> bool:
    """Whether what a file says of its latents of so many channels is not what encoding writes."""

    def listed(key: str, kind: Any) -> list[Any]:
        found = latent.get(key)
        good = isinstance(found, list) and all(type(one) in kind for one in found)
        return found if good else []

    texts = all(isinstance(latent.get(key), str) for key in ("autoencoder", "hash", "norm"))
    numbers = all(len(listed(key, (int, float))) == channels for key in ("shift", "scale"))
    return not (texts and numbers and len(listed("pixels", (int,))) == 3)


def which_latents(latent: Mapping[str, Any] | None) -> list[Any] | None:
    """Return what makes two descriptions of latents the same ones; None for pictures."""
    return None if latent is None else [latent.get(key) for key in ("hash", "shift", "scale", "pixels")]


def missing_in_header(header: dict[str, Any]) -> str | None:
    """Name the first entry that a model needs and this header lacks; None if all are there."""
    data = header.get("data") or {}
    missing = [key for key in ("network", "process", "data") if not header.get(key)]
    missing += [key for key in ("resolution", "channels") if data.get(key) is None]
    return missing[0] if missing else None


def _wrong_type(table: dict[str, Any], types: dict[str, Any]) -> str | None:
    for key, kind in types.items():
        if table.get(key) is not None and (not isinstance(table[key], kind) or isinstance(table[key], bool)):
            return f"its {key.replace('_', ' ')} is of the wrong type"
    return None


def _wrong_times(times: dict[str, Any]) -> str | None:
    """Noise levels by number of evaluations: {"2": [80.0, 0.8]}."""
    for number, levels in times.items():
        if not number.isascii() or not number.isdigit() or not isinstance(levels, list) or len(levels) > _LONGEST:
            return "its sampling times are no lists of noise levels"
        if not all(isinstance(level, (int, float)) and math.isfinite(level) and level > 0 for level in levels):
            return "its sampling times are no noise levels"
    return None
