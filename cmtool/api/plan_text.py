"""What a plan says of itself: five lines on what was chosen and why, and what is odd about the pictures."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cmtool.api.plan import Choice, Speeds, Wishes, has_classes, resolutions_for
from cmtool.config import laws
from cmtool.units import human_time

if TYPE_CHECKING:
    from cmtool.data.look import Look


def lines_of(choice: Choice, look: Look, wishes: Wishes, speeds: Speeds, now: float) -> list[str]:
    """Return the five lines: pictures, resolution and network, recipe, machine, end; `now` is the time (epoch)."""
    return [
        _pictures(look, choice),
        _resolution(choice, look, wishes),
        _recipe(choice, wishes),
        _machine(choice, look, speeds),
        _end(choice, wishes, now),
    ]


def _pictures(look: Look, choice: Choice) -> str:
    small, large = min(look.sizes, key=_area), max(look.sizes, key=_area)
    sizes = f"{small[0]} x {small[1]}" + (f" to {large[0]} x {large[1]}" if large != small else "")
    kind = "gray" if choice.channels == 1 else "color"
    if choice.labels and look.classes is not None:
        classes = f"{len(look.classes):,} classes"
    else:
        classes = "no classes" if not look.classes else "its classes left out"
    return f"pictures: {look.usable:,} in {look.path}, {sizes}, {kind}, {classes}"


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _resolution(choice: Choice, look: Look, wishes: Wishes) -> str:
    side = f"{choice.resolution} x {choice.resolution}"
    net = choice.size.described()
    if wishes.resolution is not None:
        why = "as named"
    elif choice.resolution == max(resolutions_for(look)):
        why = "the pictures' own size"
    elif choice.ratio >= 1:
        why = f"the largest at which {human_time(choice.seconds)} show it enough pictures"
    else:
        why = f"{human_time(choice.seconds)} are short even for this size"
    return f"size: {side} with {net}: {why}"


def _recipe(choice: Choice, wishes: Wishes) -> str:
    parts = []
    for one in choice.stages:
        what = "teacher " if one.stage.family == "edm" else "student " if one.stage.family == "cd" else ""
        what = "" if one.stage.recipe == laws.POLISH.recipe else what
        parts.append(f"{what}{one.stage.recipe}, {one.steps:,} steps of {choice.batch}")
    if wishes.recipe is not None or len(parts) == 1:
        why = "as named" if wishes.recipe else "what the command trains"
    else:
        why = "in equal time ahead of training from scratch"
    return f"recipe: {'; then '.join(parts)}: {why}"


def _machine(choice: Choice, look: Look, speeds: Speeds) -> str:
    where = f"{speeds.threads} thread{'s' * (speeds.threads != 1)}" if speeds.device == "cpu" else speeds.device
    seen = sum(one.steps for one in choice.stages) * choice.batch / max(look.usable, 1)
    micro = f", {choice.micro} at once" if choice.micro else ""
    return (
        f"machine: {where}, {speeds.precision}, {choice.speed:,.0f} images/s{micro}; each picture is seen "
        f"{seen:,.0f} times, dropout {choice.dropout:g}"
    )


def _end(choice: Choice, wishes: Wishes, now: float) -> str:
    clock = time.strftime("%H:%M", time.localtime(now + choice.seconds))
    day = " (another day)" if choice.seconds > 16 * 3600 else ""
    how = "steps follow the clock" if wishes.steps is None else f"{wishes.steps:,} steps as named"
    return f"done: at {clock}{day}, in {human_time(choice.seconds)} ({how}); expect {choice.expect[1]}"


def warnings_of(choice: Choice, look: Look) -> list[str]:
    """Return what is odd about the pictures and what is done about it, a sentence each."""
    said = []
    looked = f" of the {look.looked:,} looked at" if look.looked < look.count else ""
    if look.unusable:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in look.unusable.most_common())
        said.append(f"not used{looked}: {reasons}.")
    small, side = look.smaller_than(choice.resolution), choice.resolution
    cuts = [f"{small:,} smaller than {side} pixels are enlarged"] if small else []
    cuts += [f"{look.oblong:,} that are not square are cropped in the middle"] if look.oblong else []
    if cuts:
        said.append(f"sizes{looked}: {'; '.join(cuts)} (--fit pad or stretch keep all of a picture).")
    if look.gray and look.color:
        said.append(f"{look.gray:,} gray and {look.color:,} color pictures{looked}: all are trained in color.")
    if look.transparent:
        said.append(f"{look.transparent:,} pictures{looked} may have transparent parts, which are laid on white.")
    if look.looked and look.duplicates > laws.MANY_DUPLICATES * look.looked:
        said.append(
            f"{look.duplicates:,} pictures{looked} are exact copies of others: the model will repeat them more often "
            "than the rest. Remove them unless that is meant."
        )
    return [*said, *_classes(look), *look.notes]


def _classes(look: Look) -> list[str]:
    if not look.classes:
        return []
    if not has_classes(look):
        counts = sorted(look.classes.values())
        half = counts[len(counts) // 2]
        return [
            f"half of the {len(look.classes):,} classes have {half} picture{'s' * (half != 1)} or fewer, so the model "
            "learns none (--set data.labels=true for all of them)."
        ]
    alone = [name for name, count in look.classes.items() if count <= 1]
    if not alone:
        return []
    shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
    return [f"classes with one picture or none: {len(alone):,} ({shown}); what they learn is a copy."]
