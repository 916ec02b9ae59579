"""Turn a preset, one of its recipes and the changes of the command line into one frozen `RunConfig`.

In this order, the later overriding the earlier: defaults of the schema, the tables of the preset, the row of the
method, the recipe, flags, `--set`. Every value remembers where it was written, and every error names that place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cmtool.config.combinations import check_combination
from cmtool.config.explain import explain, explain_unfit, is_given, unknown_key
from cmtool.config.find import find_preset, shown
from cmtool.config.judgments import are_other_pictures, is_about_pictures, name_source
from cmtool.config.methods import METHODS
from cmtool.config.networks import kinds_with
from cmtool.config.overrides import Override, flag_overrides, parse_sets, route
from cmtool.config.schema import FAMILIES, PresetFile, RunConfig
from cmtool.config.toml import read_toml, write_toml
from cmtool.errors import ConfigError, nearest, unknown


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each dotted key that is not a default, where its value was written.

    `other_data`: the command line changed which pictures are used, so that what the preset says about its own was left
    out.
    """

    config: RunConfig
    origins: dict[str, str]
    other_data: bool = False


@dataclass(frozen=True)
class Preset:
    """A preset file as read; of its tables only the names have been checked."""

    name: str
    label: str
    tables: dict[str, Any]
    default: dict[str, str] = field(default_factory=dict)

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """The recipes that the file holds, by name."""
        return self.tables.get("recipe", {})

    def method(self, recipe: str) -> str:
        """Return the method of a recipe: the one it names, else the method with the recipe's name.

        Raises:
            ConfigError: the recipe names no method, or one that does not exist.
        """
        table = self.recipes.get(recipe, {})
        method = table.get("method", recipe if recipe in METHODS else None)
        place = f"{self.label}: recipe.{recipe}.method"
        if method is None:
            raise ConfigError(f"{place} is missing; choose {', '.join(METHODS)}.")
        if method not in METHODS:
            close = nearest(str(method), METHODS)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{place} = {method!r} is unknown; choose {', '.join(METHODS)}.{hint}")
        return str(method)

    def family(self, recipe: str) -> str:
        """Return the family of a recipe: "edm", "ct" or "cd"."""
        return str(METHODS[self.method(recipe)]["family"])

    def fitting(self, family: str | None) -> list[str]:
        """Return the recipes of a family (None: all): those of the file first, then the bare methods."""
        names = [*self.recipes, *(name for name in METHODS if name not in self.recipes)]
        return [name for name in names if family in (None, self.family(name))]


def read_preset(preset: str) -> Preset:
    """Find and read a preset, check the names of its tables, its methods and its default recipes.

    Raises:
        ConfigError: not found, not TOML, an unknown or missing table, a default that is no recipe.
    """
    path = find_preset(preset)
    label = shown(path)
    tables = read_toml(path, label)
    try:
        PresetFile.model_validate(tables)
    except ValidationError as error:
        raise explain(error, PresetFile, {}, label) from None
    default = tables["train"].pop("default", {})
    loaded = Preset(path.stem, label, tables, default if isinstance(default, dict) else {})
    for recipe in loaded.recipes:
        loaded.method(recipe)
    _check_default(loaded, default)
    return loaded


def _check_default(preset: Preset, default: Any) -> None:
    place = f"{preset.label}: train.default"
    if not isinstance(default, dict):
        raise ConfigError(f'{place} = {default!r} must be a table such as {{ ct = "ict" }}')
    for family, recipe in default.items():
        if family not in FAMILIES:
            raise ConfigError(unknown_key(f"{place}.{family}", family, FAMILIES))
        fitting = preset.fitting(family)
        if recipe not in fitting:
            close = nearest(str(recipe), fitting)
            more = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{place}.{family} = {recipe!r} must be one of its recipes: {', '.join(fitting)}.{more}")


