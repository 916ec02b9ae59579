"""What a recipe needs to start from, and what a student takes over from it. Needs no torch."""

from __future__ import annotations

from typing import Any

from cmtool.config.combinations import check_combination, same_meaning
from cmtool.config.networks import network_config
from cmtool.config.schema import RunConfig
from cmtool.errors import CheckpointError, ConfigError

# Settings that stay as configured, because the weights' meaning does not depend on them.
_OWN = ("dropout", "attention_kernel", "checkpointing", "two_time", "guided", "log_variance")


def adopt(config: RunConfig, source: dict[str, Any]) -> RunConfig:
    """Return `config` with the network and scalings of the model that the student starts from.

    `source` is that model's header. Dropout, attention kernel and the like stay as configured; resolution and
    channels must agree.

    Raises:
        CheckpointError: if the model has another resolution or other channels.
    """
    data, want = source["data"], config.data
    source_is = "the teacher" if config.recipe.needs == "teacher" else "the model to start from"
    if config.recipe.needs == "consistency_init" and source["kind"] != "consistency":
        raise CheckpointError(
            f"recipe '{config.recipe_name}' goes on from a consistency model, and this is a {source['kind']} model.",
            f"cmtool train-ct --preset {config.preset}, then add --init RUN",
        )
    for name in ("resolution", "channels"):
        if data[name] != getattr(want, name):
            raise CheckpointError(
                f"{source_is} has {name} {data[name]}; the preset has {getattr(want, name)}.",
                f"cmtool train-edm --preset {config.preset} makes one that fits, or --set data.{name}={data[name]}",
            )
    if bool(data.get("num_classes")) != want.labels:
        has = f"{data['num_classes']} classes" if data.get("num_classes") else "no classes"
        raise CheckpointError(
            f"{source_is} has {has}; the preset is {'conditional' if want.labels else 'unconditional'}.",
            f"--set data.labels={'false' if want.labels else 'true'}",
        )
    network = network_config(**(source["network"] | {name: getattr(config.network, name) for name in _OWN}))
    names = ["sigma_min", "sigma_max", "sigma_data", "rho", "noise_scale"]
    theirs = source["process"]["parameterization"]
    # Weights are meaningful only under their own scalings, and what stays frozen must stay unchanged.
    if config.recipe.needs == "consistency_init" or not same_meaning(theirs, config.process.parameterization):
        names.append("parameterization")
    process = config.process.model_copy(update={name: source["process"][name] for name in names})
    changed = config.model_copy(update={"network": network, "process": process})
    try:
        check_combination(changed)
    except ValueError as error:
        raise ConfigError(f"recipe '{config.recipe_name}' cannot start from this model: {error}.") from None
    return changed


def check_needs(config: RunConfig) -> None:
    """Refuse a teacher or starting weights that the recipe does not take, and a recipe that lacks what it needs.

    Raises:
        ConfigError: names the recipe and the option.
    """
    recipe, name = config.recipe, config.recipe_name
    if recipe.needs == "teacher" and config.teacher is None:
        raise ConfigError(
            f"recipe '{name}' needs a teacher, and no finished train-edm run of '{config.preset}' was found.",
            f"cmtool train-edm --preset {config.preset}, or name one with --teacher MODEL",
        )
    if recipe.needs != "teacher" and config.teacher is not None:
        raise ConfigError(
            f"recipe '{name}' takes no teacher.",
            "to start from its weights use --init MODEL" if _takes_init(config) else "leave --teacher out",
        )
    if recipe.needs in ("init", "consistency_init") and config.init is None:
        first, kind = ("train-edm", "model") if recipe.needs == "init" else ("train-ct", "consistency model")
        raise ConfigError(
            f"recipe '{name}' starts from a trained {kind} and was given none.",
            f"cmtool {first} --preset {config.preset}, then add --init RUN",
        )
    if config.init is not None and not _takes_init(config):
        raise ConfigError(f"recipe '{name}' takes no --init.", "leave --init out")


def _takes_init(config: RunConfig) -> bool:
    return config.recipe.needs in ("init", "consistency_init") or config.recipe.may_init
