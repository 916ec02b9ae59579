"""What the train commands show: the recipes with their parts and published figures, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmtool.cli.output import Output
    from cmtool.config.parts import RecipeConfig
    from cmtool.losses.diagnose import Discrepancy

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
