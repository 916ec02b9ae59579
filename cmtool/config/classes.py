"""Classes go by name: where two sides number the same names differently, one of them is renumbered. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmtool.errors import DataError

SHOWN = 6


def listed(names: Sequence[str]) -> str:
    """Write the first few names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def class_places(ours: Sequence[str], theirs: Sequence[str], who: str) -> list[int]:
    """Return for each of our classes its number among `theirs`; case makes no difference where names stay distinct.

    Args:
        ours: the names of the data's classes, by number.
        theirs: the names of the model's classes, by number.
        who: what the model is called in messages, e.g. "the teacher m.safetensors".

    Raises:
        DataError: a name is missing among theirs, or stands for several classes.
    """
    known = _numbers(theirs)
    names = [_key(name, ours) for name in ours]
    missing = [name for name, key in zip(ours, names, strict=True) if key not in known]
    if missing:
        raise DataError(
            f"the data have classes that {who} does not: {listed(missing)} (it has {listed(theirs)}).",
            "give the classes the model's names, or start without it",
        )
    if len(set(names)) < len(names) or (len(known) < len(theirs) and list(ours) != list(theirs)):
        raise DataError(f"class names of the data or of {who} stand for several classes.", "give each its own name")
    return [known[key] for key in names]


def _key(name: str, among: Sequence[str]) -> str:
    """Return what a name is compared by: its lower case, unless that makes two of them one."""
    folded = [other.casefold() for other in among]
    return name.casefold() if len(set(folded)) == len(folded) else name


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {_key(name, names): index for index, name in enumerate(names)}


def check_number(classes: int, names: Sequence[str] | None, data: Mapping[str, Any], who: str) -> None:
    """Refuse data with another number of classes than a model.

    Args:
        classes: number of classes of the data.
        names: their names, where they have some.
        data: the data table of the model's header.
        who: what the model is called in messages.

    Raises:
        DataError: with the setting that makes the numbers equal, where there is one.
    """
    theirs, known = data.get("num_classes"), data.get("class_names")
    if not theirs or theirs == classes:
        return
    if names and known:
        class_places(names, known, who)
    hint = f"--set data.num_classes={theirs} if they are among its classes" if classes < theirs else "start without it"
    raise DataError(f"the data have {classes} classes and {who} has {theirs}.", hint)
