"""`cmtool models`: the models that can be named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmtool.api.find import finished_runs
from cmtool.cli.app import command
from cmtool.cli.options import Json
from cmtool.cli.output import Output


@dataclass(frozen=True, kw_only=True)
class ModelsCommand:
    """The options of `cmtool models`."""

    json_mode: Json = False


@command
def models(given: ModelsCommand) -> None:
    """List the models that --model takes by name: your finished runs, those that came along, and published ones.

    Examples: cmtool models | cmtool sample --model openai/cd_imagenet64_lpips --steps 2
    """
    out = Output(given.json_mode)
    runs, demos, published = _runs(), _demos(), _published()
    out.json({"runs": runs, "demo": demos, "published": published})
    if runs:
        rows = [[row["name"], row["kind"], row["preset"], row["step"]] for row in runs]
        out.table("Finished runs under ./runs", ["name", "kind", "preset", "step"], rows)
    if demos:
        out.table(
            "Models that came along",
            ["name", "kind", "preset"],
            [[row["name"], row["kind"], row["preset"]] for row in demos],
        )
    rows = [
        [
            row["name"],
            row["license"],
            f"{row['bytes'] / 1e9:.1f} GB",
            _fid(row["fid"]),
            "yes" if row["cached"] else "no",
        ]
        for row in published
    ]
    out.table(
        "Published models, fetched when first used", ["name", "license", "size", "FID (evaluations)", "here"], rows
    )


def _fid(values: dict[str, float]) -> str:
    return ", ".join(f"{value:g} ({nfe})" for nfe, value in values.items())


def _row(name: str, path: Path, header: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(path),
        **{key: header.get(key) for key in ("kind", "preset", "recipe_name", "step")},
    }


def _runs() -> list[dict[str, Any]]:
    return [_row(str(path.parent), path, header) for path, header in finished_runs(Path("runs"))]


def _demos() -> list[dict[str, Any]]:
    from cmtool.checkpoint import read_header
    from cmtool.interop.published import demo_names, resolve_model

    files = [(name, resolve_model(name)) for name in demo_names()]
    return [_row(name, path, read_header(path)) for name, path in files]


def _published() -> list[dict[str, Any]]:
    from cmtool.interop.known import PUBLISHED

    return [
        {
            "name": entry.name,
            "title": entry.title,
            "form": entry.form,
            "preset": entry.preset,
            "license": entry.license,
            "parameters": entry.parameters,
            "bytes": entry.bytes,
            "fid": {str(nfe): value for nfe, value in entry.fid.items()},
            "fid_source": entry.source,
            "times": entry.times,
            "url": entry.url,
            "cached": str(entry.cached) if entry.cached.is_file() else None,
        }
        for entry in PUBLISHED.values()
    ]
