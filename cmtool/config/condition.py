"""`data.condition`: the picture that a network sees beside its noisy input. Needs no torch.

`superres:N` is a picture of 1/N of the side, `gray` its brightness, `edges` an edge map; anything else is the path of
a folder or zip that holds a picture for every image, under the same name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

KINDS = ("superres:N", "gray", "edges")
_SUPERRES = re.compile(r"superres(?::(.*))?", re.DOTALL)


class Condition(NamedTuple):
    """What `data.condition` says: a kind, a number of channels, the factor of superres, the path of pairs."""

    kind: str
    channels: int
    factor: int = 1
    path: str = ""

    @property
    def is_derived(self) -> bool:
        """Whether the picture is computed from the image itself."""
        return self.kind != "pairs"


def parse_condition(text: str, channels: int, side: int) -> Condition:
    """Return what a condition means for images of this many channels and this side.

    Raises:
        ValueError: one sentence without its full stop, for a condition that makes no sense for these images.
    """
    found = _SUPERRES.fullmatch(text)
    if found:
        factor = int(found[1]) if (found[1] or "").isdecimal() and len(found[1]) < 5 else 0
        if factor < 2 or side % factor:
            fitting = ", ".join(f"superres:{n}" for n in range(2, side + 1) if side % n == 0)
            raise ValueError(f"data.condition = '{text}' does not divide the side of {side} pixels; choose {fitting}")
        return Condition("superres", channels, factor)
    if text in ("gray", "edges"):
        if text == "gray" and channels != 3:
            raise ValueError(f"data.condition = 'gray' is for images of three channels, and these have {channels}")
        return Condition(text, 1)
    if not text.strip():
        raise ValueError(f"data.condition is empty; choose {', '.join(KINDS)} or a folder of pairs")
    return Condition("pairs", channels, path=text)


def condition_of(data: Mapping[str, Any]) -> Condition | None:
    """Return the condition that the `data` entry of a model's header names; None if there is none."""
    text = data.get("condition")
    return None if text is None else parse_condition(text, data["channels"], data["resolution"])


def same_condition(one: Condition | None, other: Condition | None) -> bool:
    """Whether two networks see the same kind of picture; pairs may lie in another place."""
    return one == other or (one is not None and other is not None and one[:3] == other[:3])
