"""`cmtool train-edm`, `train-ct`, `train-cd`: options, one call of `api.train.train_as`, and what is shown of it."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmtool.cli import complete
from cmtool.cli.app import command
from cmtool.cli.options import Device, Json, Precision, Quiet, Recipe, Sets, images_at_once

if TYPE_CHECKING:
    from cmtool.api.train import TrainedRun
    from cmtool.cli.output import Output
    from cmtool.config.parts import RecipeConfig
    from cmtool.losses.diagnose import Discrepancy

Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="Name of a preset (see cmtool presets) or a TOML file; left out with --data: a plan for these images, "
        "without: digits.",
        autocompletion=complete.presets,
    ),
]
Data = Annotated[
    str | None, typer.Option("--data", help="Folder or file of images, planned for, or in place of the preset's.")
]
Small = Annotated[
    Literal["skip", "upscale"] | None, typer.Option("--small", help="Images smaller than the resolution; usually skip.")
]
Fit = Annotated[
    Literal["crop", "pad", "stretch"] | None,
    typer.Option("--fit", help="How other shapes become square; usually crop."),
]
OutDir = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/<preset>-<recipe>.")]
Time = Annotated[
    str | None,
    typer.Option(
        "--time", help="Have the model within this time, e.g. 30m or 1h30m: steps follow the clock. A plan's: 30m."
    ),
]
Resolution = Annotated[int | None, typer.Option("--resolution", min=1, help="Side of the images in pixels.")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Train although the plan advises against it.")]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Optimizer steps, which win over --time; every schedule scales with it."),
]
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
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Print the plan, or the settings, and stop.")]
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


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of the three commands that train, in the order of the help."""

    preset: Preset = None
    recipe: Recipe = None
    data: Data = None
    small: Small = None
    fit: Fit = None
    out: OutDir = None
    name: Name = None
    extend: Extend = None
    time: Time = None
    steps: Steps = None
    resolution: Resolution = None
    batch_size: Batch = None
    micro_batch: Micro = None
    seed: RunSeed = None
    init: Init = None
    teacher: Teacher = None
    sets: Sets = None
    fresh: Fresh = False
    anyway: Anyway = False
    dry_run: DryRun = False
    list_recipes: ListRecipes = False
    max_time: MaxTime = None
    requeue_exit_code: Requeue = None
    deterministic: Deterministic = False
    diagnose: Diagnose = False
    track: Track = None
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False


def _train(family: Literal["ct", "cd", "edm"], options: TrainOptions) -> None:
    from cmtool.cli.output import Output

    output = Output.of_rank(options.json, options.quiet)
    if options.list_recipes:
        return list_recipes(family, options.preset or "digits", output)
    from cmtool.api.run_settings import Training
    from cmtool.api.train import train_as

    asked = Training(
        options.data,
        preset=options.preset,
        family=family,
        recipe=options.recipe,
        out=options.out,
        name=options.name,
        extend=options.extend,
        time=options.time,
        steps=options.steps,
        resolution=options.resolution,
        batch_size=_images(options.batch_size, "--batch-size"),
        micro_batch=_images(options.micro_batch, "--micro-batch"),
        seed=options.seed,
        small=options.small,
        fit=options.fit,
        init=options.init,
        teacher=options.teacher,
        settings=options.sets or (),
        precision=options.precision,
        deterministic=options.deterministic,
        device=options.device,
        fresh=options.fresh,
        anyway=options.anyway,
        dry_run=options.dry_run,
        max_time=options.max_time,
        diagnose=partial(discrepancy_table, output) if options.diagnose else False,
        track=options.track or (),
        talk=output,
    )
    _show(train_as(asked), options, output)


def _images(text: str | None, option: str) -> int | Literal["auto"] | None:
    return None if text is None else images_at_once(text, option) or "auto"


def _show(run: TrainedRun, options: TrainOptions, output: Output) -> None:
    """Say how a training ended, and exit with the code that belongs to it."""
    from cmtool.config.load import to_toml

    if run.plan is not None:
        output.result(run.plan.toml)
        return output.json(run.plan.document())
    if options.dry_run:
        output.result(to_toml(run.config))
        return output.json({"config": run.config.model_dump(mode="json"), "origins": run.origins})
    document = {"model": None if run.model is None else str(run.model), "steps": run.step, "finished": run.finished}
    if run.model is None:
        why = "time limit reached" if run.out_of_time and not run.signal else "stopped"
        steps = "" if run.config.train.time is not None else f" of {run.config.train.steps}"
        output.say(f"{why} after step {run.step}{steps}; the same command goes on from there.")
        output.json(document)
        code = 128 + run.signal if run.signal else 0
        # Ctrl-C is a person's wish to end it; the scheduler's signal and the time limit are not.
        if options.requeue_exit_code is not None and run.signal != signal.SIGINT:
            code = options.requeue_exit_code
        raise typer.Exit(code)
    if not run.was_finished:
        for line in next_commands(run, options):
            output.say(line)
    output.result(str(run.model))
    return output.json(document)


