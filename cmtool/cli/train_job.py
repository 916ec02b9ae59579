"""One run of a train command: refuse what is wrong, hold the folder's lock, train, say how it ended."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from cmtool.cli.output import Output
    from cmtool.config.schema import RunConfig
    from cmtool.training.distributed import World
    from cmtool.training.loop import Trainer
    from cmtool.training.report import Outcome
    from cmtool.training.run_folder import RunFolder


def run(config: RunConfig, path: Path, given: dict[str, Any], deadline: float | None, output: Output) -> None:
    """Train in the run folder `path` and say how it ended.

    Args:
        config: what to train.
        path: the run folder.
        given: the command's options by name.
        deadline: when to stop, in seconds of `time.monotonic`; None: never.
        output: where to talk.

    Raises:
        UserError: whatever a user can have got wrong; nothing has been written then.
        typer.Exit: with the exit code of a run that was stopped.
    """
    from cmtool.cli.train_extras import check_data
    from cmtool.training.lock import check_free
    from cmtool.training.run_folder import check_run

    # Everything that can be refused without torch is refused before torch is imported.
    folder = check_run(path, config, given["fresh"])
    check_free(path)
    if folder.finished() and not given["fresh"] and _is_finished(folder, config, output):
        return
    check_data(config.data)
    from cmtool.training.distributed import join_world
    from cmtool.training.setup import choose_device

    device = choose_device(given["device"])
    with join_world(device.type) as world:
        _train_in(world, config, path, given, deadline, output)


def _is_finished(folder: RunFolder, config: RunConfig, output: Output) -> bool:
    """Say that the run is finished; False if its model is damaged and has to be made again."""
    damage = folder.damage()
    if damage:
        output.warn(f"{damage} It is made again from the newest whole checkpoint.")
        return False
    output.say(f"the run in {folder.path} is finished; --fresh starts it over.")
    output.result(str(folder.model))
    output.json({"model": str(folder.model), "steps": config.train.steps, "finished": True})
    return True


def _train_in(
    world: World, config: RunConfig, path: Path, given: dict[str, Any], deadline: float | None, output: Output
) -> None:
    from cmtool.training.lock import locked
    from cmtool.training.run_folder import RunFolder, open_run

    trainer = _prepare(world, config, path, given, output)
    with contextlib.ExitStack() as held:
        if world.main:
            left = held.enter_context(locked(path))
            if left is not None:
                output.say(f"the process that trained here before (pid {left.pid} on {left.host}) was killed.")
            _compare_data(open_run(path, config, given["fresh"]), trainer, output)
        world.wait()
        outcome = _session(trainer, RunFolder(path), given, deadline, output)
    _say_outcome(outcome, config, path, given, output)


def _compare_data(folder: RunFolder, trainer: Trainer, output: Output) -> None:
    """Warn where a run goes on with other images than it began with."""
    before, now = folder.data(), trainer.dataset.fingerprint
    if folder.checkpoints() and before is not None and before != now:
        output.warn(
            f"the data have changed since {folder.path} was last trained: the run goes on with the images of today. "
            "For one that sees them from its start add --fresh."
        )


def _say_outcome(outcome: Outcome, config: RunConfig, path: Path, given: dict[str, Any], output: Output) -> None:
    if outcome.model is None:
        why = "time limit reached" if outcome.out_of_time and not outcome.signal else "stopped"
        output.say(f"{why} after step {outcome.step} of {config.train.steps}; the same command goes on from there.")
        output.json({"model": None, "steps": outcome.step, "finished": False})
        code = 128 + outcome.signal if outcome.signal else 0
        # Ctrl-C is a person's wish to end it; the scheduler's signal and the time limit are not.
        if given["requeue_exit_code"] is not None and outcome.signal != signal.SIGINT:
            code = given["requeue_exit_code"]
        raise typer.Exit(code)
    _say_next(config, path, given, output)
    output.result(str(outcome.model))
    output.json({"model": str(outcome.model), "steps": outcome.step, "finished": True})


def _say_next(config: RunConfig, path: Path, given: dict[str, Any], output: Output) -> None:
    """Say what to type next: look at samples, and distil a teacher, or read how the run went."""
    run = shlex.quote(str(path))
    output.say(f"next: cmtool sample --model {run}")
    if config.family == "edm" and config.process.kind == "ve":
        preset = given["preset"] if given["extend"] is None else config.preset
        words = ["train-cd", "--preset", preset, *_data_words(config, given), "--teacher", str(path)]
        output.say(f"then: cmtool {shlex.join(words)}")
    else:
        output.say(f"then: cmtool report {run}")


def _data_words(config: RunConfig, given: dict[str, Any]) -> list[str]:
    """Return the options that name the data once more: a student of other pictures than its teacher's learns little."""
    from cmtool.config.judgments import PICTURES

    words = [*([] if given["data"] is None else ["--data", given["data"]])]
    if given["extend"] is not None and config.data.path is not None:
        words = ["--data", config.data.path]
    for name in ("small", "fit"):
        words += [f"--{name}", given[name]] if given[name] else []
    kept = (*PICTURES, "labels", "num_classes")
    for text in given["sets"] or ():
        words += ["--set", text] if text.strip().partition("=")[0].removeprefix("data.") in kept else []
    return words


