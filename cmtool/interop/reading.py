"""Import: from another code base's file or folder to a cmtool model file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cmtool.checkpoint import save_model
from cmtool.config.networks import network_config
from cmtool.config.schema import ProcessConfig
from cmtool.errors import CheckpointError, UsageError, UserError
from cmtool.interop import diffusers, dit, edm, edm2, jax, openai, pickles
from cmtool.interop.known import Published, by_file_name
from cmtool.interop.layout import Foreign, Form, compare_names, named, shapes_of, widen
from cmtool.interop.torch_file import find_tensors, load_torch, read_safetensors
from cmtool.interop.weights import averages_beside, choose, full_beside, newest_of_series
from cmtool.networks import build_network

KNOWN_LAYOUTS = (
    "OpenAI consistency_models and guided-diffusion (.pt), diffusers folders, NVlabs EDM, ECT and TCM snapshots (.pkl) "
    "and state dicts, DiT and SiT state dicts, OpenAI's JAX CIFAR-10 checkpoints"
)
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_UNSUPPORTED = {"VPPrecond": "VP", "VEPrecond": "VE", "iDDPMPrecond": "iDDPM"}


@dataclass(frozen=True)
class ImportOptions:
    """What the user says in place of the file; None leaves it to the file or to the usual value."""

    form: Form | None = None
    resolution: int | None = None
    head_channels: int | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float | None = None
    noise_scale: float | None = None
    qkv: str | None = None
    weights: str | None = None


def _from_tensors(
    tensors: dict[str, torch.Tensor], path: Path, options: ImportOptions, kwargs: dict[str, Any]
) -> Foreign:
    shapes = shapes_of(tensors)
    heads = options.head_channels or openai.HEAD_CHANNELS
    if openai.recognizes(shapes):
        return openai.read(tensors, resolution=options.resolution, head_channels=heads, qkv=options.qkv)
    if edm2.recognizes(shapes):
        return edm2.read(tensors, head_channels=options.head_channels, kwargs=kwargs)
    if edm.recognizes(shapes):
        return edm.read(tensors, head_channels=heads, kwargs=kwargs)
    if dit.recognizes(shapes):
        return dit.read(tensors, path.name, options.head_channels, kwargs.get(dit.HEADER))
    if "conv_in.weight" in shapes and any(name.startswith("down_blocks.") for name in shapes):
        raise CheckpointError(
            f"{path} holds diffusers weights without their config.json.", "import the folder that holds both"
        )
    raise CheckpointError(
        f"{path} has no layout that is known here: {len(shapes)} tensors, among them {named(shapes, 5)}. "
        f"Known: {KNOWN_LAYOUTS}."
    )


def _from_pickle(path: Path, options: ImportOptions) -> Foreign:
    taken, said = choose(pickles.network_records(pickles.read_pickle(path), path), options.weights, path)
    record = taken.contents
    if record.name in _UNSUPPORTED:
        raise CheckpointError(
            f"{path} is a {record.name}: cmtool does not have the {_UNSUPPORTED[record.name]} parameterization.",
            "EDMPrecond and ECMPrecond snapshots are read",
        )
    modules = record.state.get("_modules") or {}
    inner = modules.get("model") or modules.get("unet")
    kwargs = {**record.arguments, **(inner.arguments if isinstance(inner, pickles.Record) else {})}
    tensors = pickles.flatten(record)
    if not tensors:
        raise CheckpointError(f"{path} holds a {record.name} without weights.")
    foreign = _from_tensors(tensors, path, options, kwargs)
    foreign.weights = taken.name
    foreign.notes += _said_of_file(said, path)
    foreign.notes.append(
        f"{record.name} was read without running its embedded source (sha256 {record.source_hash[:12]})."
    )
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        value = record.state.get(name)
        if isinstance(value, int | float) and 0 < value < 1e6:
            setattr(foreign, name, float(value))
    if record.name in ("EDMPrecond", "Precond"):
        foreign.form = "edm"
    elif record.name == "ECMPrecond":
        foreign.form = "consistency"
        # ECT subtracts sigma_min in its scalings and TCM does not. The embedded source, read as text, tells them apart.
        foreign.parameterization = "consistency" if "- self.sigma_min" in record.source else "edm"
    return foreign


def _from_safetensors(path: Path, options: ImportOptions) -> Foreign:
    tensors, metadata = read_safetensors(path)
    if "cmtool" in metadata:
        raise UserError(f"{path} is a cmtool model already.", f"use it as it is: --model {path}")
    return _from_checkpoint(tensors, path, options, metadata)


def _from_checkpoint(content: Any, path: Path, options: ImportOptions, said_beside: dict[str, str]) -> Foreign:
    tensors, name, said = find_tensors(content, path, options.weights)
    foreign = _from_tensors(tensors, path, options, said_beside)
    foreign.weights = name
    foreign.notes += _said_of_file(said, path)
    return foreign


def _said_of_file(said: str | None, path: Path) -> list[str]:
    """Return sentences about one file's weights: which were taken, and whether a neighbor holds an average."""
    beside = averages_beside(path)
    lies = f"there is an average next to {path.name}: import {' or '.join(beside)} to take it." if beside else None
    full = full_beside(path)
    widths = f"{path.name} is in half precision; {full[0]} next to it is not." if full else None
    return [text for text in (said, lies, widths) if text]


