"""What a preset says about its own pictures, and when that still applies: it says nothing about other pictures.

Needs no torch: commands look here for the reference, the sampling times and the editing levels of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cmtool.config.find import PACKAGE
from cmtool.config.overrides import Override
from cmtool.config.schema import DataConfig, PresetFile, RunConfig
from cmtool.config.sources import SOURCES, named_source, source_of_path
from cmtool.config.toml import read_toml
from cmtool.errors import ConfigError

# The settings of [data] that decide which pictures a run sees, pixel by pixel. The others do not: `flip`, `labels` and
# `num_classes` say what training does with them, and `size` takes fewer of the same set, which its reference still
# describes.
PICTURES = ("source", "path", "kind", "resolution", "channels", "fit", "filter", "small")
# What applies only to the preset's pictures, by the beginning of its dotted key. `sample.sampler` and `sample.steps`
# stay: they belong to the method.
ABOUT_PICTURES = (
    ("about",),
    ("edit",),
    ("sample", "times"),
    ("eval", "reference"),
    ("eval", "features"),
    ("recipe", "expected"),
)


def name_source(data: Mapping[str, Any], by_hand: Sequence[str]) -> dict[str, Any]:
    """Return a [data] table whose `source` is that of its `path`.

    A path given by hand that is the name of a source (and no file) means that source; any other path wins over the
    preset's source, which must then not be named as the origin of its images.

    Args:
        data: the [data] table as written.
        by_hand: the keys of it that the command line set.
    """
    path = data.get("path")
    if "path" not in by_hand or not isinstance(path, str):
        return dict(data)
    named = named_source(path)
    if named:
        return {**data, "source": named, "path": None}
    if "source" in by_hand:
        return dict(data)
    return {**data, "source": source_of_path(path)}


def are_other_pictures(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a run with the (unchecked) [data] table `after` sees other pictures than the preset's own, `before`.

    A preset for any folder has no pictures of its own, so naming some does not change them.
    """
    usual = {key: DataConfig.model_fields[key].get_default() for key in PICTURES}
    placeless = before.get("path") is None and _needs_path(before.get("source"))
    keys = [key for key in PICTURES if not (placeless and key in ("source", "path"))]
    return any(before.get(key, usual[key]) != after.get(key, usual[key]) for key in keys)


def _needs_path(source: Any) -> bool:
    return source in SOURCES and SOURCES[source].needs_path


def is_about_pictures(override: Override) -> bool:
    """Whether a setting of a preset applies only to the preset's pictures."""
    return any(override.keys[: len(start)] == start for start in ABOUT_PICTURES)


def describe_judging(config: RunConfig, other_data: bool = False, decided: bool = False) -> str | None:
    """Return the sentence that a run on other data than its preset's, or without a reference, begins with.

    Args:
        config: the run.
        other_data: whether the command line changed which pictures are used.
        decided: whether the run continues with settings that can no longer be changed.
    """
    reference, preset = config.eval.reference, config.preset
    lacks = [] if reference is not None or config.data.holdout else ["there is no reference"]
    if lacks and config.recipe.model_kind == "consistency":
        lacks.append("no sampling times are searched at the end")
    hint = "" if decided else "name a reference with --set eval.reference=FOLDER, FILE.npz or a name, or "
    rest = f"{' and '.join(lacks)} ({hint}search later: cmtool search-times --ref)" if lacks else ""
    if other_data:
        left_out = (
            f"what preset {preset} says of its own pictures (reference, sampling times, editing levels) is left out"
        )
        named = f"the reference is {reference}"
        held = f"images that are held out of training are the reference (data.holdout = {config.data.holdout:g})"
        return f"Other pictures than the preset's: {left_out}; {rest or (held if reference is None else named)}."
    if rest:
        return f"{rest[0].upper()}{rest[1:]}." if len(lacks) > 1 else None
    source = next((name for name in _BUILT_IN_REFERENCES if str(reference).startswith(name)), None)
    if source is not None and config.data.source != source:
        data = config.data.path or config.data.source
        return f"Preset {preset} trains on {data} and is judged against {reference}, as its file says."
    return None


_BUILT_IN_REFERENCES = ("digits", "avatars", "shapes", "toy2d", "cifar10", "imagenet64", "lsun")


# --- from the header of a model --------------------------------------------------------------------------------------


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the data tables of two headers name the same pictures, as far as names go."""
    return all(one.get(key) == other.get(key) for key in ("source", "path", "kind", "resolution", "channels"))


def as_named(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data table of a header with the size of the pictures, as a preset names it, where it holds latents."""
    latent = data.get("latent")
    if not latent:
        return dict(data)
    channels, side, _ = latent["pixels"]
    return {**data, "channels": channels, "resolution": side, "latent": (data["channels"], data["resolution"])}


def is_teacher_of(config: RunConfig, header: Mapping[str, Any]) -> bool:
    """Whether a model that nobody named may teach a run: one of train-edm, of the same preset and the same pictures."""
    data, mine = header.get("data") or {}, config.data
    source = mine.source if mine.path is None else data.get("source")  # for a path, looking at the files decides
    wanted = {**mine.model_dump(include={"path", "kind", "resolution", "channels"}), "source": source}
    ours = header.get("preset") == config.preset and header.get("recipe", {}).get("family", "edm") == "edm"
    return ours and same_data(as_named(data), wanted)


def reference_of(header: Mapping[str, Any]) -> str | None:
    """Return what a model is compared with by default: the reference of its run, None if there is none.

    A model whose header does not mention one (published, or older) has the reference of the shipped preset that it
    names, if it was trained on that preset's data.
    """
    written = header.get("eval")
    tables = written if written is not None else (preset_of_data(header) or {}).get("eval", {})
    reference = tables.get("reference")
    return reference if isinstance(reference, str) else None


def held_out_data(header: Mapping[str, Any]) -> DataConfig | None:
    """Return how to find the images that a model's training held out again; None if it held none out.

    Raises:
        ConfigError: the header says something else than training writes.
    """
    data = as_named(header.get("data") or {})
    if not data.get("holdout"):
        return None
    keys = ("path", "kind", "resolution", "channels", "latent", "size", "fit", "filter", "small", "holdout")
    path = data.get("path")
    table = {"source": source_of_path(path) if path else data.get("source")}
    try:
        return DataConfig.model_validate(table | {key: data[key] for key in keys if data.get(key) is not None})
    except ValidationError:
        raise ConfigError("the header of the model does not say which images its training held out.") from None


def own_reference(header: Mapping[str, Any], path: Path) -> str | None:
    """Return what the model in the file `path` is compared with by default, as `--ref` takes it; None: nothing.

    The model itself stands for the images that its training held out.
    """
    return reference_of(header) or (str(path) if held_out_data(header) is not None else None)


def preset_of_data(header: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the tables of the shipped preset on whose data a model was trained; None if there is none.

    A preset of the same name in the working folder does not count: it may be for other data.
    """
    name = header.get("preset")
    places = [folder / "presets" / f"{name}.toml" for folder in (PACKAGE, PACKAGE.parent)]
    path = next((place for place in places if place.is_file()), None)
    if path is None or not str(name).isidentifier():
        return None
    try:
        tables = read_toml(path)
        PresetFile.model_validate(tables)
    except (ConfigError, ValidationError):
        return None
    data = header.get("data") or {}
    trained_on = data.get("source", name)
    own = data.get("path") is None and trained_on in (name, tables["data"].get("source"))
    return tables if own else None
