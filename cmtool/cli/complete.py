"""Shell completion of values: names of presets, recipes, models and runs. Nothing here imports torch.

Where this offers nothing, bash completes file names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer


def presets(incomplete: str) -> list[str]:
    """Return the presets whose names start with `incomplete`."""
    from cmtool.config.find import list_presets

    return _begin(incomplete, list_presets())


def recipes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the matching recipes that this command can run with the preset typed before it."""
    from cmtool.config.load import read_preset
    from cmtool.errors import UserError

    command = ctx.info_name or ""
    family = command.removeprefix("train-") if command.startswith("train-") else None
    try:
        return _begin(incomplete, read_preset(ctx.params.get("preset") or "digits").fitting(family))
    except UserError:
        return []


def models(incomplete: str) -> list[str]:
    """Return the matching run folders, bundled models and published models."""
    from cmtool.interop.published import names

    return _begin(incomplete, [*_runs("model.safetensors"), *names()])


def run_folders(incomplete: str) -> list[str]:
    """Return the matching run folders under ./runs."""
    return _begin(incomplete, _runs("config.toml"))


def references(incomplete: str) -> list[str]:
    """Return the matching references and presets."""
    from cmtool.config.find import list_presets
    from cmtool.evaluation.choices import REFERENCES

    return _begin(incomplete, dict.fromkeys([*REFERENCES, *list_presets()]))


def trackers(incomplete: str) -> list[str]:
    """Return the matching trackers."""
    from cmtool.api.run_settings import TRACKERS

    return _begin(incomplete, TRACKERS)


def _runs(file: str) -> list[str]:
    return [path.parent.as_posix() for path in sorted(Path("runs").glob(f"*/{file}"))]


def _begin(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
