"""A folder for the Hugging Face hub: weights, model card, a grid of samples; and the upload."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cmtool.checkpoint import save_model
from cmtool.data.images import save_grid
from cmtool.errors import DISTRIBUTION, OfflineError, UserError, install_extra
from cmtool.files.atomic import atomic_text
from cmtool.files.cache import offline
from cmtool.interop.layout import plain_tensors
from cmtool.models import Model
from cmtool.networks import parameter_count
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling
from cmtool.units import human_bytes

GRID_IMAGES = 16
FILES = ("model.safetensors", "README.md", "grid.png")


def write(model: Model, out: Path, say: Callable[[str], None]) -> None:
    """Write the folder: `model.safetensors`, `README.md` (the model card) and `grid.png`.

    Raises:
        UserError: if `out` already exists, or the model samples points rather than images.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder.", "choose a new folder with --out")
    if model.float_samples or model.image_shape[0] == 2:
        raise UserError("--format hub shows a grid of images, and this model makes points.")
    save_model(out / "model.safetensors", plain_tensors(model.network), model.header)
    plan = plan_sampling(model.header)
    batches = list(generate(model, plan, range(GRID_IMAGES), batch_size=GRID_IMAGES))
    save_grid(batches[0].x0, out / "grid.png")
    atomic_text(out / "README.md", card(model, plan.nfe))
    license = _license(model.header)
    say(f"the license in the card is '{license}'" + ("; write yours into README.md." if license == "other" else "."))


def _license(header: dict[str, Any]) -> str:
    return str((header.get("origin") or {}).get("license") or "other").lower()


def _front_matter(model: Model) -> Iterator[str]:
    yield "---"
    yield f"license: {_license(model.header)}"
    yield "library_name: cmtool"
    yield "pipeline_tag: unconditional-image-generation"
    yield "tags:"
    yield from ("- consistency-model" if model.kind == "consistency" else "- diffusion", "- image-generation")
    if model.num_classes is not None:
        yield "- class-conditional"
    yield "---"


def _evaluations(count: str) -> str:
    return f"{count} evaluation" if count == "1" else f"{count} evaluations"


def _figures(header: dict[str, Any]) -> Iterator[str]:
    """Yield the lines about quality: every figure in the header, with its protocol."""
    published = header.get("published") or {}
    for nfe, value in (published.get("fid") or {}).items():
        yield f"* FID {value:g} with {_evaluations(nfe)}, as published ({published.get('source')})"
    figures = header.get("figures") or {}
    for nfe, value in figures.items():
        if nfe.isdecimal():
            yield f"* Frechet distance {value:.4g} with {_evaluations(nfe)}, measured after training"
        else:
            yield f"* {nfe}: {value}, measured in training"
    if figures:
        yield ""
        yield (
            "Distances measured in training are between few samples and the preset's own reference, in the features of "
            "a small network: they compare runs of this preset and are no published FID."
        )
    if not figures and not published.get("fid"):
        yield "No figures have been measured for this file; `cmtool eval` measures them."


def _facts(model: Model) -> Iterator[str]:
    header = model.header
    channels, side, _ = model.image_shape
    labels = f"{model.num_classes} classes" if model.num_classes else "no labels"
    yield f"* images: {channels} x {side} x {side}, {labels}"
    yield f"* network: {header['network']['kind']}, {parameter_count(model):,} parameters"
    yield f"* noise levels: {model.sigma_min:g} to {model.sigma_max:g}, sigma_data {model.sigma_data:g}"
    recipe = header.get("recipe") or {}
    if header.get("recipe_name"):
        how = f"preset {header.get('preset')}, recipe {header['recipe_name']} ({recipe.get('method', '?')})"
        yield f"* trained with: {how}, {header.get('step', 0):,} steps, seed {header.get('seed')}"
    origin = header.get("origin")
    if origin:
        yield f"* converted from: {origin.get('name') or origin.get('file')} ({origin.get('layout')} layout)"
    for count, times in (header.get("times") or {}).items():
        yield f"* sampling times, {_evaluations(count)}: {', '.join(f'{t:g}' for t in times)}"


def card(model: Model, nfe: int) -> str:
    """Return the model card in Markdown: what it is, its recipe, its figures with their protocol, an example."""
    what = "consistency model" if model.kind == "consistency" else "diffusion model (a teacher)"
    own = model.header["data"].get("path")  # not the preset's pictures
    title = Path(own).name if own else model.header.get("preset") or "images"
    lines = [
        *_front_matter(model),
        "",
        f"# A {what} of {title}",
        "",
        f"![{GRID_IMAGES} samples, {_evaluations(str(nfe))} each](grid.png)",
        "",
        "## What it is",
        "",
        *_facts(model),
        "",
        "## Figures",
        "",
        *_figures(model.header),
        "",
        "## Use",
        "",
        "```bash",
        f"pip install {DISTRIBUTION}",
        "cmtool sample --model model.safetensors",
        "```",
        "",
        "```python",
        "import cmtool",
        "",
        'model = cmtool.load("model.safetensors")',
        "images = cmtool.sample(model, num=16)",
        "print(images.shape)",
        "```",
        "",
    ]
    return "\n".join(lines)


def push(folder: Path, repository: str, *, dry_run: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Upload a written folder to `owner/name`, or only say so if `dry_run`; return files and sizes.

    Raises:
        UserError: if the name is invalid, or the package huggingface_hub is missing.
        OfflineError: if `CMTOOL_OFFLINE` forbids it.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"'{repository}' is no hub name; it is owner/name.")
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    for name, size in sizes.items():
        say(f"{'would upload' if dry_run else 'uploading'} {name} ({human_bytes(size)}) to {repository}")
    if not dry_run:
        _upload(folder, repository)
    return {"repository": repository, "files": sizes, "dry_run": dry_run}


def _upload(folder: Path, repository: str) -> None:
    if offline():
        raise OfflineError("CMTOOL_OFFLINE forbids uploading.", "unset it, or use --dry-run")
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push needs the package huggingface_hub.", install_extra("hub")) from None
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=list(FILES))
    except Exception as error:
        raise UserError(
            f"the hub refused {repository}: {str(error).splitlines()[0]}", "log in with: hf auth login"
        ) from error
