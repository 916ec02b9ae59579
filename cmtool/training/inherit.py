"""What a recipe needs to start from, and what a student takes over from it. Needs no torch."""

from __future__ import annotations

from typing import Any

from cmtool.config.combinations import check_combination, same_meaning
from cmtool.config.condition import condition_of, same_condition
from cmtool.config.judgments import as_named
from cmtool.config.networks import network_config
from cmtool.config.schema import DataConfig, RunConfig
from cmtool.errors import CheckpointError, ConfigError

# Settings that stay as configured, because the weights' meaning does not depend on them.
_OWN = ("dropout", "attention_kernel", "checkpointing", "two_time", "guided", "log_variance", "augment_labels")


def adopt(config: RunConfig, source: dict[str, Any]) -> RunConfig:
    """Return `config` with the network and scalings of the model that the student starts from.

    `source` is that model's header. Dropout, attention kernel and the like stay as configured; resolution and
    channels must agree.

    Raises:
        CheckpointError: if the model has another resolution or other channels.
    """
    _check_start(config, source)
    from_teacher = config.recipe.takes_teacher and config.init is None
    check_pictures(config, source, "the teacher" if from_teacher else "the model to start from")
    network = network_config(**(source["network"] | {name: getattr(config.network, name) for name in _OWN}))
    names = ["sigma_min", "sigma_max", "sigma_data", "rho", "noise_scale"]
    theirs = source["process"]["parameterization"]
    # Weights are meaningful only under their own scalings, and what stays frozen must stay unchanged.
    if config.recipe.goes_on or not same_meaning(theirs, config.process.parameterization):
        names.append("parameterization")
    process = config.process.model_copy(update={name: source["process"][name] for name in names})
    changed = _with_levels(config.model_copy(update={"network": network, "process": process}), source["kind"])
    try:
        check_combination(changed)
    except ValueError as error:
        raise ConfigError(f"recipe '{config.recipe_name}' cannot start from this model: {error}.") from None
    return changed


def check_pictures(config: RunConfig, source: dict[str, Any], source_is: str) -> None:
    """Refuse a model (by its header) of pictures of another shape, or with classes where the run has none.

    Raises:
        CheckpointError: names `source_is` and what would fit.
    """
    data, want = as_named(source["data"]), config.data
    for name in ("resolution", "channels"):
        has = data[name]
        if has != getattr(want, name):
            raise CheckpointError(
                f"{source_is} has {name} {has}; the preset has {getattr(want, name)}.",
                f"cmtool train-edm --preset {config.preset} makes one that fits, or --set data.{name}={has}",
            )
    _check_condition(source_is, data, want)
    if bool(data.get("num_classes")) != want.labels:
        has = f"{data['num_classes']} classes" if data.get("num_classes") else "no classes"
        raise CheckpointError(
            f"{source_is} has {has}; the preset is {'conditional' if want.labels else 'unconditional'}.",
            f"--set data.labels={'false' if want.labels else 'true'}",
        )


def check_teacher(config: RunConfig, teacher: dict[str, Any], start: dict[str, Any]) -> None:
    """Check the teacher (by its header) of a run that starts from another model's weights and only queries the teacher.

    Their networks may differ; their pictures and noise processes may not.

    Raises:
        CheckpointError: names what differs.
    """
    check_pictures(config, teacher, "the teacher")
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        theirs, own = teacher["process"][name], start["process"][name]
        if theirs != own:
            raise CheckpointError(
                f"the teacher is of another process: its {name} is {theirs:g}, and not {own:g} as that of the start.",
                "take the teacher that the model was distilled from, or one with the same noise levels",
            )


def _check_start(config: RunConfig, source: dict[str, Any]) -> None:
    """Refuse a model that the recipe cannot continue from.

    Raises:
        CheckpointError: if it is no consistency model, or one of a single level whose other levels would be kept.
    """
    recipe, preset = config.recipe, config.preset
    if recipe.goes_on and source["kind"] != "consistency":
        raise CheckpointError(
            f"recipe '{config.recipe_name}' goes on from a consistency model, and this is a {source['kind']} model.",
            f"cmtool train-ct --preset {preset}, then add --init RUN",
        )
    if recipe.score.keep and not _has_levels(source):
        raise CheckpointError(
            f"recipe '{config.recipe_name}' keeps a model's several steps, and this one was not trained for several "
            f"(recipe {source.get('recipe_name', 'unknown')}).",
            f"cmtool train-cd --preset {preset} --recipe icd makes one, or add --set recipe.score.keep=0",
        )


