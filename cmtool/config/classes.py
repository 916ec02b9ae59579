"""Classes are matched by name: where two sides number the same names differently, one is renumbered. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmtool.errors import DataError

SHOWN = 6


def listed(names: Sequence[str]) -> str:
    """Write the first few names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def class_places(ours: Sequence[str], theirs: Sequence[str], who: str, we: str = "the data") -> list[int]:
    """Return for each of our classes its number among `theirs`; case is ignored as long as names stay distinct.

    Args:
        ours: the names of our classes, by number.
        theirs: the names of a model's classes, by number.
        who: what the model is called in messages, e.g. "the teacher m.safetensors".
        we: what has our classes, in messages.

    Raises:
        DataError: a name is missing among theirs, or stands for several classes.
    """
    known = _numbers(theirs)
    names = [_key(name, ours) for name in ours]
    missing = [name for name, key in zip(ours, names, strict=True) if key not in known]
    if missing:
        raise DataError(
            f"{we} {_has(we)} classes that {who} does not have: {listed(missing)} (it has {listed(theirs)}).",
            "classes go by name: give them the same names, or do without that model",
        )
    if len(set(names)) < len(names) or (len(known) < len(theirs) and list(ours) != list(theirs)):
        raise DataError(f"class names of {we} or of {who} stand for several classes.", "give each its own name")
    return [known[key] for key in names]


def _key(name: str, among: Sequence[str]) -> str:
    """Return the form in which names are compared: lower case, unless that makes two of them equal."""
    folded = [other.casefold() for other in among]
    return name.casefold() if len(set(folded)) == len(folded) else name


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {_key(name, names): index for index, name in enumerate(names)}


def _has(we: str) -> str:
    return "have" if we == "the data" else "has"


def check_number(
    classes: int, names: Sequence[str] | None, data: Mapping[str, Any], who: str, we: str = "the data"
) -> None:
    """Refuse data (or a model) with another number of classes than a model.

    Args:
        classes: our number of classes.
        names: their names, where they have some.
        data: the data table of the model's header.
        who: what the model is called in messages.
        we: what has our classes, in messages.

    Raises:
        DataError: names the setting that makes the numbers equal, if there is one.
    """
    theirs, known = data.get("num_classes"), data.get("class_names")
    if not theirs or theirs == classes:
        return
    if names and known:
        class_places(names, known, who, we)
    among = classes < theirs and we == "the data"
    hint = f"--set data.num_classes={theirs} if they are among its classes" if among else "do without that model"
    raise DataError(f"{we} {_has(we)} {classes} classes and {who} has {theirs}.", hint)


def class_map(model: Mapping[str, Any], other: Mapping[str, Any], who: str) -> list[int] | None:
    """Return for each class of a model its number in another model; None if both number them alike, or one has none.

    Args:
        model: the data table of the model's header.
        other: that of the other model.
        who: what the other is called in messages.

    Raises:
        DataError: the other model has other classes.
    """
    if not model.get("num_classes") or not other.get("num_classes"):
        return None
    ours, theirs = model.get("class_names"), other.get("class_names")
    if ours and theirs and list(ours) != list(theirs):
        return class_places(ours, theirs, who, "the model")
    check_number(model["num_classes"], ours, other, who, "the model")
    return None
