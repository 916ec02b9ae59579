"""Training as one call: find the preset and its models, open the run folder, train, close. Every command calls this."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, ParamSpec

from cmtool.api.plan_run import Plan
from cmtool.api.plan_stages import Request, plan_of, planned_preset, time_limit, together, train_stages, whole_name
from cmtool.api.run_settings import (
    RunPlan,
    Training,
    check_data,
    check_trackers,
    plan_extension,
    plan_run,
)
from cmtool.config.schema import DataConfig, RunConfig
from cmtool.errors import DataError, UsageError, UserError
from cmtool.machine.launch import is_first, local_rank
from cmtool.talk import SILENCE, Talk
from cmtool.training.clock import Clock, timekeeper_of

if TYPE_CHECKING:
    import torch

    from cmtool.evaluation.closing_search import RunJudge
    from cmtool.machine.stopping import Stop
    from cmtool.machine.world import World
    from cmtool.models import Model
    from cmtool.training.loop import Trainer
    from cmtool.training.report import Listener
    from cmtool.training.run_folder import RunFolder
    from cmtool.training.session import Closing, Session

P = ParamSpec("P")


@dataclass(frozen=True)
class TrainedRun:
    """How training ended.

    `model` is the finished model's file, None if the run was stopped before its end (by `signal`, or because it was
    `out_of_time`); the same call continues from there. `was_finished`: there was nothing left to do.
    """

    config: RunConfig
    folder: Path
    model: Path | None = None
    step: int = 0
    signal: int = 0
    out_of_time: bool = False
    was_finished: bool = False
    origins: dict[str, str] = field(default_factory=dict)
    plan: Plan | None = None

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return self.model is not None


def train_as(asked: Training) -> TrainedRun:
    """Train a model, or resume a run that was interrupted: the same call finds its folder again.

    The run saves checkpoints as it goes. Ctrl-C, SIGTERM and the time limit end it between two steps with everything
    saved; the result's `model` is then None.

    With `data` and without `preset` the run is planned: resolution, network, recipe and steps follow from the pictures,
    this machine and `time`; the plan is kept as `plan.toml` in the run folder (see `cmtool.plan`).

    Returns:
        How the run ended, with its settings, its folder and its model.

    Raises:
        UserError: anything that can be wrong with settings, data, models or the place; nothing is written then.
    """
    check_trackers(asked.track)
    asked = asked if is_first() else replace(asked, talk=SILENCE)
    how = _How(asked, Clock(monotonic()), None if asked.max_time is None else monotonic() + seconds_of(asked.max_time))
    limit = None if asked.time is None else seconds_of(asked.time)
    flags = asked.flags(time_limit(limit, asked.steps, asked.settings, asked.talk))
    family, recipe, settings, place, talk = asked.family, asked.recipe, asked.settings, asked.place(), asked.talk
    if asked.extend is not None:
        run_plan = plan_extension(Path(asked.extend), asked)
    elif asked.preset is None and asked.data is not None:
        request = Request(family, recipe, settings, flags, asked.anyway)
        with ExitStack() as held:
            plan, folder, request = plan_of(request, place, asked.device, talk, asked.fresh, asked.dry_run, held)
            return _whole(plan, folder, request, replace(how, asked=replace(asked, fresh=False)))
    else:
        whole = planned_preset(asked.preset, family, recipe, flags)
        if whole is not None:
            folder = place.folder(whole_name(str(asked.preset)))
            return _whole(whole, folder, Request(family, None, settings, flags), how)
        run_plan = plan_run(asked.preset or "digits", family, recipe, settings, flags, place, talk)
    if asked.dry_run:
        _say_absent(run_plan.config.data, talk)
        return TrainedRun(run_plan.config, run_plan.folder, origins=run_plan.origins)
    return _run(run_plan, how=how)


def _say_absent(data: DataConfig, talk: Talk) -> None:
    """Say that the data are not here, which keeps nobody from looking at settings for another machine."""
    if data.path is None:
        return
    try:
        check_data(data)
    except DataError as error:
        talk.warn(f"{error.message} Training with these settings would stop at once.")


def _spelled_out(options: Callable[P, Training]) -> Callable[P, TrainedRun]:
    """Return `train_as`, called with the options themselves: type checkers, editors and `help` show each of them."""

    def train(*args: P.args, **kwargs: P.kwargs) -> TrainedRun:
        return train_as(options(*args, **kwargs))

    train.__signature__ = inspect.signature(options).replace(return_annotation="TrainedRun")  # type: ignore[attr-defined]
    said, meanings = inspect.getdoc(train_as) or "", inspect.getdoc(options) or ""
    train.__doc__ = said.replace("Returns:", f"Args:{meanings.partition('Args:')[2]}\n\nReturns:")
    return train


train = _spelled_out(Training)


@dataclass(frozen=True)
class _How:
    """What was asked for, the clock since then, and when (in seconds of `monotonic`) to save and stop."""

    asked: Training
    clock: Clock
    deadline: float | None


def _whole(plan: Plan, folder: Path, request: Request, how: _How) -> TrainedRun:
    """Train all stages of a plan, or none."""
    asked = how.asked
    if asked.dry_run:
        return TrainedRun(plan.config, folder, plan=plan)
    with ExitStack() as held:
        world = together(asked.device, held)
        return train_stages(plan, folder, request, partial(_run, how=how), how.clock, asked.talk, world)


def _run(plan: RunPlan, until: float | None = None, last: bool = True, *, how: _How) -> TrainedRun:
    """Train one run to its end; `until` is the time by which its model is there, in seconds of its clock.

    `last`: no further stage follows, so that the finished model is searched for sampling times and judged.
    """
    folder, asked = _checked(plan, how.asked.fresh), how.asked
    if folder.finished() and not asked.fresh and _is_whole(folder, asked.talk):
        return TrainedRun(plan.config, folder.path, folder.model, plan.config.train.steps, was_finished=True)
    check_data(plan.config.data)
    with ExitStack() as held:
        session, stop = _open(held, plan, folder, how, until, last)
        session.begin(stop, sys.argv)
        for due in session.trainer.run(stop, session.intervals()):
            session.attend(due)
        end = session.end()
    return TrainedRun(plan.config, folder.path, end.model, end.step, end.signal, end.out_of_time)


def seconds_of(span: str | float) -> float:
    """Return a time span, given as "3h55m" or as a number of seconds, in seconds.

    Raises:
        UsageError: if it is not a time span.
    """
    from cmtool.machine.stopping import parse_span

    return parse_span(span) if isinstance(span, str) else float(span)


def _checked(plan: RunPlan, fresh: bool) -> RunFolder:
    """Return the run folder if the run may go there: everything that can be refused without torch is refused here."""
    from cmtool.training.lock import check_free
    from cmtool.training.run_folder import check_run

    folder = check_run(plan.folder, plan.config, fresh)
    check_free(plan.folder)
    return folder


def _is_whole(folder: RunFolder, talk: Talk) -> bool:
    """Say that the run is finished; return False if its model is damaged and has to be made again."""
    damage = folder.damage()
    if damage:
        talk.warn(f"{damage} It is made again from the newest whole checkpoint.")
        return False
    talk.say(f"the run in {folder.path} is finished; --fresh starts it over.")
    return True


# --- opening a run ---------------------------------------------------------------------------------------------------


def _open(
    held: ExitStack, plan: RunPlan, folder: RunFolder, how: _How, until: float | None, last: bool
) -> tuple[Session, Stop]:
    """Build the trainer, take the run folder, and return the session that runs both, and what asks it to stop.

    Everything that has to be released (the other processes, the lock, the progress bar, signal handlers, trackers) is
    put on `held`.
    """
    from cmtool.machine.device import choose_device
    from cmtool.machine.stopping import stoppable
    from cmtool.machine.world import join_world
    from cmtool.training.diagnosis import Diagnosis
    from cmtool.training.extend import keep_plateau
    from cmtool.training.report import Teller
    from cmtool.training.session import Session
    from cmtool.training.trackers import Several, tracked

    asked, diagnose, talk = how.asked, how.asked.diagnose, how.asked.talk
    place = choose_device(asked.device, local_rank())
    world = held.enter_context(join_world(place.type))
    trainer = _trainer(plan, None if asked.fresh else folder, place, world, talk)
    if diagnose and trainer.state.sharding is not None:
        raise UsageError("--diagnose asks networks that train.shard = true has split; leave one of them out.")
    if diagnose and plan.config.data.condition:
        raise UsageError("--diagnose knows no pictures beside the input, and data.condition asks for them.")
    _take_folder(held, plan, asked.fresh, trainer, talk)
    judge, closing = judges(trainer, talk if last else SILENCE)
    closing = closing if last else None
    config = plan.config
    update = held.enter_context(talk.progress(config.train.steps, f"{config.preset} {config.recipe_name}"))
    stop = held.enter_context(stoppable(how.deadline))
    view: Listener = Teller(talk, update)
    view = view if asked.listener is None else Several([view, asked.listener])
    view = held.enter_context(tracked(view, asked.track if world.main else (), folder.path, config))
    seen = _work(config)
    judged = last and judge is not None and judge.is_worth(trainer.state.ema, seen)
    quick = judge is not None and judge.quick
    timekeeper = timekeeper_of(config, how.clock, until, searches=closing is not None, judged=judged, quick=quick)
    session = Session(trainer, folder, view, judge, closing, timekeeper)
    if judge is not None and judge.own:
        session.judges_at_end, session.protocol = judged, judge.protocol
    session.chores += [chore for chore in (keep_plateau(session),) if chore is not None]
    if diagnose:
        told = diagnose if callable(diagnose) else None
        session.chores.append((config.train.checkpoint_every, Diagnosis(trainer, folder.path, told)))
    return session, stop


def _trainer(plan: RunPlan, goes_on: RunFolder | None, device: torch.device, world: World, talk: Talk) -> Trainer:
    """Load the data and build everything, so that all refusals come before the run folder is touched."""
    from cmtool.data.dataset import describe
    from cmtool.data.latents import in_latents
    from cmtool.data.load import load_dataset
    from cmtool.machine.device import set_up_torch
    from cmtool.training.classes import settle_classes
    from cmtool.training.forecast import check_disk
    from cmtool.training.setup import prepare

    config = plan.config
    set_up_torch(config.train.threads, config.train.deterministic)
    dataset = load_dataset(config.data, talk, plan.found)
    for line in describe(dataset):
        talk.say(line)
    if config.train.compile:
        talk.say("compiling the networks: some seconds for small ones, minutes for large ones")
    dataset = settle_classes(config, dataset, goes_on, talk)
    trainer = prepare(in_latents(config, dataset), dataset, device, world)
    for note in trainer.notes:
        talk.say(note)
    check_disk(plan.folder, trainer.needs.disk)
    return trainer


def _take_folder(held: ExitStack, plan: RunPlan, fresh: bool, trainer: Trainer, talk: Talk) -> None:
    """Lock and open the run folder in the first process; the others wait for it."""
    from cmtool.training.lock import locked
    from cmtool.training.run_folder import open_run

    if trainer.world.main:
        left = held.enter_context(locked(plan.folder))
        if left is not None:
            talk.say(f"the process that trained here before (pid {left.pid} on {left.host}) was killed.")
        folder = open_run(plan.folder, plan.config, fresh)
        before = folder.data()
        if folder.checkpoints() and before not in (None, trainer.dataset.fingerprint):
            talk.warn(
                f"the data have changed since {folder.path} was last trained: the run goes on with the images of "
                "today. For one that sees them from its start add --fresh."
            )
    trainer.world.wait()


def judges(trainer: Trainer, talk: Talk) -> tuple[RunJudge | None, Closing | None]:
    """Return what evaluates during training and what searches for sampling times at the end; either may be missing.

    Without a reference, or if its files are not on this machine, a run trains without evaluation, and says so if
    evaluation was requested. A user's own images are judged by those that were held out; latents are not, since a large
    autoencoder takes a second or more to decode an image.
    """
    config, data = trainer.config, trainer.dataset
    if not trainer.world.main:
        return None, None
    if config.eval.reference is None and (data.held_out is None or data.latent is not None):
        _say_unjudged(config, talk)
        return None, None
    from cmtool.evaluation.closing_search import RunJudge, short_search

    try:
        judge = RunJudge.of(config.eval, trainer.state.ema, data)
    except UserError as error:
        if config.train.eval_every:
            talk.warn(f"no evaluation during training: {error.message}")
        return None, None
    count = judge.search_count(_work(config))

    def closing(model: Model, late: Callable[[], bool]) -> dict[str, Any]:
        talk.say("searching sampling times for 2 to 4 steps")
        return short_search(model, judge.judge, count=count, seconds=180 if judge.slow else 60, late=late)

    return judge, closing if config.family != "edm" and count else None


def _work(config: RunConfig) -> int:
    """Return the images that a run sees, in those of a recipe without score distillation, which costs three times."""
    return config.train.steps * config.train.batch_size * (1 if config.recipe.score.kind == "none" else 3)


def _say_unjudged(config: RunConfig, talk: Talk) -> None:
    """Say what a run without any reference goes without."""
    if config.train.eval_every:
        talk.warn("no evaluation during training: the run has no reference (--set eval.reference=...).")
    elif config.data.holdout and config.family != "edm":
        talk.say("There is no reference, so no sampling times are searched at the end.")