def read_foreign(path: Path, options: ImportOptions) -> Foreign:
    """Recognize and translate a file or folder.

    Raises:
        CheckpointError: if it is missing, damaged, hostile, or has no known layout.
        UserError: if it is a cmtool model already, or the user must say something that the file does not.
    """
    if path.is_dir():
        if (path / "model.safetensors").is_file() and not diffusers.recognizes(path):
            raise UserError(f"{path} is a cmtool run already.", f"use it as it is: --model {path}")
        if diffusers.recognizes(path):
            foreign = diffusers.read(path, options.weights)
            foreign.notes += _said_of_file(None, path)
            return foreign
        if series := newest_of_series(path):
            taken, said = choose(series, options.weights, path)
            foreign = read_foreign(taken.contents, replace(options, weights=None))
            foreign.notes[:] = [*([said] if said else []), *foreign.notes]
            return foreign
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise CheckpointError(f"{path} is no folder that is known here; it holds: {found}. Known: {KNOWN_LAYOUTS}.")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.", "cmtool models lists the names that can be fetched")
    with open(path, "rb") as stream:
        start = stream.read(16)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return _from_safetensors(path, options)
    if start[:2] == b"PK" or start.startswith(_TORCH_LEGACY):
        content = load_torch(path)
        header = content.get(dit.HEADER) if isinstance(content, Mapping) else None
        return _from_checkpoint(content, path, options, {dit.HEADER: header} if isinstance(header, str) else {})
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _from_pickle(path, options)
    if jax.recognizes(path):
        return jax.read(path, options.weights)
    raise CheckpointError(
        f"{path} is no file that is known here ({path.stat().st_size} bytes, beginning {start[:8]!r}). "
        f"Known: {KNOWN_LAYOUTS}."
    )


def _form(foreign: Foreign, options: ImportOptions, published: Published | None, path: Path) -> tuple[Form, str | None]:
    """Return the form, and a sentence if it had to be guessed."""
    if options.form:
        return options.form, None
    if foreign.form:
        return foreign.form, None
    if published:
        return published.form, f"the file name says: {published.title}."
    guessed: Form = "edm" if path.name.lower().startswith("edm") else "consistency"
    return (
        guessed,
        f"the file does not say whether it is a diffusion or a consistency model; {guessed} was assumed (--form).",
    )


def _process(foreign: Foreign, options: ImportOptions, form: Form) -> tuple[ProcessConfig, str | None]:
    values = {
        "sigma_min": options.sigma_min or foreign.sigma_min or 0.002,
        "sigma_max": options.sigma_max or foreign.sigma_max or 80.0,
        "sigma_data": options.sigma_data or foreign.sigma_data or 0.5,
        "noise_scale": options.noise_scale or foreign.noise_scale,
    }
    chosen = foreign.parameterization if foreign.layout == "dit" or not options.form else None
    process = ProcessConfig(parameterization=chosen or form, **values)  # type: ignore[arg-type]
    assumed = [name for name in ("sigma_min", "sigma_max") if not getattr(options, name) and not getattr(foreign, name)]
    note = f"the noise range {values['sigma_min']:g} to {values['sigma_max']:g} was assumed" if assumed else None
    return process, note and f"{note} ({', '.join('--' + name.replace('_', '-') for name in assumed)})."


