"""`cmtool train-edm`, `train-ct`, `train-cd`: resolve the settings, open the run, train, show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmtool.cli import complete
from cmtool.cli.options import Device, Json, Precision, Preset, Quiet, Recipe, Sets, images_at_once

if TYPE_CHECKING:
    from cmtool.cli.output import Output
    from cmtool.config.load import Resolved
    from cmtool.config.schema import RunConfig

Data = Annotated[str | None, typer.Option("--data", help="Folder or file of images in place of the preset's.")]
Small = Annotated[
    Literal["skip", "upscale"] | None, typer.Option("--small", help="Images smaller than the resolution; usually skip.")
]
Fit = Annotated[
    Literal["crop", "pad", "stretch"] | None,
    typer.Option("--fit", help="How other shapes become square; usually crop."),
]
OutDir = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/<preset>-<recipe>.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps; every schedule scales with it.")]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        help="Images per optimizer step, or auto: the preset's, in parts that fit the memory.",
        metavar="N|auto",
    ),
]
Micro = Annotated[
    str | None,
    typer.Option(
        "--micro-batch",
        help="Images at once, or auto: halved until they fit; changes memory and dropout masks alone.",
        metavar="N|auto",
    ),
]
RunSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of weights, noise and data order.")]
Init = Annotated[
    str | None,
    typer.Option("--init", help="Model whose weights the student starts from.", autocompletion=complete.models),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        help="Diffusion model to distil; default: the newest train-edm run.",
        autocompletion=complete.models,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: remove what the run folder holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Print the resolved settings and stop.")]
ListRecipes = Annotated[bool, typer.Option("--list-recipes", help="List the recipes that this command can run.")]
MaxTime = Annotated[str | None, typer.Option("--max-time", help="Save and stop after this long, e.g. 3h55m.")]
Requeue = Annotated[
    int | None,
    typer.Option("--requeue-exit-code", min=0, max=255, help="Exit code when SIGTERM or --max-time stopped the run."),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run: its folder is runs/NAME.")]
Extend = Annotated[
    Path | None,
    typer.Option(
        "--extend",
        help="Go on with this finished run, from before its decay, to --steps.",
        autocompletion=complete.run_folders,
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track", help="Also write for tensorboard or wandb; may be repeated.", autocompletion=complete.trackers
    ),
]
Diagnose = Annotated[
    bool, typer.Option("--diagnose", help="Measure discrepancy and transport cost per noise level on the way.")
]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Only algorithms that repeat to the bit (GPU).")]


def train_ct(
    preset: Preset = "digits",
    recipe: Recipe = None,
    data: Data = None,
    small: Small = None,
    fit: Fit = None,
    out: OutDir = None,
    name: Name = None,
    extend: Extend = None,
    steps: Steps = None,
    batch_size: Batch = None,
    micro_batch: Micro = None,
    seed: RunSeed = None,
    init: Init = None,
    teacher: Teacher = None,
    sets: Sets = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    list_recipes: ListRecipes = False,
    max_time: MaxTime = None,
    requeue_exit_code: Requeue = None,
    deterministic: Deterministic = False,
    diagnose: Diagnose = False,
    track: Track = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a consistency model from scratch on images.

    Example: cmtool train-ct --preset digits
    """
    _train("ct", locals())


