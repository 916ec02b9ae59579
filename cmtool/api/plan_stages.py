"""A planned run: what a call of `train` asks a plan for, and its stages trained one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cmtool.api.plan import Wishes
from cmtool.api.plan_run import Plan, made_by, of_teacher, read_plan, settle, usual_name
from cmtool.api.run_settings import Place, RunPlan, check_data, plan_run
from cmtool.config.load import resolve
from cmtool.config.methods import METHODS
from cmtool.errors import UsageError
from cmtool.machine.launch import in_world, is_first, local_rank
from cmtool.talk import Talk
from cmtool.training.clock import Clock
from cmtool.training.run_folder import PLAN, RunFolder

if TYPE_CHECKING:
    from cmtool.machine.world import World


class Ended(Protocol):
    """How the training of a stage ended (`api.train.TrainedRun`)."""

    @property
    def model(self) -> Path | None:
        """The finished model."""

    @property
    def was_finished(self) -> bool:
        """Whether there was nothing left to do."""


End = TypeVar("End", bound=Ended)


def time_limit(seconds: float | None, steps: int | None, settings: Any, talk: Talk) -> float | None:
    """Return the time of a run; None if there is none, or if steps are named: they win, which is said."""
    named = steps is not None or any(key.strip().partition("=")[0].strip() == "train.steps" for key in settings)
    if seconds is not None and named:
        talk.say("--steps and --time both say how long to train: the steps count, and --time is left out.")
        return None
    return seconds


def plan_of(
    request: Request, place: Place, device: str, talk: Talk, fresh: bool, dry_run: bool, held: ExitStack
) -> tuple[Plan, Path, Request]:
    """Return the plan for a request, its run folder, and what of the request is still to be said to its stages.

    Of several processes the first one plans; they stay together until `held` is closed.
    """
    path, wishes = str(request.flags["data.path"]), request.wishes()
    folder = place.folder(usual_name(wishes, path))
    wishes = of_teacher(wishes, path, talk)
    world = together(device, held)
    made = settle(wishes, path, folder, device, talk, fresh, dry_run) if is_first() else None
    plan = made if world is None else world.gather(made)[0]
    assert plan is not None
    flags = {"train.time": wishes.time, "teacher": wishes.teacher}
    return plan, folder, replace(request, recipe=None, settings=(), flags=flags)


def together(device: str, held: ExitStack) -> World | None:
    """Keep the processes of a launcher together until `held` is closed; None where there is one."""
    if not in_world():
        return None
    from cmtool.machine.device import choose_device
    from cmtool.machine.world import join_world

    return held.enter_context(join_world(choose_device(device, local_rank()).type))


def train_stages(
    plan: Plan,
    folder: Path,
    request: Request,
    run: Callable[[RunPlan, float | None, bool], End],
    clock: Clock,
    talk: Talk,
    world: World | None = None,
) -> End:
    """Train the stages of a plan one after another, each from the models before it that its recipe needs.

    Args:
        plan: the plan.
        folder: the run folder.
        request: what the command line says beside the plan.
        run: trains one run until a time of the clock; its model is the last one, to be searched for times and judged.
        clock: told what a stage that was finished before had spent.
        talk: told where each stage goes.
        world: the processes, which meet before each stage: it looks for models that the first one writes.
    """

    def meet() -> None:
        if world is not None:
            world.wait()

    if is_first():
        _pack(plan, folder, request, talk)
    meet()
    stages = list(stage_runs(plan, folder, request.flags.get("train.time"), clock.spent))
    made = {"diffusion": request.flags.get("teacher")}
    for number, stage in enumerate(stages, 1):
        last = number == len(stages)
        flags = {**request.flags, **_starts(plan, stage, made), "train.time": None}
        flags |= {} if last else {"train.steps": None}
        settings = request.settings if last else shared_settings(request.settings)
        run_plan = plan_run(plan.preset, stage.family, stage.recipe, settings, flags, Place(stage.folder), talk)
        if len(stages) > 1:
            talk.say(f"stage {number} of {len(stages)}: {stage.recipe}, in {stage.folder}")
        end = run(run_plan, stage.until, last)
        if end.model is None or last:
            return end
        meet()
        spent = RunFolder(stage.folder).spent() if end.was_finished else None
        if spent is not None:
            clock.go_on(spent)
        made["diffusion"] = made["diffusion"] or run_plan.config.teacher
        made[made_by(plan.preset, stage.recipe)] = made["newest"] = str(end.model)
    raise AssertionError("a plan has a stage")


def _starts(plan: Plan, stage: StageRun, made: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the models that a stage starts from: the newest of those `made` that its recipe needs."""
    needs = METHODS[plan.preset.method(stage.recipe)].get("needs", "nothing")
    init = made.get("consistency") if "consistency_init" in needs else made.get("newest") if needs == "init" else None
    return {"teacher": made["diffusion"] if "teacher" in needs else None, "init": init}