def choose_recipe(preset: Preset, family: str | None, recipe: str | None) -> str:
    """Return the recipe to use: the requested one, else the preset's default of the family, else that of its name.

    Raises:
        ConfigError: unknown, or of another family.
    """
    if recipe is None:
        if family is None:
            return next(
                iter([*(preset.default[f] for f in ("ct", "cd", "edm") if f in preset.default), *preset.recipes]), "ct"
            )
        return preset.default.get(family, family)
    fitting = preset.fitting(family)
    if recipe in fitting:
        return recipe
    if recipe not in preset.fitting(None):
        raise ConfigError(f"{preset.label}: {unknown('recipe', recipe, fitting)}", f"See cmtool presets {preset.name}.")
    other = preset.family(recipe)
    raise ConfigError(
        f"recipe '{recipe}' belongs to train-{other}, not to train-{family}; choose {', '.join(fitting)}.",
        f"cmtool train-{other} --preset {preset.name} --recipe {recipe}",
    )


def resolve(
    preset: str | Preset,
    *,
    family: str | None = None,
    recipe: str | None = None,
    sets: Sequence[str] | Mapping[str, Any] = (),
    flags: dict[str, Any] | None = None,
) -> Resolved:
    """Resolve one recipe of a preset.

    Args:
        preset: a preset's name, the path of a file, or a preset that is read already.
        family: "edm", "ct" or "cd": which command asks; None takes any.
        recipe: a recipe of the preset or the name of any method; None: the preset's default.
        sets: the values of `--set`, each "a.b=c", or {"a.b": c}; `recipe.` means the chosen recipe.
        flags: dotted key -> value; None leaves the key alone. "teacher" and "init" are keys too.

    Raises:
        ConfigError: anything unknown, of the wrong type or out of bounds; one sentence with file, key and value.
    """
    loaded = preset if isinstance(preset, Preset) else read_preset(preset)
    name = choose_recipe(loaded, family, recipe)
    written = [*_preset_layer(loaded), *_method_layer(loaded.method(name)), *_recipe_layer(loaded, name)]
    by_hand = [*flag_overrides(flags or {}), *parse_sets(sets, name)]
    tables, origins, other_data = _lay(written, by_hand)
    tables = {"network": {}, "process": {}, "train": {}} | tables | {"preset": loaded.name, "recipe_name": name}
    tables["recipe"] = tables.get("recipe", {}) | _identity(loaded.method(name))
    _fit_micro_batch(tables["train"], origins)
    config = _validated(tables, origins, loaded.label)
    _check_network(by_hand, config.network.kind)
    return Resolved(config, origins, other_data)


def _check_network(by_hand: Sequence[Override], kind: str) -> None:
    """Refuse a setting of another kind of network, of which a preset may have some, where it was given by hand.

    Raises:
        ConfigError: names the setting and the kinds that have it.
    """
    for override in by_hand:
        name = override.keys[1] if override.keys[0] == "network" and len(override.keys) == 2 else ""
        kinds = kinds_with(name, kind) if name else []
        if kinds:
            raise ConfigError(
                f"network.{name} is a setting of {' or '.join(kinds)}, and the network is of kind {kind}.",
                f"add --set network.kind={kinds[0]}, or leave it out",
            )


def _validated(tables: dict[str, Any], origins: dict[str, str], label: str) -> RunConfig:
    """Check the tables against the schema, and that the parts go together.

    Raises:
        ConfigError: one sentence.
    """
    try:
        config = told_of_augmentation(RunConfig.model_validate(tables))
        check_combination(config)
    except ValidationError as error:
        raise explain(error, RunConfig, origins, label) from None
    except ValueError as error:
        raise explain_unfit(error, origins, label) from None
    return config


def told_of_augmentation(config: RunConfig) -> RunConfig:
    """Give the network an input for what `recipe.augment` does to images, if it has none."""
    labels, network = config.recipe.augment.labels, config.network
    if not labels or network.augment_labels or not network.augments:
        return config
    return config.model_copy(update={"network": network.model_copy(update={"augment_labels": labels})})


def _lay(written: list[Override], by_hand: list[Override]) -> tuple[dict[str, Any], dict[str, str], bool]:
    """Lay the command line over the preset; return the tables, the origins, and whether the pictures are others.

    If they are, what the preset says about its own is left out: for others it is worth nothing. What the command line
    says stays.
    """
    before = merge(written)[0].get("data", {})
    tables, origins = merge([*written, *by_hand])
    data = name_source(tables.get("data", {}), [o.keys[1] for o in by_hand if o.keys[0] == "data"])
    other = are_other_pictures(before, data)
    if other:
        tables, origins = merge([*(o for o in written if not is_about_pictures(o)), *by_hand])
    return tables | {"data": data}, origins, other


