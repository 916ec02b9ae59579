"""`cmtool import` and `cmtool export`: weights of other code bases in, ours out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Json, Quiet
from cmtool.cli.output import Output
from cmtool.errors import UsageError

FormName = Literal["edm", "consistency"]
FormatName = Literal["openai", "diffusers", "edm-state", "dit", "onnx", "torchscript", "hub"]


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """The options of `cmtool import`."""

    source: Annotated[str, typer.Argument(metavar="SRC", help="File, folder, published name or hf:owner/name.")]
    out: Annotated[Path, typer.Option("--out", "-o", help="The model file to write.")]
    form: Annotated[FormName | None, typer.Option("--form", help="Diffusion (edm) or consistency model.")] = None
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Image side, if the file cannot tell.")
    ] = None
    head_channels: Annotated[int | None, typer.Option("--head-channels", min=1, help="Width of an attention head.")] = (
        None
    )
    sigma_min: Annotated[float | None, typer.Option("--sigma-min", min=1e-9, help="Smallest noise level.")] = None
    sigma_max: Annotated[float | None, typer.Option("--sigma-max", min=1e-9, help="Largest noise level.")] = None
    sigma_data: Annotated[
        float | None, typer.Option("--sigma-data", min=1e-9, help="Standard deviation of the data.")
    ] = None
    noise_scale: Annotated[
        float | None, typer.Option("--noise-scale", min=1e-9, help="The network is fed this times ln t (250, 0.25).")
    ] = None
    qkv: Annotated[
        Literal["heads", "three"] | None,
        typer.Option("--qkv", help="Order of guided-diffusion attention; usually heads."),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="ema|raw|NAME", help="Which weights of several; usually the average."),
    ] = None
    json_mode: Json = False
    quiet: Quiet = False


@command
def import_model(given: ImportCommand) -> None:
    """Turn other people's weights into a model file; what the file cannot say is assumed, and said.

    Reads OpenAI's .pt files, diffusers folders, NVlabs EDM, ECT and TCM snapshots, DiT and SiT files, guided-diffusion
    weights and OpenAI's JAX checkpoints. Nothing in a file is ever run.

    Example: cmtool import cd_imagenet64_l2.pt --out model.safetensors
    """
    output = Output(given.json_mode, given.quiet)
    from cmtool.interop.reading import ImportOptions, summary
    from cmtool.interop.reading import import_model as translate

    options = ImportOptions(
        form=given.form,
        resolution=given.resolution,
        head_channels=given.head_channels,
        sigma_min=given.sigma_min,
        sigma_max=given.sigma_max,
        sigma_data=given.sigma_data,
        noise_scale=given.noise_scale,
        qkv=given.qkv,
        weights=given.weights,
    )
    if not Path(given.source).exists() and _is_name(given.source):
        if options != ImportOptions(weights=given.weights):
            raise UsageError(
                f"{given.source} is translated by its name; options such as --form go with files and folders."
            )
        header = _copy_known(given.source, given.out, output, given.weights)
    else:
        header = translate(Path(given.source), given.out, options, say=output.say)
    output.json({"path": str(given.out), "header": header})
    if not given.quiet:
        for what, value in summary(header):
            output.say(f"{what}: {value}")
    output.result(str(given.out))


def _is_name(source: str) -> bool:
    from cmtool.interop.known import PUBLISHED

    return source.startswith(("hf:", "openai/")) or source in PUBLISHED


def _copy_known(name: str, out: Path, output: Output, weights: str | None) -> dict[str, object]:
    """Fetch and translate a named model and put it at `out`."""
    import shutil

    from cmtool.checkpoint import read_header
    from cmtool.files.atomic import atomic_write
    from cmtool.interop.published import resolve_model

    found = resolve_model(name, output, weights)
    with atomic_write(out) as temporary:
        shutil.copyfile(found, temporary)
    return read_header(out)


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """The options of `cmtool export`."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model file, run folder or published name.")]
    format: Annotated[FormatName, typer.Option("--format", "-f", help="The layout to write.")]
    out: Annotated[Path, typer.Option("--out", "-o", help="File or folder to write.")]
    push: Annotated[str | None, typer.Option("--push", help="hub: upload to owner/name afterwards.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: say what would be uploaded.")] = False
    json_mode: Json = False
    quiet: Quiet = False


@command
def export_model(given: ExportCommand) -> None:
    """Write a model for other software: code of OpenAI, EDM or DiT, diffusers, ONNX, TorchScript, the Hugging Face hub.

    Example: cmtool export demo/digits --format torchscript --out digits.pt
    """
    output = Output(given.json_mode, given.quiet)
    if given.push and given.format != "hub":
        raise UsageError("--push belongs to --format hub.")
    if given.dry_run and not given.push:
        raise UsageError("--dry-run belongs to --push owner/name.")
    from cmtool.interop.published import resolve_model
    from cmtool.interop.writing import export_model as write

    write(resolve_model(given.model, output), given.format, given.out, say=output.say)
    document: dict[str, object] = {"path": str(given.out), "format": given.format}
    if given.push:
        from cmtool.interop.hub import push as upload

        document["push"] = upload(given.out, given.push, dry_run=given.dry_run, say=output.say)
    output.json(document)
    output.result(str(given.out))