def _pack(plan: Plan, folder: Path, request: Request, talk: Talk) -> None:
    """Pack the pictures before the time is shared among the stages, none of which should pay for it alone."""
    if RunFolder(folder).finished():
        return
    from cmtool.data.load import load_dataset

    flags = {key: value for key, value in request.flags.items() if key not in ("teacher", "init")}
    last = plan.preset.tables["plan"]["stages"][-1]["recipe"]
    data = resolve(plan.preset, recipe=last, sets=request.settings, flags=flags).config.data
    check_data(data)
    load_dataset(data, talk)


@dataclass(frozen=True)
class StageRun:
    """A stage of a plan: its recipe, where it goes, and the seconds from the start by which its model is there."""

    recipe: str
    family: Any
    folder: Path
    until: float | None


def stage_runs(plan: Plan, folder: Path, limit: float | None, spent: float = 0.0) -> Iterator[StageRun]:
    """Yield the stages of a plan in their order; the last goes into the run folder itself.

    Args:
        plan: the plan.
        folder: the run folder.
        limit: the time for all of them; None: the plan's own, if it has one.
        spent: seconds of it that are gone before the first.
    """
    table = plan.preset.tables["plan"]
    limit = limit if limit is not None else table.get("time")
    rows, done = table["stages"], 0.0
    total = sum(row["share"] for row in rows)
    for index, row in enumerate(rows):
        done += row["share"] / total
        place = folder if index == len(rows) - 1 else folder / row["folder"]
        until = None if limit is None else spent + max(limit - spent, 0.0) * done
        yield StageRun(row["recipe"], plan.preset.family(row["recipe"]), place, until)


@dataclass(frozen=True)
class Request:
    """What a call of `train` said about settings; `flags` as `api.train` makes them."""

    family: Any
    recipe: str | None
    settings: Mapping[str, Any] | Sequence[str]
    flags: Mapping[str, Any]
    anyway: bool = False

    def wishes(self) -> Wishes:
        """Return them as wishes of a plan.

        Raises:
            UsageError: a model to start from is named, which only a preset takes.
        """
        given = {key: value for key, value in self.flags.items() if value is not None}
        if "init" in given:
            raise UsageError(
                "--init starts from a model, and a plan makes its own start; name the preset as well.",
                "--preset NAME, or the plan.toml of the run whose model it is",
            )
        family = self.family or METHODS.get(str(self.recipe), {}).get("family", "ct")
        known = {"train.time": "time", "train.steps": "steps", "data.resolution": "resolution"}
        known |= {"train.batch_size": "batch_size", "teacher": "teacher"}
        own = {known[key]: value for key, value in given.items() if key in known}
        named = {key: value for key, value in given.items() if key not in known and key != "data.path"}
        return Wishes(family, self.recipe, named=named, settings=self.settings, anyway=self.anyway, **own)


def planned_preset(preset: str | None, family: str | None, recipe: str | None, flags: Mapping[str, Any]) -> Plan | None:
    """Return the plan in a preset file that a request means as a whole; None for a single recipe of any preset."""
    if preset is None or recipe is not None or flags.get("init") or flags.get("teacher"):
        return None
    plan = read_plan(preset)
    if plan is None:
        return None
    last = plan.preset.family(plan.preset.tables["plan"]["stages"][-1]["recipe"])
    means = family in (None, last) or (family == "ct" and last == "cd")
    return plan if means else None


def whole_name(preset: str) -> str:
    """Return the name of the run folder of a plan that is named by its file: that of its folder, if it lies in one."""
    path = Path(preset)
    return path.resolve().parent.name if path.name == PLAN else path.stem


def shared_settings(settings: Mapping[str, Any] | Sequence[str]) -> Mapping[str, Any] | list[str]:
    """Return the settings that every stage takes: those of a recipe and the steps are the last one's."""

    def shared(key: str) -> bool:
        return not key.strip().startswith("recipe.") and key.partition("=")[0].strip() != "train.steps"

    if isinstance(settings, Mapping):
        return {key: value for key, value in settings.items() if shared(key)}
    return [text for text in settings if shared(text)]
