"""Who judges a run: figures on the way, and the search for sampling times at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cmtool.cli.output import Output
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.training.loop import Trainer

Judge = Callable[[Any], dict[str, float]]
Closing = Callable[[Any, Callable[[], bool]], dict[str, Any]]


def judges(trainer: Trainer, output: Output) -> tuple[Judge | None, Closing | None]:
    """Return what evaluates on the way and what searches sampling times at the end; either may be missing.

    Without a reference, or where its files are not on this machine, a run goes on unjudged, and says so if evaluation
    was asked for. Only small feature networks are asked for a search: Inception would take longer than the training.
    """
    config = trainer.config
    if not trainer.world.main:
        return None, None
    if config.eval.reference is None:
        if config.train.eval_every:
            output.warn("no evaluation during training: the run has no reference (--set eval.reference=...).")
        return None, None
    from cmtool.evaluation.closing_search import RunJudge, short_search

    try:
        judge = RunJudge.of(config.eval, trainer.state.ema)
    except UserError as error:
        if config.train.eval_every:
            output.warn(f"no evaluation during training: {error.message}")
        return None, None

    def closing(model: Any, late: Callable[[], bool]) -> dict[str, Any]:
        output.say("searching sampling times for 2 to 4 steps")
        return short_search(model, judge.judge, late=late)

    return judge, closing if config.family != "edm" and judge.is_cheap else None
