"""Which weights are meant, of a checkpoint that holds several: an average wins over raw weights, and this is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from cmtool.errors import CheckpointError, UserError

T = TypeVar("T")

_AVERAGE = {"ema", "emas", "average", "averaged", "averages", "averaging", "avg", "swa", "shadow", "polyak"}
_RAW = {"online", "raw", "live", "current", "collected", "stored", "backup", "noema", "nonema"}
# Glued to "ema" in one word: modelema, emaweights.
_BODY = r"(model|net|network|unet|g|state|statedict|params?|weights?|callback)"
_GLUED = re.compile(rf"{_BODY}ema|ema{_BODY}\w*")
# Networks of a training run that are not what it trains; taken only if nothing else is there.
_OTHER_ROLES = {"teacher", "target", "pretrained", "discriminator", "critic", "reference", "frozen"}
# What a trained network is called, the likeliest first.
_USUAL = (
    "model",
    "state_dict",
    "model_state_dict",
    "net",
    "network",
    "unet",
    "student",
    "params",
    "online_model",
    "current_model_state",
    "generator",
)
# Names that wrappers add; they say nothing about the weights.
WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Found(Generic[T]):
    """One set of weights in a file or folder.

    `parts`: the keys that lead to it, outermost first; `average`: whether it is one; `explicit`: whether a name says
    what it is; `reach`: decay or width of the average, where it is known (larger reaches further back); `begun`: False
    where nothing was averaged yet; `filled`: tensors that it lacked and that came from the raw weights; `fault`: why it
    cannot be used, or None.
    """

    parts: tuple[str, ...]
    average: bool
    contents: T
    explicit: bool = True
    reach: float | None = None
    begun: bool = True
    filled: int = 0
    fault: str | None = None

    @property
    def name(self) -> str:
        """The keys joined by dots, without those of wrappers."""
        return ".".join(part for part in self.parts if part not in WRAPPERS)

    @property
    def other_role(self) -> bool:
        """Whether a name says that it is a teacher's, a target's or a discriminator's."""
        return any(word in _OTHER_ROLES for part in self.parts for word in words_of(part))


