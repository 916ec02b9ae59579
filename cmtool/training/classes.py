"""Where a run's class numbers come from: the model it starts from, or its own earlier steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmtool.checkpoint import read_header
from cmtool.config.classes import check_number, class_places, listed
from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset
from cmtool.errors import DataError
from cmtool.talk import Talk
from cmtool.training.run_folder import RunFolder


def settle_classes(config: RunConfig, dataset: Dataset, folder: RunFolder | None, talk: Talk) -> Dataset:
    """Return the data with their classes numbered as in the weights, so that a name means the same class.

    Args:
        config: what is trained; its teacher or the model it starts from decides the numbers of a new run.
        dataset: the data as they were read.
        folder: the run to resume; None for a new one.
        talk: told where classes were renumbered, where names are missing, and of a teacher of other pictures.

    Raises:
        DataError: the data have other classes than the weights.
    """
    sources = []
    path = config.teacher or config.init
    if path is not None:
        who = f"the teacher {path}" if config.teacher else f"the model {path}"
        sources.append((who, read_header(path)["data"]))
        if config.teacher:
            _compare_pictures(who, sources[0][1], config, dataset, talk)
    before = folder.data_of_checkpoint() if folder is not None else None
    if folder is not None and before is not None:
        sources.append((f"the run in {folder.path}", before))
    # The last one decides: a run keeps its numbering even if its teacher's file has since changed.
    for who, table in sources:
        dataset = in_order_of(dataset, table, who, talk)
    return dataset


def _compare_pictures(who: str, theirs: Mapping[str, Any], config: RunConfig, dataset: Dataset, talk: Talk) -> None:
    seen = theirs.get("fingerprint")
    if seen and seen != dataset.fingerprint:
        there, here = theirs.get("path") or theirs.get("source"), config.data.path or config.data.source
        places = f"({there}) than the student sees ({here})" if there != here else f"of {here} than the student sees"
        talk.warn(f"{who} was trained on other pictures {places}.")


def in_order_of(dataset: Dataset, table: Mapping[str, Any], who: str, talk: Talk) -> Dataset:
    """Return the data with classes numbered as in the data table of a model's header.

    Raises:
        DataError: the model has other classes than the data.
    """
    if dataset.labels is None or not table.get("num_classes"):
        return dataset
    ours, theirs = dataset.class_names or (), tuple(table.get("class_names") or ())
    check_number(dataset.classes or 0, ours, table, who)
    if not ours or not theirs:
        if ours or theirs:
            nameless = who if ours else "the data set"
            talk.warn(
                f"{nameless} has no class names: class 0 is taken to be {listed((ours or theirs)[:1])}, and so on."
            )
        return dataset
    if ours == theirs:
        return dataset
    places = class_places(ours, theirs, who)
    talk.say(
        f"classes are matched by name: they are numbered as {who} numbers them ({listed(theirs)}), where the data "
        f"have {listed(ours)}."
    )
    return dataset.renumbered(places, theirs)


def check_same_classes(dataset: Dataset, table: Mapping[str, Any], who: str) -> None:
    """Refuse a model whose classes are not numbered as those of the data.

    Raises:
        DataError: with both orders.
    """
    ours, theirs = dataset.class_names, table.get("class_names")
    if dataset.labels is None or not table.get("num_classes"):
        return
    check_number(dataset.classes or 0, ours, table, who)
    if ours and theirs and list(ours) != list(theirs):
        raise DataError(
            f"{who} numbers its classes {listed(theirs)}, and this run {listed(ours)}.",
            "take models that were trained with the same order of classes",
        )