def describe(
    foreign: Foreign, path: Path, options: ImportOptions, published: Published | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the header of the model file, and sentences about what was assumed."""
    published = published or by_file_name(path)
    if foreign.header is not None:
        return {**foreign.header, "origin": _origin(foreign, path, published)}, foreign.notes
    form, form_note = _form(foreign, options, published, path)
    process, range_note = _process(foreign, options, form)
    times = {"1": [process.sigma_max]} if form == "consistency" else {}
    preset = published.preset if published else "cifar10" if foreign.layout == "jax" else None
    if published and published.form == form and foreign.layout == "openai":
        times = published.times or times
    header: dict[str, Any] = {
        "kind": "consistency" if form == "consistency" else "diffusion",
        "seed": 0,
        "step": 0,
        "network": foreign.network.model_dump(mode="json"),
        "process": process.model_dump(mode="json"),
        "data": {
            "source": preset or "unknown",
            "resolution": foreign.resolution,
            "channels": foreign.channels,
            "num_classes": foreign.num_classes,
            "class_names": None,
            "fingerprint": "",
            "float_samples": foreign.unbounded,
        },
        "times": times,
        "origin": _origin(foreign, path, published),
        "versions": {"torch": torch.__version__},
    }
    if foreign.label_dropout:
        header["label_dropout"] = foreign.label_dropout
    if preset:
        header["preset"] = preset
    if published:
        header["published"] = {
            "fid": {str(nfe): value for nfe, value in published.fid.items()},
            "source": published.source,
        }
    head = "" if options.head_channels or foreign.layout not in ("openai", "guided-diffusion") else _head_note(foreign)
    assumed = (form_note,) if published else (form_note, range_note, head)
    return header, [note for note in (*foreign.notes, *assumed) if note]


def _origin(foreign: Foreign, path: Path, published: Published | None) -> dict[str, Any]:
    """Return where an imported model comes from: layout, file, and what else is known."""
    origin: dict[str, Any] = {"layout": foreign.layout, "file": path.name}
    if foreign.weights:
        origin["weights"] = foreign.weights
    if grid := (published.grid if published else foreign.grid):
        origin["grid"] = grid
    if published:
        origin |= {"name": published.name, "license": published.license}
    return origin


def _head_note(foreign: Foreign) -> str:
    width = getattr(foreign.network, "head_channels", 0)
    return f"attention heads of {width} channels were assumed (--head-channels)."


def check_network(foreign: Foreign) -> None:
    """Check names and shapes against the recognized network.

    Raises:
        CheckpointError: with the number and names of missing and surplus tensors.
    """
    with torch.device("meta"):
        network = build_network(
            foreign.network, channels=foreign.channels, resolution=foreign.resolution, num_classes=foreign.num_classes
        )
    compare_names(shapes_of(foreign.tensors), shapes_of(network.state_dict()), f"the {foreign.layout} file")


def import_model(
    source: Path,
    out: Path,
    options: ImportOptions | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
    published: Published | None = None,
) -> dict[str, Any]:
    """Translate `source` into a model file at `out` and return its header; `say` receives what was assumed.

    Raises:
        CheckpointError, UserError: if the source cannot be understood, or `out` cannot be written.
    """
    options = options or ImportOptions()
    foreign = read_foreign(source, options)
    if options.resolution and options.resolution != foreign.resolution:
        raise UsageError(
            f"{source} is a network for {foreign.resolution} px, and --resolution says {options.resolution}."
        )
    widened = widen(foreign.tensors)
    check_network(foreign)
    header, notes = describe(foreign, source, options, published)
    for note in [*notes, *([widened] if widened else [])]:
        say(note)
    save_model(out, foreign.tensors, header)
    return header


def summary(header: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """Return (what, value) rows that describe an imported model in a few words."""
    network, process, data = header["network"], header["process"], header["data"]
    classes = f"{data['num_classes']} classes" if data["num_classes"] else "unconditional"
    if network["kind"] == "dit":
        patch = network_config(**network).patch_for(data["resolution"])
        sizes = f"patch {patch}, width {network['width']}, depth {network['depth']}, {network['heads']} heads"
    else:
        sizes = f"base {network['channels']}, multipliers {'-'.join(map(str, network['channel_mult']))}"
    fed = {"ddpm": "steps 0 to 999", "flow": "t / (1 + t)", "trig": "arctan(t / sigma_data)"}
    return [
        ("layout", header["origin"]["layout"]),
        ("kind", header["kind"]),
        ("network", f"{network['kind']}, {sizes}"),
        ("images", f"{data['channels']} x {data['resolution']} x {data['resolution']}, {classes}"),
        ("conditioning", fed.get(process["parameterization"], f"{process['noise_scale']:g} ln t")),
        ("noise range", f"{process['sigma_min']:g} to {process['sigma_max']:g}"),
        ("times", "; ".join(",".join(f"{t:g}" for t in times) for times in header["times"].values()) or "-"),
    ]