def words_of(name: str) -> list[str]:
    """Split a key into lower-case words: "EMACallback{...}", "model_ema", "ema-0.999"."""
    head = name.partition("{")[0]
    return [word.lower() for word in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", head)]


def _says(name: str) -> bool | None:
    """Whether one key says "average" (True) or "raw" (False); None: neither."""
    words = words_of(name)
    for before, word in zip(["", *words], words, strict=False):
        if word in _RAW or (word == "ema" and before in ("non", "no", "without")):
            return False
        if word == "avg" and before == "exp":  # the optimizer's average of gradients
            continue
        if word in _AVERAGE or _GLUED.fullmatch(word):
            return True
    return None


def says_average(parts: Sequence[str]) -> bool | None:
    """Whether the keys that lead to weights say that they are an average: the innermost that says something decides."""
    return next((said for part in reversed(parts) if (said := _says(part)) is not None), None)


def reach_of(parts: Sequence[str]) -> float | None:
    """Return the decay that the keys name ("ema_0.9999", "ema_9999"), None if they name none."""
    for part in reversed(parts):
        for number in re.findall(r"0?\.\d+|9{2,}\d*", part):
            value = float(number if "." in number else f"0.{number}")
            if 0 < value < 1:
                return value
    return None


def judged(parts: Sequence[str], contents: T, reach: float | None = None) -> Found[T]:
    """Return weights with what their keys say about them."""
    said = says_average(parts)
    known = reach if reach is not None else reach_of(parts)
    return Found(tuple(parts), bool(said), contents, said is not None, known)


def settled(found: Iterable[Found[T]]) -> list[Found[T]]:
    """Mark the average where it is the other one that says so: beside weights called raw, a plain name is the average.

    So Lightning writes it: `state_dict` is the average as soon as `current_model_state` lies beside it.
    """
    every = list(found)
    unsaid = [one for one in every if not one.explicit and not one.other_role]
    if len(unsaid) != 1 or any(one.average for one in every) or not any(one.explicit for one in every):
        return every
    (average,) = unsaid
    marked = replace(average, average=True, explicit=True)
    return [marked if one is average else one for one in every]


def _usual(found: Found[Any]) -> int:
    last = next((part for part in reversed(found.parts) if part not in WRAPPERS), "")
    return _USUAL.index(last) if last in _USUAL else len(_USUAL)


def _best(found: Sequence[Found[T]], where: Path | str) -> Found[T]:
    """Return the one that reaches furthest back, else the one of the likeliest name.

    Raises:
        UserError: if neither tells.
    """
    if len(found) == 1:
        return found[0]
    if all(one.reach is not None for one in found):
        ranked = sorted(found, key=lambda one: -(one.reach or 0))
        first, second = ranked[0].reach, ranked[1].reach
    else:
        ranked = sorted(found, key=_usual)
        first, second = _usual(ranked[0]), _usual(ranked[1])
    if first == second:
        kind = "averages" if found[0].average else "sets of weights"
        raise UserError(
            f"{where} holds several {kind}: {_list(found)}.", f"name one: --weights {found[0].name or 'NAME'}"
        )
    return ranked[0]


def _quoted(found: Found[Any]) -> str:
    return f"'{found.name}'" if found.name else "those without a prefix"


def _list(found: Iterable[Found[Any]]) -> str:
    return ", ".join(map(_quoted, found))


def _with_kinds(found: Iterable[Found[Any]]) -> str:
    return ", ".join(f"{_quoted(one)} ({_kind(one)})" for one in found)


def _kind(found: Found[Any]) -> str:
    if not found.average:
        return "raw"
    return "average" if found.begun else "an average that has averaged nothing yet"


def _wanted(found: Sequence[Found[T]], wanted: str, where: Path | str) -> list[Found[T]]:
    """Return what `--weights` names.

    Raises:
        UserError: if it is not there.
    """
    if wanted in ("ema", "raw"):
        named = [one for one in found if one.average == (wanted == "ema")]
    else:
        named = [one for one in found if wanted in (one.name, one.name.rpartition(".")[2]) and one.name]
    if named:
        return named
    what = {"ema": "no average", "raw": "no raw weights"}.get(wanted, f"no weights '{wanted}'")
    if len(found) == 1 and not found[0].name:
        about = "an average, as its name says" if found[0].average else "which it does not call an average"
        raise UserError(f"{where} holds {what}, but one set of weights alone, {about}.", "leave --weights out")
    raise UserError(
        f"{where} holds {what}; it holds {_with_kinds(found)}.", "leave --weights out, or name one of these"
    )


def choose(found: Sequence[Found[T]], wanted: str | None, where: Path | str) -> tuple[Found[T], str | None]:
    """Return the weights to take, and what is to be said about it (None: there was no choice).

    `wanted`: "ema", "raw", a name, or None: an average where there is one.

    Raises:
        UserError: if what is wanted is not there, or nothing tells which of several is meant.
        CheckpointError: if it is there and cannot be used.
    """
    if wanted is not None:
        pool = _wanted(found, wanted, where)
        pool = [one for one in pool if not one.other_role] or pool
    else:
        mine = [one for one in found if not one.other_role] or list(found)
        pool = [one for one in mine if one.average and one.begun] or [one for one in mine if not one.average] or mine
    taken = _best(pool, where)
    if taken.fault:
        other = " --weights raw takes the raw weights" if any(not one.average for one in found) else None
        raise CheckpointError(f"the average {_quoted(taken)} of {where} cannot be used: {taken.fault}.", other)
    return taken, _told(taken, [one for one in found if one is not taken])


def _told(taken: Found[Any], others: Sequence[Found[Any]]) -> str | None:
    """Return the sentence about what was taken."""
    if not others:
        if not taken.name:
            return None
        what = "took the average" if taken.average else "no average is there; took the raw weights"
        return f"{what} {_quoted(taken)}."
    if not taken.average:
        return f"took the raw weights {_quoted(taken)} beside {_with_kinds(others)}; --weights NAME takes another."
    raw = [one for one in others if not one.average]
    also = [one for one in others if one.average]
    text = f"took the average {_quoted(taken)}"
    if raw:
        text += f" beside the raw weights {_list(raw)}; --weights raw takes those"
    if also:
        text += f"; also there: {_list(also)} (--weights NAME)"
    if taken.filled:
        text += f"; {taken.filled} tensors that it lacks came from the raw weights"
    return f"{text}."
