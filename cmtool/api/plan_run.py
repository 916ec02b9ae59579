"""Plans made and kept: look, measure, choose; the file in the run folder; the settings of each stage."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cmtool.api.find import find_model
from cmtool.api.plan import (
    Choice,
    Speeds,
    Wishes,
    candidate,
    check_wishes,
    choose,
    resolutions_for,
    sizes_for,
    stages_of,
    with_named,
)
from cmtool.api.plan_preset import asked, check_preset, preset_of
from cmtool.api.plan_text import lines_of, warnings_of
from cmtool.api.run_settings import check_data
from cmtool.config import laws
from cmtool.config.explain import explain
from cmtool.config.load import Preset, read_preset, resolve
from cmtool.config.methods import METHODS
from cmtool.config.schema import DataConfig, StageRow
from cmtool.config.sources import named_source
from cmtool.config.toml import write_toml
from cmtool.errors import ConfigError, UserError
from cmtool.files.atomic import atomic_text
from cmtool.talk import SILENCE, Talk
from cmtool.training.lock import locked
from cmtool.training.run_folder import PLAN, RunFolder, clear_plan

if TYPE_CHECKING:
    import torch

    from cmtool.config.schema import RunConfig
    from cmtool.data.look import Look

# Seconds for measuring, and the share of a short run's time that it may take.
MEASURING, SHARE = 6.0, 0.05


@dataclass(frozen=True)
class Plan:
    """A plan as a preset, the lines that it says of itself, and the choice behind it (None: read from a file)."""

    preset: Preset
    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    choice: Choice | None = None

    @property
    def toml(self) -> str:
        """The plan as a preset file."""
        tables = dict(self.preset.tables)
        tables["train"] = {**tables["train"], "default": self.preset.default}
        return write_toml(tables)

    @property
    def config(self) -> RunConfig:
        """The settings of the last stage, without its teacher."""
        return resolve(self.preset, recipe=self.preset.tables["plan"]["stages"][-1]["recipe"]).config

    def document(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"plan": self.preset.tables, "said": list(self.lines), "warnings": list(self.warnings)}


def stem_of(path: str) -> str:
    """Return a name for the runs of these pictures."""
    name = Path(path.removeprefix("lsun:")).expanduser()
    stem = name.name if named_source(path) else name.resolve().stem
    return re.sub(r"[^\w.+-]+", "-", stem).strip("-.+") or "pictures"


def usual_name(wishes: Wishes, path: str) -> str:
    """Return the name of the run folder of a plan."""
    return stem_of(path) + {"ct": "", "cd": "-cd", "edm": "-teacher"}[wishes.family]


def make_plan(wishes: Wishes, path: str, device: str = "auto", talk: Talk = SILENCE) -> Plan:
    """Look at the pictures, measure the machine, and choose.

    Raises:
        UserError: nothing that can be trained on, too little time, or settings that the schema refuses.
    """
    wishes = with_named(wishes)
    stages_of(wishes)
    check_data(DataConfig(source="folder", path=path, resolution=1))
    from cmtool.data.look import look

    with talk.progress(None, f"looking at {path}"):
        found = look(path, wishes.named.get("data.kind"))
    check_wishes(wishes, found)
    check_early(wishes, found)
    speeds = measure_speeds(found, wishes, device, MEASURING, talk)
    choice = choose(found, wishes, speeds)
    speeds = replace(speeds, precision=precision_of(choice, found, wishes, device))
    lines = lines_of(choice, found, wishes, speeds, time.time())
    preset = preset_of(choice, found, wishes, lines[:-1])
    preset.tables["plan"]["machine"] = {"device": speeds.device, "threads": speeds.threads}
    check_preset(preset, wishes)
    return Plan(preset, lines, warnings_of(choice, found), choice)


def check_early(wishes: Wishes, found: Look) -> None:
    """Refuse settings that no run would take before anything is measured.

    Raises:
        ConfigError: as `resolve`.
    """
    side = wishes.resolution or max(resolutions_for(found))
    draft = candidate(found, wishes, Speeds({("small", 16): 1e9}), side, sizes_for(wishes, side)[0])
    check_preset(preset_of(draft, found, wishes), wishes)


def measure_speeds(found: Look, wishes: Wishes, device: str, seconds: float, talk: Talk = SILENCE) -> Speeds:
    """Measure the networks that a plan for these pictures chooses from."""
    import torch

    from cmtool.machine.device import choose_device, set_up_torch
    from cmtool.machine.launch import local_rank
    from cmtool.training.speed import free_memory, measure

    place = choose_device(device, local_rank())
    set_up_torch(None, False)

    def config_of(size: laws.Size, resolution: int) -> RunConfig:
        draft = candidate(found, wishes, Speeds({(size.name, resolution): 100.0}, place.type), resolution, size)
        preset = preset_of(draft, found, wishes)
        preset.tables["recipe"]["edm"] = {"method": "edm"}
        return resolve(preset, recipe="edm").config

    sides = [wishes.resolution] if wishes.resolution else resolutions_for(found)
    pairs = [(size, side) for side in sides for size in sizes_for(wishes, side)]
    allowed = min(seconds, SHARE * wishes.seconds)
    with talk.progress(None, "measuring this machine"):
        timed = measure(pairs, config_of, place, allowed)
    return Speeds(timed, _name(place), torch.get_num_threads(), free_memory(place))


def precision_of(choice: Choice, found: Look, wishes: Wishes, device: str) -> str:
    """Return the number format that the last stage of a plan will compute in on this machine."""
    from cmtool.machine.device import choose_device
    from cmtool.training.precision import settle_precision

    last = choice.stages[-1].stage.recipe
    config = resolve(preset_of(choice, found, wishes), recipe=last).config
    return settle_precision(config, choose_device(device)).name


def _name(place: torch.device) -> str:
    import torch

    return f"cuda ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else place.type


# --- the table of times and resolutions ------------------------------------------------------------------------------


def plan(
    data: str | Path,
    *,
    times: Mapping[str, float] = laws.TIMES,
    device: str = "auto",
    talk: Talk = SILENCE,
    anyway: bool = False,
) -> dict[str, Any]:
    """Return what plans for several times and resolutions would be, and what to expect of each.

    Args:
        data: pictures, as `--data` takes them.
        times: seconds by name.
        device: "auto", "cpu", "cuda" or "mps".
        talk: told what happens.
        anyway: plan for fewer than 50 pictures too.

    Returns:
        {"pictures": {...}, "machine": {...}, "rows": [{"time", "seconds", "resolution", "network", "stages", "ratio",
        "expect", "sentence", "chosen"}, ...]}; `chosen` marks what `train-ct --time` would take.

    Raises:
        UserError: no pictures that can be read, or too few.
    """
    check_data(DataConfig(source="folder", path=str(data), resolution=1))
    from cmtool.data.look import look

    found = look(str(data))
    check_wishes(Wishes(anyway=anyway), found)
    speeds = measure_speeds(found, Wishes(), device, MEASURING, talk)
    sides = sorted({side for side in resolutions_for(found) if side >= 16} or {resolutions_for(found)[-1]})
    rows = []
    for name, seconds in times.items():
        best = choose(found, Wishes(time=seconds, anyway=True), speeds)
        for side in sorted({*sides, best.resolution}):
            one = choose(found, Wishes(time=seconds, resolution=side, anyway=True), speeds)
            rows.append(_row(name, one, side == best.resolution))
    pictures = {"path": found.path, "count": found.usable, "sizes": len(found.sizes), "classes": found.classes}
    machine = {"device": speeds.device, "threads": speeds.threads}
    measured = {f"{name}-{side}": round(speed, 2) for (name, side), speed in speeds.measured.items()}
    return {"pictures": pictures, "machine": {**machine, "images_per_s": measured}, "rows": rows}


def _row(name: str, choice: Choice, chosen: bool) -> dict[str, Any]:
    stages = [{"recipe": one.stage.recipe, "steps": one.steps, "until": one.until} for one in choice.stages]
    word, sentence = choice.expect
    return {
        "time": name, "seconds": choice.seconds, "resolution": choice.resolution, "network": choice.size.name,
        "stages": stages, "batch_size": choice.batch, "ratio": round(choice.ratio, 3),
        "expect": word, "sentence": sentence, "chosen": chosen,
    }  # fmt: skip


# --- the plan of a run folder ----------------------------------------------------------------------------------------


def read_plan(path: str | Path) -> Plan | None:
    """Read a preset file as a plan; None if it is an ordinary preset.

    Raises:
        ConfigError: the file is no preset, or its stages name recipes that it does not have, or do not follow on.
    """
    preset = read_preset(str(path))
    if "plan" not in preset.tables:
        return None
    rows = preset.tables["plan"]["stages"]
    for index, row in enumerate(rows):
        try:
            StageRow.model_validate(row)
        except ValidationError as error:
            raise explain(error, StageRow, {}, f"{preset.label}: plan.stages[{index}]") from None
    folders = [row["folder"] for row in rows]
    for index, row in enumerate(rows):
        family = preset.family(row["recipe"]) if row["recipe"] in preset.fitting(None) else None
        place = f"{preset.label}: plan.stages[{index}]"
        if family is None:
            raise ConfigError(f"{place}.recipe = {row['recipe']!r} is no recipe of this file and no method.")
        lacking = lacks(preset, [before["recipe"] for before in rows[:index]], row["recipe"])
        if lacking is not None:
            raise ConfigError(f"{place}.recipe = {row['recipe']!r} {lacking}.")
        if folders.count(row["folder"]) > 1:
            raise ConfigError(f"{place}.folder = {row['folder']!r} is that of another stage.")
    return Plan(preset)


def made_by(preset: Preset, recipe: str) -> str:
    """Return what a recipe makes: a "diffusion" or a "consistency" model."""
    usual = "diffusion" if preset.family(recipe) == "edm" else "consistency"
    return str(METHODS[preset.method(recipe)].get("kind", usual))


def lacks(preset: Preset, before: Sequence[str], recipe: str) -> str | None:
    """Return what keeps a recipe from following on those before it; None if nothing does.

    The first stage may have a teacher from elsewhere.
    """
    needs, made = METHODS[preset.method(recipe)].get("needs", "nothing"), [made_by(preset, one) for one in before]
    if before and needs == "nothing":
        return "takes no teacher, and a later stage is given one"
    if before and needs == "teacher" and "diffusion" not in made:
        return "needs a teacher, and no stage before it makes one"
    if needs == "init" and not before:
        return "starts from a trained model, and no stage before it makes one"
    if "consistency_init" in needs and "consistency" not in made:
        return "starts from a consistency model, and no stage before it makes one"
    return None


def kept_plan(folder: Path, wishes: Wishes, path: str) -> Plan | None:
    """Return the plan that a run folder holds, None if it holds none.

    Raises:
        UserError: it was made for something else.
        ConfigError: the file is damaged.
    """
    if not (folder / PLAN).is_file():
        return None
    try:
        plan = read_plan(folder / PLAN)
    except ConfigError as error:
        raise ConfigError(error.message, "mend the file, or plan anew with --fresh") from None
    before = {} if plan is None else plan.preset.tables["plan"].get("asked", {})
    now = _asked_now(wishes, path)
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {before.get(key)} there, {now.get(key)} here" for key in differing)
        raise UserError(
            f"{folder} holds a plan for something else ({listed}).",
            "choose another folder with --name or --out, or start over with --fresh",
        )
    return plan


def _asked_now(wishes: Wishes, path: str) -> dict[str, Any]:
    from cmtool.data.look import Look

    return asked(with_named(wishes), Look(path, 0))


def settle(wishes: Wishes, path: str, folder: Path, device: str, talk: Talk, fresh: bool, dry_run: bool) -> Plan:
    """Return the plan of a run folder: the one that is there, else a new one, which is then written.

    Raises:
        UserError: the folder holds something else, or there is nothing to plan.
    """
    kept = None if fresh else kept_plan(folder, wishes, path)
    if kept is not None:
        talk.say(f"going by the plan in {folder / PLAN}")
        if not RunFolder(folder).finished():
            _say_machine(kept.preset.tables["plan"].get("machine", {}), device, talk)
        return kept
    if (folder / "config.toml").is_file() and not fresh:
        raise UserError(
            f"{folder} holds a run without a plan.",
            "choose another folder with --name or --out, or start over with --fresh",
        )
    plan = make_plan(wishes, path, device, talk)
    for line in plan.lines:
        talk.say(line)
    for warning in plan.warnings:
        talk.warn(warning)
    if not dry_run:
        with locked(folder):
            if fresh:
                clear_plan(folder)
            if not (folder / PLAN).is_file():  # another process may just have put one there
                atomic_text(folder / PLAN, plan.toml)
    return plan


def _say_machine(before: Mapping[str, Any], device: str, talk: Talk) -> None:
    """Say what another machine than that of the plan changes, and what it does not."""
    import torch

    from cmtool.machine.device import choose_device
    from cmtool.machine.launch import local_rank

    now = {"device": _name(choose_device(device, local_rank())), "threads": torch.get_num_threads()}
    if not before or before == now:
        return
    there, here = (f"{one.get('device')}, threads: {one.get('threads')}" for one in (before, now))
    talk.say(
        f"the plan was made on another machine ({there}; here {here}): its network, resolution, batch and shares of "
        "the time stay, the number of steps follows the pace of this one, and the last bits may differ."
    )


def of_teacher(wishes: Wishes, path: str, talk: Talk) -> Wishes:
    """Return the wishes for a student: pictures as its teacher knows them; train-cd takes the newest that fits.

    Raises:
        UserError: the named teacher is none.
    """
    if wishes.teacher is None and wishes.family != "cd":
        return wishes
    named = named_source(path)
    wanted = {"source": named} if named else {"path": path}

    def fits(header: Mapping[str, Any]) -> bool:
        data = header.get("data") or {}
        return header.get("recipe", {}).get("family") == "edm" and all(data.get(k) == v for k, v in wanted.items())

    try:
        found = find_model(wishes.teacher, kinds=("diffusion",), fits=fits, wanted="teacher", option="--teacher")
    except UserError:
        if wishes.teacher is not None:
            raise
        return wishes
    if wishes.teacher is None:
        talk.say(found.describe())
    data = found.header["data"]
    same = {"data.channels": data["channels"], "data.labels": bool(data.get("num_classes"))}
    return replace(
        wishes,
        teacher=str(found.path),
        resolution=wishes.resolution or data["resolution"],
        named={**same, **wishes.named},
    )
