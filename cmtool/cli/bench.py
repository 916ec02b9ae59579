"""`cmtool bench`: what this machine does with a preset: speed, parts of a step, memory, time and cost of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Device, Json, Precision, Preset, Quiet, Recipe, Sets

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from cmtool.cli.output import Output
    from cmtool.config.schema import RunConfig
    from cmtool.data.dataset import Dataset
    from cmtool.training.bench import Trial

Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="Time for the search, for each precision.")]
Price = Annotated[float | None, typer.Option("--price", min=0, help="Price of an hour of this machine.")]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `cmtool bench`, in the order of the help."""

    preset: Preset = "digits"
    recipe: Recipe = None
    sets: Sets = None
    seconds: Seconds = 10.0
    price: Price = None
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False


@command
def bench(options: BenchOptions) -> None:
    """Measure training speed, where a step's time goes, and what the preset's full run would take here.

    Data that are not built in are replaced by random bytes, a teacher by one with fresh weights: neither changes the
    cost of a step.

    Examples: cmtool bench | cmtool bench --preset cifar10 --recipe ict --price 2.5
    """
    import tempfile
    from pathlib import Path

    from cmtool.cli.output import Output
    from cmtool.config.load import resolve

    flags = {"train.precision": options.precision}
    config = resolve(options.preset, recipe=options.recipe, sets=options.sets or (), flags=flags).config
    output = Output(options.json, options.quiet)
    with tempfile.TemporaryDirectory() as folder:
        document = _measure(config, options.device, options.seconds, output, Path(folder))
    document["estimate"] = _estimate(config, sum(document["parts_ms"].values()) / 1e3, options.price)
    _show(config, document, output)
    output.json(document)


def _data(config: RunConfig, output: Output) -> Dataset:
    """The data where they are built in, else random bytes of their size."""
    from cmtool.config.sources import SOURCES
    from cmtool.data.load import load_dataset
    from cmtool.training.bench import stand_in_data

    return load_dataset(config.data, output) if SOURCES[config.data.source].built_in else stand_in_data(config)


def _measure(config: RunConfig, device: str, seconds: float, output: Output, folder: Path) -> dict[str, Any]:
    from cmtool.data.latents import in_latents
    from cmtool.machine.device import choose_device, set_up_torch
    from cmtool.training.bench import (
        best_of,
        in_turns,
        overhead,
        profile,
        search,
        whole_step,
        with_stand_ins,
    )
    from cmtool.training.setup import prepare

    place = choose_device(device)
    set_up_torch(config.train.threads, config.train.deterministic)
    data = _data(config, output)
    config = with_stand_ins(in_latents(config, data), data, folder)
    trials: list[Trial] = []
    for found in search(config, data, place, seconds):
        output.say(f"{found.precision}, {found.batch} images at once: {found.images_per_s:.4g} images a second")
        trials.append(found)
    best = best_of(trials, lambda one, other: in_turns(config, data, place, one, other))
    if best.precision == "fp32" and any(found.images_per_s > best.images_per_s for found in trials):
        output.say("fp32: with one batch a half gains less than a tenth, and it is less exact")
    micro = best.batch if best.batch < config.train.batch_size else None
    changed = {"precision": best.precision, "batch_size": best.batch, "micro_batch": None}
    train = config.train.model_copy(update=changed)
    once = profile(prepare(config.model_copy(update={"train": train}), data, place), _rounds(best.seconds, seconds))
    parts = whole_step(once, config.train.batch_size / best.batch)
    return {
        "preset": config.preset,
        "recipe": config.recipe_name,
        **_machine(place),
        "images": data.info.source,
        "trials": [{**vars(t), "images_per_s": t.images_per_s} for t in trials],
        "best": {"precision": best.precision, "micro_batch": micro, "images_per_s": best.images_per_s},
        "parts_ms": {name: 1e3 * value for name, value in parts.items()},
        "overhead": overhead(parts),
        "memory": best.memory,
    }


def _rounds(step: float, seconds: float) -> int:
    """Steps to take a profile of: at `step` seconds each about half of the time for a search."""
    return max(2, min(50, round(seconds / 2 / step)))


def _machine(place: torch.device) -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_name(place) if place.type == "cuda" else None
    with contextlib.suppress(AttributeError):
        card = card or torch.cpu.get_capabilities().get("cpu_name")
    return {"device": str(place), "name": card, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _estimate(config: RunConfig, step: float, price: float | None) -> dict[str, Any]:
    """Time of the whole run at `step` seconds each, without grids and checkpoints, and its cost at a price an hour."""
    steps, batch = config.train.steps, config.train.batch_size
    seconds = steps * step
    cost = None if price is None else price * seconds / 3600
    return {"steps": steps, "batch_size": batch, "seconds": seconds, "cost": cost}


def _show(config: RunConfig, document: dict[str, Any], output: Output) -> None:
    from cmtool.units import human_bytes, human_time

    best, estimate, parts = document["best"], document["estimate"], document["parts_ms"]
    whole = sum(parts.values())
    rows = [[name, value, f"{100 * value / whole:.1f}%"] for name, value in parts.items() if value > 0]
    batch = best["micro_batch"] or config.train.batch_size
    output.table(
        f"{config.preset}, {config.recipe_name}", ["part of a step", "ms", "share"], [*rows, ["all", whole, "100%"]]
    )
    facts = [
        ["machine", document["name"] or document["device"]],
        ["images a second", best["images_per_s"]],
        ["best precision", best["precision"]],
        ["best micro-batch", batch],
        ["peak memory", human_bytes(document["memory"])],
        ["overhead beside the networks", f"{100 * document['overhead']:.1f}%"],
        [f"full run, {estimate['steps']:,} steps of {estimate['batch_size']:,}", human_time(estimate["seconds"])],
    ]
    if estimate["cost"] is not None:
        facts.append(["cost of the full run", f"{estimate['cost']:.2f}"])
    output.table("", ["", ""], facts)