def next_commands(run: TrainedRun, options: TrainOptions) -> list[str]:
    """Return what to type next: look at samples, and distil a teacher, or read how the run went."""
    folder = shlex.quote(str(run.folder))
    lines = [f"next: cmtool sample --model {folder}"]
    if run.config.family == "edm" and run.config.process.kind == "ve":
        preset = options.preset if options.extend is None else run.config.preset
        named = [] if preset is None and options.data is not None else ["--preset", preset or "digits"]
        words = ["train-cd", *named, *_data_words(run, options), "--teacher", str(run.folder)]
        return [*lines, f"then: cmtool {shlex.join(words)}"]
    return [*lines, f"then: cmtool report {folder}"]


def _data_words(run: TrainedRun, options: TrainOptions) -> list[str]:
    """Return the options that name the data once more: a student of other pictures than its teacher's learns little."""
    from cmtool.config.judgments import PICTURES

    path = options.data if options.extend is None else run.config.data.path
    words = [] if path is None else ["--data", path]
    for name, value in (("small", options.small), ("fit", options.fit)):
        words += [f"--{name}", value] if value else []
    kept = (*PICTURES, "labels", "num_classes", "condition", "latent")
    for text in options.sets or ():
        words += ["--set", text] if text.strip().partition("=")[0].removeprefix("data.") in kept else []
    return words


train_ct = command(
    _train,
    "ct",
    doc="""Train a consistency model on images: by a plan for yours and your time, or by a preset.

    Examples: cmtool train-ct --preset digits | cmtool train-ct --data photos/ --time 30m
    """,
)

train_cd = command(
    _train,
    "cd",
    doc="""Distil a diffusion model (the teacher) into a consistency model.

    A plan (--data without --preset) takes the newest teacher of these images, or trains one first.

    Example: cmtool train-edm --preset digits, then: cmtool train-cd --preset digits
    """,
)

train_edm = command(
    _train,
    "edm",
    doc="""Train a diffusion model, the teacher of train-cd.

    Example: cmtool train-edm --preset digits
    """,
)


PARTS = ["times", "N(k)", "pair", "coupling", "direction", "target", "distance", "weight"]


def parts_of(recipe: RecipeConfig) -> list[str]:
    """Return one word for each independent part, in the order of `PARTS`; "-" for one that is not used."""
    on_grid = recipe.times.kind.startswith("grid")
    legs = recipe.target.rule == "two_leg"
    limit = recipe.target.differentiates and not legs
    pair = "grid" if on_grid else recipe.legs.law if legs else "limit" if limit else recipe.gap.kind
    substeps = f" x{recipe.direction.substeps}" if recipe.direction.substeps > 1 else ""
    solver = f" {recipe.direction.solver}{substeps}" if recipe.direction.kind != "sample" else ""
    return [
        recipe.times.kind,
        recipe.curriculum.scales if on_grid else "-",
        "-" if recipe.target.rule == "data" else pair,
        recipe.coupling.kind,
        recipe.direction.kind + ("" if recipe.target.differentiates else solver),
        _target(recipe),
        recipe.distance.kind,
        recipe.weighting.kind,
    ]


def _target(recipe: RecipeConfig) -> str:
    score = recipe.score
    if score.kind == "none":
        return recipe.target.rule
    return f"{score.kind} + {recipe.target.rule}" if score.keep else score.kind


def published(family: str) -> list[dict[str, Any]]:
    """Return every published figure of a family over all presets: data set, recipe, method, 1 and 2 steps, source."""
    from cmtool.config.find import list_presets
    from cmtool.config.load import read_preset, resolve

    found = []
    for preset in list_presets():
        for name in read_preset(preset).recipes:
            if read_preset(preset).family(name) == family:
                recipe = resolve(preset, recipe=name).config.recipe
                if recipe.expected is not None:
                    figures = recipe.expected.model_dump(mode="json")
                    found.append({"preset": preset, "recipe": name, "method": recipe.method, **figures})
    return found


def list_recipes(family: str, preset: str, output: Output) -> None:
    """Show the recipes that a train command can run with a preset, and the published figures per data set."""
    from cmtool.config.load import read_preset, resolve

    rows, documents = [], []
    for name in read_preset(preset).fitting(family):
        recipe = resolve(preset, family=family, recipe=name).config.recipe
        expected = recipe.expected
        figures = [expected.nfe1 if expected else None, expected.nfe2 if expected else None]
        rows.append([name, *parts_of(recipe), recipe.needs.replace("_", " "), *figures])
        documents.append({"recipe": name, "settings": recipe.model_dump(mode="json")})
    heads = ["recipe", *PARTS, "needs", "1 step", "2 steps"]
    output.table(f"Recipes of train-{family} with preset {preset}", heads, rows)
    known = published(family)
    lines = [[row["preset"], row["recipe"], row["nfe1"], row["nfe2"], row["metric"], row["source"]] for row in known]
    if lines:
        output.table("Published per data set", ["data set", "recipe", "1 step", "2 steps", "metric", "source"], lines)
    output.json({"preset": preset, "family": family, "recipes": documents, "published": known})


def discrepancy_table(output: Output, step: int, levels: Sequence[Discrepancy]) -> None:
    """Draw what `--diagnose` measured, a row for each noise level."""
    rows = [[f"{at.t:g}", *(f"{x:.4g}" for x in (at.linear, at.exact, at.transport, at.coupled))] for at in levels]
    heads = ["noise level", "R of the coupling (linear)", "R of independent pairs", "|f - z|^2", "|x0 - z|^2"]
    output.table(f"Discrepancy and transport cost at step {step}, per value", heads, rows)
