"""Resolve a model's name: a file, a run folder, a bundled model, a published one, or a repository of the hub.

torch is imported only to translate a download.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from cmtool.checkpoint import resolve_file
from cmtool.errors import CheckpointError, UserError, nearest, unknown
from cmtool.files.cache import cache_dir, offline
from cmtool.files.download import Download, download, read_json
from cmtool.interop.known import PUBLISHED, Published
from cmtool.talk import SILENCE, Talk
from cmtool.units import human_bytes

HUB = "https://huggingface.co"
DEMOS = Path(__file__).resolve().parent.parent / "demo"
_ABOUT = ("model_index.json", "scheduler/scheduler_config.json", "config.json")


def demo_names() -> list[str]:
    """Return the names of the models that come with the package."""
    return [f"demo/{file.stem}" for file in sorted(DEMOS.glob("*.safetensors"))]


def names() -> list[str]:
    """Return every model name other than files and folders."""
    return [*demo_names(), *PUBLISHED]


def resolve_model(name: str, talk: Talk | None = None, weights: str | None = None) -> Path:
    """Return the model file that `name` refers to; fetch and translate it the first time.

    Files and run folders come first, then `demo/NAME`, the published names, and `hf:owner/name`. `weights` chooses
    among several sets in a repository: "ema", "raw" or a name; None prefers an average.

    Raises:
        CheckpointError: if it is a path and nothing is there, or the download cannot be understood.
        UserError: if the name is unknown (the message has the nearest ones), or the download failed.
        OfflineError: if it has to be fetched and cannot be.
    """
    talk = talk or SILENCE
    if Path(name).exists():
        return resolve_file(name)
    if weights and not name.startswith("hf:"):
        raise UserError(f"{name} is one set of weights.", "leave --weights out")
    if name in PUBLISHED:
        return _published(PUBLISHED[name], talk)
    if name.startswith("hf:"):
        return _hub(name.removeprefix("hf:"), talk, weights)
    if name in demo_names():
        return DEMOS / f"{name.removeprefix('demo/')}.safetensors"
    if name.startswith(("openai/", "demo/")) or nearest(name, PUBLISHED):
        raise UserError(unknown("model", name, names()), "cmtool models lists them with their licenses and sizes")
    return resolve_file(name)


def _fetch(url: str, target: Path, talk: Talk, **known: Any) -> Path:
    if not offline():
        talk.say(f"fetching {url}")
    with talk.progress(known.get("size"), target.name) as update:
        return download(Download(url, target, **known), lambda done, total: update(completed=done))


def _published(entry: Published, talk: Talk) -> Path:
    if entry.cached.is_file():
        return entry.cached
    raw = cache_dir() / "downloads" / entry.name / entry.file
    if not raw.is_file():
        if not offline():
            about = f"{entry.title}, {entry.license} license, {human_bytes(entry.bytes)}"
            talk.say(f"{entry.name}: {about}, kept in {entry.cached.parent}")
        _fetch(entry.url, raw, talk, digest=f"sha256:{entry.sha256}" if entry.sha256 else None)
    _translate(raw, entry.cached, talk, entry)
    raw.unlink()
    return entry.cached


def _translate(raw: Path, out: Path, talk: Talk, published: Published | None = None) -> None:
    from cmtool.interop.reading import import_model

    try:
        import_model(raw, out, say=talk.say, published=published)
    except CheckpointError as error:
        # A damaged file must not be mistaken for a complete one next time.
        shutil.rmtree(raw) if raw.is_dir() else raw.unlink(missing_ok=True)
        raise CheckpointError(
            f"{error.message} It was removed from the cache.", "run it again to fetch it again"
        ) from None


def _hub(repository: str, talk: Talk, weights: str | None) -> Path:
    """Fetch a repository of the Hugging Face hub that holds a cmtool model or a diffusers pipeline."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in repository:
        raise UserError(f"'hf:{repository}' is no hub name; it is hf:owner/name.")
    chosen = f"+{re.sub(r'[^A-Za-z0-9_.-]', '_', weights)}" if weights else ""
    target = cache_dir() / "models" / "hf" / f"{repository}{chosen}.safetensors"
    if target.is_file():
        return target
    base = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    listing = read_json(f"{base}/api/models/{repository}?blobs=true")
    files = {str(entry.get("rfilename")): entry for entry in listing.get("siblings", []) if isinstance(entry, dict)}
    folder = cache_dir() / "downloads" / "hf" / repository
    wanted, said = _files_of(repository, list(files), weights)
    for name in wanted:
        blob = files[name].get("lfs") or {}
        digest = f"sha256:{blob['sha256']}" if blob.get("sha256") else None
        known = {"size": blob.get("size") or files[name].get("size"), "digest": digest}
        if not (folder / name).is_file():
            _fetch(f"{base}/{repository}/resolve/main/{name}", folder / name, talk, **known)
    if wanted == ["model.safetensors"]:
        resolve_our_own(folder / "model.safetensors", target)
    else:
        if said:
            talk.say(said)
        _translate(folder, target, talk)
    shutil.rmtree(folder, ignore_errors=True)
    return target


def _files_of(repository: str, files: list[str], weights: str | None) -> tuple[list[str], str | None]:
    """Return the files to fetch from a repository, and a sentence about the choice of weights.

    Raises:
        UserError: if it holds no model, or not the wanted weights.
    """
    if "model.safetensors" in files:
        if weights:
            raise UserError(f"hf:{repository} is one set of weights.", "leave --weights out")
        return ["model.safetensors"], None
    from cmtool.interop.diffusers import weight_files
    from cmtool.interop.weights import choose

    found = weight_files(files)
    if not found:
        shown = ", ".join(sorted(files)[:10]) or "nothing"
        raise UserError(f"hf:{repository} holds neither model.safetensors nor a diffusers pipeline; it holds: {shown}.")
    taken, said = choose(found, weights, f"hf:{repository}")
    place, _, file = taken.contents.name.rpartition("/")
    lead = f"{place}/" if place else ""
    stem = file.partition(".")[0]
    shards = [name for name in files if taken.contents.sharded and re.fullmatch(rf"{lead}{stem}-\d+-of-\d+\.\S+", name)]
    about = [name for name in files if name in (*_ABOUT, f"{lead}config.json")]
    return [*about, taken.contents.name, *shards], said if len(found) > 1 else None


def resolve_our_own(file: Path, target: Path) -> None:
    """Move a fetched cmtool model to its place after reading its header.

    Raises:
        CheckpointError: if it is not a cmtool model; the file is removed.
    """
    from cmtool.checkpoint import read_header

    try:
        read_header(file)
    except CheckpointError:
        file.unlink(missing_ok=True)
        raise
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, target)
