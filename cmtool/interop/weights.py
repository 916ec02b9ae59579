"""Choose among several sets of weights in a checkpoint: an average beats raw weights, and the user is told."""

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
# Words joined to "ema": modelema, emaweights.
_BODY = r"(model|net|network|unet|g|state|statedict|params?|weights?|callback)"
_GLUED = re.compile(rf"{_BODY}ema|ema{_BODY}\w*")
# Auxiliary networks of a training run; taken only if there is nothing else.
_OTHER_ROLES = {"teacher", "target", "pretrained", "discriminator", "critic", "reference", "frozen"}
# Usual names of the trained network, likeliest first.
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
# Names added by wrappers, which say nothing about the weights.
WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Found(Generic[T]):
    """One set of weights in a file or folder.

    `parts` are the keys that lead to it, outermost first. `average` tells whether it is an average, and `explicit`
    whether a name says so or denies it. `reach` is the average's decay or width, where known: a larger one reaches
    further back. `begun` is False if nothing was averaged yet, `half` is True if most tensors are in half precision.
    `filled` counts the tensors taken from the raw weights because the average lacks them. `fault` is the reason why it
    cannot be used, or None.
    """

    parts: tuple[str, ...]
    average: bool
    contents: T
    explicit: bool = True
    reach: float | None = None
    begun: bool = True
    half: bool = False
    filled: int = 0
    fault: str | None = None

    @property
    def name(self) -> str:
        """The keys joined by dots, without those of wrappers."""
        return ".".join(part for part in self.parts if part not in WRAPPERS)

    @property
    def other_role(self) -> bool:
        """Whether a key names a teacher, a target or a discriminator."""
        return any(word in _OTHER_ROLES for part in self.parts for word in words_of(part))


def words_of(name: str) -> list[str]:
    """Return a key's words in lower case: "EMACallback{...}", "model_ema", "ema-0.999"."""
    head = name.partition("{")[0]
    return [word.lower() for word in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", head)]


def _says(name: str) -> bool | None:
    """Return whether one key says "average" (True) or "raw" (False); None for neither."""
    words = words_of(name)
    for before, word in zip(["", *words], words, strict=False):
        if word in _RAW or (word == "ema" and before in ("non", "no", "without")):
            return False
        if word == "avg" and before == "exp":  # an optimizer's average of gradients
            continue
        if word in _AVERAGE or _GLUED.fullmatch(word):
            return True
    return None


def says_average(parts: Sequence[str]) -> bool | None:
    """Return whether keys name an average; the innermost key that says anything decides, None if none does."""
    return next((said for part in reversed(parts) if (said := _says(part)) is not None), None)


def reach_of(parts: Sequence[str]) -> float | None:
    """Return the decay that the keys name ("ema_0.9999", "ema_9999"), None if they name no decay."""
    for part in reversed(parts):
        for number in re.findall(r"0?\.\d+|9{2,}\d*", part):
            value = float(number if "." in number else f"0.{number}")
            if 0 < value < 1:
                return value
    return None


def judged(parts: Sequence[str], contents: T, reach: float | None = None) -> Found[T]:
    """Return weights described by their keys."""
    said = says_average(parts)
    known = reach if reach is not None else reach_of(parts)
    return Found(tuple(parts), bool(said), contents, said is not None, known)


def settled(found: Iterable[Found[T]]) -> list[Found[T]]:
    """Recognize an average by its counterpart: next to weights called raw, those with a plain name are the average.

    Lightning does this: once there is a `current_model_state`, `state_dict` is the average.
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
    """Return the average that reaches furthest back; of equals the one in full precision, then of the likeliest name.

    Raises:
        UserError: if nothing decides.
    """
    compared = all(one.reach is not None for one in found)

    def order(one: Found[T]) -> tuple[float, bool, int]:
        return (-(one.reach or 0.0) if compared else 0.0), one.half, (0 if compared else _usual(one))

    ranked = sorted(found, key=order)
    if len(ranked) > 1 and order(ranked[0]) == order(ranked[1]):
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
    """Return the sets that `--weights` names.

    Raises:
        UserError: if there are none.
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
    """Return the weights to take and a sentence about the choice (None: there was none).

    `wanted`: "ema", "raw" or a name; None prefers an average.

    Raises:
        UserError: if the wanted weights are not there, or several fit and nothing decides.
        CheckpointError: if they are there but cannot be used.
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
    """Return a sentence about the choice."""
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


# --- averages in files of their own -----------------------------------------------------------------------------------


# guided-diffusion and consistency_models: model010000.pt, ema_0.9999_010000.pt, target_model010000.pt.
_SERIES = re.compile(r"(?P<what>model|target_model|teacher_model|ema_(?P<decay>[\d.]+)_)(?P<step>\d{6,})\.pt")
_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors")
_MOST = 2000


def _series(folder: Path) -> dict[str, list[Found[Path]]]:
    """Return the weights in a guided-diffusion run's folder by step."""
    steps: dict[str, list[Found[Path]]] = {}
    for file in sorted(folder.iterdir())[:_MOST]:
        if (match := _SERIES.fullmatch(file.name)) and file.is_file():
            name = match["what"].rstrip("_")
            decay = float(match["decay"]) if re.fullmatch(r"\d*\.\d+", match["decay"] or "") else None
            steps.setdefault(match["step"], []).append(judged((name,), file, decay))
    return steps


def newest_of_series(folder: Path) -> list[Found[Path]]:
    """Return the weights of the newest step of a guided-diffusion or consistency_models run, [] for other folders."""
    steps = _series(folder)
    return steps[max(steps, key=int)] if steps else []


def _stem(name: str) -> str:
    """Return a file name without the parts that distinguish an average from raw weights."""
    head = name
    for ending in _ENDINGS:
        head = head.removesuffix(ending)
    kept = re.sub(r"(?i)(^|[._-])(ema|swa|averaged?|0?\.\d+)(?=[._-]|$)", r"\1", head)
    return re.sub(r"[._-]+", "", kept.lower())


def full_beside(path: Path) -> list[str]:
    """Return the files next to one in half precision that hold the same in full: `x.safetensors` for `x.fp16...`."""
    plain = re.sub(r"(?i)[._-](fp16|bf16|half)(?=[._-])", "", path.name)
    names = (f"{plain.removesuffix(path.suffix)}{ending}" for ending in dict.fromkeys((path.suffix, *_ENDINGS)))
    return [name for name in names if plain != path.name and (path.parent / name).is_file()][:1]


def averages_beside(path: Path) -> list[str]:
    """Return the averages of raw weights among their neighbors, e.g. `x-EMA.ckpt` for `x.ckpt`.

    Empty for a path that is an average itself.
    """
    if says_average([path.stem if path.is_file() else path.name]) or not path.parent.is_dir():
        return []
    match = _SERIES.fullmatch(path.name)
    if match:
        return [one.contents.name for one in _series(path.parent).get(match["step"], []) if one.average]
    names = [entry.name for entry in sorted(path.parent.iterdir())[:_MOST] if entry.is_dir() == path.is_dir()]
    names = [name for name in names if path.is_dir() or name.endswith(_ENDINGS)]
    return [name for name in names if name != path.name and says_average([name]) and _stem(name) == _stem(path.name)]