def _has_levels(source: dict[str, Any]) -> bool:
    """Whether a model answers at every noise level, so that its samples can be noised and denoised again."""
    recipe = source.get("recipe") or {}
    score, times = recipe.get("score") or {}, recipe.get("times") or {}
    only_scored = score.get("kind", "none") != "none" and not score.get("keep")
    return not (only_scored or times.get("kind") == "largest" or source["network"].get("two_time"))


def _with_levels(config: RunConfig, kind: str) -> RunConfig:
    """Settle the noise levels that score distillation makes samples at; the first becomes the model's largest.

    A consistency model starts where it samples from, a diffusion model where its answer to noise is no longer the mean
    of all pictures (SiD: 2.5 for data of standard deviation .5).

    Raises:
        ConfigError: if a given level is outside the range of the model to start from.
    """
    score, process = config.recipe.score, config.process
    if score.kind == "none":
        return config
    usual = process.sigma_max if kind == "consistency" else min(5 * process.sigma_data, process.sigma_max)
    levels = score.levels or (usual,)
    if not process.sigma_min < levels[-1] <= levels[0] <= process.sigma_max:
        raise ConfigError(
            f"recipe.score.levels = {list(levels)} leaves the noise levels of the model to start from, "
            f"{process.sigma_min:g} to {process.sigma_max:g}."
        )
    recipe = config.recipe.model_copy(update={"score": score.model_copy(update={"levels": levels})})
    # A preset's levels for several steps may lie outside the range that is left.
    times = {steps: known for steps, known in config.sample.times.items() if known[0] <= levels[0]}
    times |= {str(len(levels)): levels} if len(levels) > 1 else {}
    return config.model_copy(
        update={
            "recipe": recipe,
            "process": process.model_copy(update={"sigma_max": levels[0]}),
            "sample": config.sample.model_copy(update={"times": times}),
        }
    )


def _check_condition(source_is: str, data: dict[str, Any], want: DataConfig) -> None:
    """Refuse a model whose condition is not the one that the run gives it."""
    theirs, ours = condition_of(data), condition_of(want.model_dump())
    if same_condition(theirs, ours):
        return
    is_so, runs = (
        f"conditioned on {text}" if text else "not conditioned on a picture"
        for text in (data.get("condition"), want.condition)
    )
    raise CheckpointError(
        f"{source_is} is {is_so}; the run is {runs}.",
        f"--set data.condition={data['condition']}" if theirs else "leave data.condition out",
    )


def check_needs(config: RunConfig) -> None:
    """Refuse a teacher or starting weights that the recipe does not take, and a recipe that lacks what it needs.

    Raises:
        ConfigError: names the recipe and the option.
    """
    recipe, name = config.recipe, config.recipe_name
    if recipe.takes_teacher and config.teacher is None:
        raise ConfigError(
            f"recipe '{name}' needs a teacher, and no finished train-edm run of '{config.preset}' was found.",
            f"cmtool train-edm --preset {config.preset}, or name one with --teacher MODEL",
        )
    if not recipe.takes_teacher and config.teacher is not None:
        raise ConfigError(
            f"recipe '{name}' takes no teacher.",
            "to start from its weights use --init MODEL" if _takes_init(config) else "leave --teacher out",
        )
    if recipe.needs_init and config.init is None:
        first, kind = ("train-ct", "consistency model") if recipe.goes_on else ("train-edm", "model")
        raise ConfigError(
            f"recipe '{name}' starts from a trained {kind} and was given none.",
            f"cmtool {first} --preset {config.preset}, then add --init RUN",
        )
    if config.init is not None and not _takes_init(config):
        raise ConfigError(f"recipe '{name}' takes no --init.", "leave --init out")


def _takes_init(config: RunConfig) -> bool:
    return config.recipe.needs_init or config.recipe.may_init