def _fit_micro_batch(train: dict[str, Any], origins: dict[str, str]) -> None:
    """Let a preset's micro-batch shrink with a smaller batch; one given by hand stays and is checked."""
    micro, batch = train.get("micro_batch"), train.get("batch_size")
    by_hand = is_given(origins.get("train.micro_batch", ""))
    if isinstance(micro, int) and isinstance(batch, int) and not by_hand and 0 < batch < micro:
        train["micro_batch"] = batch


def _identity(method: str) -> dict[str, str]:
    return {"method": method, "family": METHODS[method]["family"]}


def _preset_layer(preset: Preset) -> Iterator[Override]:
    for table, values in preset.tables.items():
        if table not in ("recipe", "plan"):
            for keys, value in leaves(values, (table,)):
                yield Override(keys, value, f"{preset.label}: {'.'.join(keys)}")


def _method_layer(method: str) -> Iterator[Override]:
    row = {key: value for key, value in METHODS[method].items() if key != "family"}
    for keys, value in leaves(row):
        place = f"method {method}: {'.'.join(keys)}"
        yield Override(route(keys, place), value, place)


def _recipe_layer(preset: Preset, recipe: str) -> Iterator[Override]:
    table = {key: value for key, value in preset.recipes.get(recipe, {}).items() if key != "method"}
    for keys, value in leaves(table):
        place = f"{preset.label}: recipe.{recipe}.{'.'.join(keys)}"
        yield Override(route(keys, place), value, place)


def leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value) for every value of nested tables; an empty table is a value."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def merge(overrides: Sequence[Override]) -> tuple[dict[str, Any], dict[str, str]]:
    """Overlay values, the later over the earlier; return the nested tables and where each value came from."""
    tables: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for override in overrides:
        keys, value = override.keys, override.value
        here = tables
        for key in keys[:-1]:
            inner = here.get(key)
            here[key] = inner if isinstance(inner, dict) else {}
            here = here[key]
        if value == {} and isinstance(here.get(keys[-1]), dict):
            continue
        if isinstance(value, dict) and isinstance(here.get(keys[-1]), dict):
            value = here[keys[-1]] | value
        here[keys[-1]] = value
        origins[".".join(keys)] = override.origin
    return tables, origins


def to_toml(config: RunConfig) -> str:
    """Write a resolved configuration as TOML; `from_toml` gives it back unchanged."""
    return write_toml(config.model_dump())


def from_toml(path: str | Path) -> RunConfig:
    """Read a resolved configuration, as a run folder keeps it.

    Raises:
        ConfigError: unreadable, not TOML, or refused by the schema.
    """
    tables = read_toml(Path(path))
    if isinstance(tables.get("data"), dict):
        tables["data"].setdefault("holdout", 0.0)  # runs that began before there was a holdout trained on everything
    return _validated(tables, {}, str(path))


# --- whether two configurations are the same run ---------------------------------------------------------------------

INTERVALS = ("log_every", "checkpoint_every", "sample_every", "eval_every", "keep_every", "snapshot_every")
# What may differ between two starts of one run: words, rhythm, how the machine is used, what a bad step leads to, and
# what is done with the finished model.
MACHINE = ("threads", "micro_batch", "bad_step", "compile", "cuda_graphs", "fused_norm", "shard")
FREE = {f"train.{key}" for key in (*INTERVALS, *MACHINE, "time")} | {"recipe.title"}
FREE_TABLES = ("about.", "edit.", "recipe.expected.")


def differing_keys(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in `a`, value in `b`) for every setting that makes two runs different.

    Intervals, threads and micro-batches do not, nor does a precision that one of them leaves to the machine ("auto").
    """
    left, right = _flat(a), _flat(b)
    keys = [key for key in left | right if left.get(key) != right.get(key) and not _free(key)]
    automatic = "auto" in (a.train.precision, b.train.precision)
    return [(key, left.get(key), right.get(key)) for key in keys if not (automatic and key == "train.precision")]


def _free(key: str) -> bool:
    return key in FREE or key.startswith(FREE_TABLES) or key == "recipe.expected"


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(table: dict[str, Any], path: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            else:
                flat[f"{path}{key}"] = value

    walk(config.model_dump(), "")
    return flat