def _prepare(world: World, config: RunConfig, path: Path, given: dict[str, Any], output: Output) -> Trainer:
    """Load the data and build everything, so that what can be refused is refused before the run folder is touched."""
    from cmtool.data.dataset import describe
    from cmtool.data.load import load_dataset
    from cmtool.errors import UsageError
    from cmtool.training.classes import settle_classes
    from cmtool.training.forecast import check_disk, forecast
    from cmtool.training.run_folder import RunFolder
    from cmtool.training.setup import choose_device, prepare, set_up_torch

    device = choose_device(given["device"], world.local_rank)
    set_up_torch(config.train)
    dataset = load_dataset(config.data, output)
    for line in describe(dataset):
        output.say(line)
    if config.train.compile:
        output.say("compiling the networks: some seconds for small ones, minutes for large ones")
    dataset = settle_classes(config, dataset, None if given["fresh"] else RunFolder(path), output)
    trainer = prepare(config, dataset, device, world)
    if given["diagnose"] and trainer.state.sharding is not None:
        raise UsageError("--diagnose asks networks that train.shard = true has split; leave one of them out.")
    for note in trainer.notes:
        output.say(note)
    check_disk(path, forecast(config, trainer.state).disk)
    return trainer


def _session(
    trainer: Trainer, folder: RunFolder, given: dict[str, Any], deadline: float | None, output: Output
) -> Outcome:
    from cmtool.cli.train_judges import judges
    from cmtool.cli.training_view import View
    from cmtool.training.extend import keep_plateau
    from cmtool.training.session import Session
    from cmtool.training.stopping import stoppable
    from cmtool.training.trackers import tracked

    config = trainer.config
    judge, closing = judges(trainer, output)
    with (
        output.progress(config.train.steps, f"{config.preset} {config.recipe_name}") as update,
        stoppable(deadline) as stop,
        contextlib.ExitStack() as tracking,
    ):
        names = (given["track"] or ()) if trainer.world.main else ()
        view = tracking.enter_context(tracked(View(output, update), names, folder.path, config))
        session = Session(trainer, folder, view, judge, closing)
        session.chores += [chore for chore in (keep_plateau(session),) if chore is not None]
        if given["diagnose"]:
            session.chores.append((config.train.checkpoint_every, _diagnosis(trainer, folder, output)))
        session.begin(stop, sys.argv)
        for due in trainer.run(stop, session.intervals()):
            session.attend(due)
        return session.end()


def _diagnosis(trainer: Trainer, folder: RunFolder, output: Output) -> Callable[[], None]:
    """Return what measures the run's coupling and shows it."""
    from cmtool.training.diagnosis import Diagnosis

    diagnosis = Diagnosis(trainer, folder.path)

    def chore() -> None:
        rows = [
            [f"{entry.t:g}", *(f"{value:.4g}" for value in (entry.linear, entry.exact, entry.transport, entry.coupled))]
            for entry in diagnosis()
        ]
        heads = ["noise level", "R of the coupling (linear)", "R of independent pairs", "|f - z|^2", "|x0 - z|^2"]
        output.table(f"Discrepancy and transport cost at step {trainer.state.step}, per value", heads, rows)

    return chore
