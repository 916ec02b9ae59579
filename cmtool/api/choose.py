"""What users name: seeds, labels, picture files; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmtool.errors import UsageError, UserError, nearest, unknown
from cmtool.samplers.plan import SEED_BLOCK


def choose_seeds(num: int | None, seed: int | None, seeds: Sequence[int] | None, usual: int) -> Sequence[int]:
    """Return one seed for each sample: those listed, else `num` (or the usual number) from the block of `seed` (0).

    Raises:
        UsageError: a list and a seed or another number are given, or no sample is asked for.
    """
    if seeds is None:
        count, block = usual if num is None else num, SEED_BLOCK * (seed or 0)
        if count < 1:
            raise UsageError("no sample is asked for; num must be at least 1.")
        return range(block, block + count)
    if seed is not None:
        raise UsageError("--seed and --seeds both name the seeds; give one of them.")
    if num is not None and num != len(seeds):
        raise UsageError(f"--num {num} and the {len(seeds)} seeds of --seeds disagree; leave --num out.")
    if not seeds:
        raise UsageError("no sample is asked for; there are no seeds.")
    return seeds


def choose_labels(
    given: Sequence[str | int] | None, num_classes: int | None, names: Sequence[str] | None
) -> list[int] | None:
    """Return class numbers for names, numbers and "all"; None if nothing is given.

    Raises:
        UsageError: for a model without classes, or a label that it does not have.
    """
    if not given:
        return None
    if num_classes is None:
        raise UsageError("--label: this model is not conditioned on classes.", "leave --label out")
    chosen: list[int] = []
    for label in given:
        chosen.extend(_classes(str(label).strip(), num_classes, list(names or [])))
    return chosen


def choose_label(given: str | int | None, data: Mapping[str, Any]) -> int | None:
    """Return the one class that `given` names in a header's data table; None if nothing is given.

    Raises:
        UsageError: as `choose_labels`, or for "all".
    """
    asked = None if given in (None, "") else [str(given)]
    chosen = choose_labels(asked, data.get("num_classes"), data.get("class_names"))
    if chosen and len(chosen) > 1:
        raise UsageError("--label all: one class is wanted here; name it.")
    return chosen[0] if chosen else None


def _classes(label: str, num_classes: int, names: list[str]) -> list[int]:
    if label.lower() == "all":
        return list(range(num_classes))
    by_name = {name.lower(): index for index, name in enumerate(names)}
    # A name wins over a number: the class called "3" may not be the third.
    if label.lower() in by_name:
        return [by_name[label.lower()]]
    if label.isdecimal() and int(label) < num_classes:
        return [int(label)]
    shown = names if 0 < len(names) <= 40 else [f"0 to {num_classes - 1}", "all"]
    raise UsageError(unknown("label", label, shown))


def check_pictures(images: Sequence[Any]) -> None:
    """Refuse pictures given as paths that are not files; nothing is opened.

    Raises:
        UserError: a file is not there, or is a folder.
    """
    for image in [Path(one) for one in images if isinstance(one, (str, Path))]:
        if not image.exists():
            raise UserError(f"{image}: no such file.", lookalike(image))
        if image.is_dir():
            raise UserError(f"{image} is a folder; name the pictures in it.", f"e.g. {image}/*.png")


def lookalike(missing: Path) -> str:
    """Suggest the file with the nearest name to one that is missing, else how to list what is there."""
    beside = [path.name for path in missing.parent.iterdir()] if missing.parent.is_dir() else []
    close = nearest(missing.name, beside, count=1)
    return f"did you mean {missing.parent / close[0]}?" if close else f"ls {missing.parent} shows what there is"


def is_latent(header: Mapping[str, Any]) -> bool:
    """Whether a model's samples are latents: images of floats, which no picture can hold."""
    return bool(header["data"].get("float_samples")) and header["data"]["resolution"] > 1


def check_condition(header: Mapping[str, Any], condition: Path | None) -> None:
    """Refuse a picture for a model that takes none, and one that does not exist.

    Raises:
        UsageError: one sentence.
    """
    if condition is not None and not header["data"].get("condition"):
        raise UsageError("--condition is for models that were trained with data.condition, and this one was not.")
    if condition is not None and not condition.exists():
        raise UsageError(f"--condition {condition} does not exist.")