def train_cd(
    preset: Preset = "digits",
    recipe: Recipe = None,
    data: Data = None,
    small: Small = None,
    fit: Fit = None,
    out: OutDir = None,
    name: Name = None,
    extend: Extend = None,
    steps: Steps = None,
    batch_size: Batch = None,
    micro_batch: Micro = None,
    seed: RunSeed = None,
    init: Init = None,
    teacher: Teacher = None,
    sets: Sets = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    list_recipes: ListRecipes = False,
    max_time: MaxTime = None,
    requeue_exit_code: Requeue = None,
    deterministic: Deterministic = False,
    diagnose: Diagnose = False,
    track: Track = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Distil a diffusion model (the teacher) into a consistency model.

    Example: cmtool train-edm --preset digits, then: cmtool train-cd --preset digits
    """
    _train("cd", locals())


def train_edm(
    preset: Preset = "digits",
    recipe: Recipe = None,
    data: Data = None,
    small: Small = None,
    fit: Fit = None,
    out: OutDir = None,
    name: Name = None,
    extend: Extend = None,
    steps: Steps = None,
    batch_size: Batch = None,
    micro_batch: Micro = None,
    seed: RunSeed = None,
    init: Init = None,
    teacher: Teacher = None,
    sets: Sets = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    list_recipes: ListRecipes = False,
    max_time: MaxTime = None,
    requeue_exit_code: Requeue = None,
    deterministic: Deterministic = False,
    diagnose: Diagnose = False,
    track: Track = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a diffusion model, the teacher of train-cd.

    Example: cmtool train-edm --preset digits
    """
    _train("edm", locals())


def _train(family: str, given: dict[str, Any]) -> None:
    from cmtool.cli.output import Output
    from cmtool.cli.train_extras import check_trackers, run_folder
    from cmtool.config.judgments import describe_judging
    from cmtool.training.stopping import parse_span

    output = Output.of_rank(given["json"], given["quiet"])
    if given["list_recipes"]:
        from cmtool.cli.train_recipes import list_recipes

        return list_recipes(family, given["preset"], output)
    deadline = time.monotonic() + parse_span(given["max_time"]) if given["max_time"] else None
    check_trackers(given["track"])
    if given["extend"] is not None:
        return _extend(family, given, deadline, output)
    resolved = _resolve(family, given)
    said = describe_judging(resolved.config, resolved.other_data)
    if said is not None:
        output.say(said)
    config = _with_models(resolved.config, given, output)
    if given["dry_run"]:
        return _show(config, resolved, output)
    from cmtool.cli.train_job import run

    run(config, run_folder(given, f"{config.preset}-{config.recipe_name}"), given, deadline, output)


def _extend(family: str, given: dict[str, Any], deadline: float | None, output: Output) -> None:
    from cmtool.cli.train_extras import extension
    from cmtool.config.judgments import describe_judging
    from cmtool.config.load import to_toml

    config, folder = extension(family, given, output)
    said = describe_judging(config, decided=True)
    if said is not None:
        output.say(said)
    if given["dry_run"]:
        output.result(to_toml(config))
        return output.json({"config": config.model_dump(mode="json"), "origins": {}})
    from cmtool.cli.train_job import run

    run(config, folder, given, deadline, output)


def _resolve(family: str, given: dict[str, Any]) -> Resolved:
    from cmtool.config.load import resolve

    flags = {
        "train.steps": given["steps"],
        **_batches(given["batch_size"], given["micro_batch"]),
        "train.seed": given["seed"],
        "train.precision": None if given["precision"] == "auto" else given["precision"],
        "train.deterministic": True if given["deterministic"] else None,
        "data.path": given["data"],
        "data.small": given["small"],
        "data.fit": given["fit"],
        "init": given["init"],
        "teacher": given["teacher"],
    }
    return resolve(given["preset"], family=family, recipe=given["recipe"], sets=given["sets"] or (), flags=flags)


def _batches(batch_size: str | None, micro_batch: str | None) -> dict[str, int | str | None]:
    """Return the settings of both options.

    The batch that trains is a setting: what "auto" leaves to the machine is how much of it is computed at once.
    """
    given = {"train.batch_size": batch_size, "train.micro_batch": micro_batch}
    found: dict[str, int | str | None] = {}
    for key, text in given.items():
        option = "--" + key.removeprefix("train.").replace("_", "-")
        found[key] = None if text is None else images_at_once(text, option)
    if micro_batch == "auto" or (batch_size == "auto" and micro_batch is None):
        found["train.micro_batch"] = "auto"
    return found


def _with_models(config: RunConfig, given: dict[str, Any], output: Output) -> RunConfig:
    """Name the teacher or the model to start from, and take its network and scalings over."""
    from cmtool.checkpoint import read_header
    from cmtool.cli.find_model import find_model
    from cmtool.config.judgments import is_teacher_of
    from cmtool.errors import UserError
    from cmtool.training.inherit import adopt, check_needs

    wants = config.recipe.needs
    if wants == "teacher" and config.teacher is None:
        try:
            found = find_model(
                None,
                kinds=("diffusion",),
                fits=lambda header: is_teacher_of(config, header),
                wanted="teacher",
                option="--teacher",
            )
        except UserError:
            check_needs(config)
            raise
        output.say(found.describe())
        config = config.model_copy(update={"teacher": str(found.path)})
    check_needs(config)
    for name in ("teacher", "init"):
        value = getattr(config, name)
        if value is not None:
            kinds = ("diffusion",) if name == "teacher" else ("consistency", "diffusion")
            path = find_model(value, kinds=kinds, option=f"--{name}").path
            config = adopt(config, read_header(path)).model_copy(update={name: str(path)})
    return config


def _show(config: RunConfig, resolved: Resolved, output: Output) -> None:
    from cmtool.config.load import to_toml

    output.result(to_toml(config))
    output.json({"config": config.model_dump(mode="json"), "origins": resolved.origins})
