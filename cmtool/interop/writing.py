"""Export: from a cmtool model file to other code bases' layouts."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cmtool.config.networks import AdmConfig, SongConfig, network_config
from cmtool.diffusion.grid import karras_grid
from cmtool.errors import UserError, unknown
from cmtool.files.atomic import atomic_write
from cmtool.interop import diffusers, dit, edm, openai
from cmtool.interop.layout import plain_tensors
from cmtool.models import Model, load
from cmtool.networks.normalization import MAX_GROUPS

FORMATS = ("openai", "diffusers", "edm-state", "dit", "onnx", "torchscript", "hub")
Say = Callable[[str], None]
# What DiT's own network is.
_CLASSIC = {
    "two_time": False,
    "log_variance": False,
    "norm": "layer",
    "mlp": "gelu",
    "positions": "sincos",
    "qk_norm": False,
    "input_gate": False,
}
_GRID = 40  # grid points for a scheduler if the model was not trained on a grid


def _table(model: Model) -> AdmConfig | SongConfig:
    return network_config(**model.header["network"])


def _require(model: Model, kinds: tuple[str, ...], noise_scale: float, format: str) -> AdmConfig | SongConfig:
    """Check that another code base can express the network.

    Raises:
        UserError: if it cannot; the message names what is missing.
    """
    table = _table(model)
    if table.kind not in kinds:
        raise UserError(
            f"--format {format} holds {' or '.join(kinds)} networks, and this model has a {table.kind} network."
        )
    if table.two_time or table.log_variance:
        extra = "a second time input" if table.two_time else "a log-variance head"
        raise UserError(f"--format {format} has no place for {extra}, which this network has.")
    if table.kind == "adm" and table.embedding != "positional":
        raise UserError(f"--format {format} has no Fourier embedding in its ADM network.")
    if model.process.kind != "ve" or model.process.parameterization not in ("edm", "consistency"):
        raise UserError(
            f"--format {format} knows noise that is added (process.kind ve); this model's is {model.process.kind}."
        )
    if abs(model.process.noise_scale - noise_scale) > 1e-9:
        raise UserError(
            f"code that reads --format {format} feeds the network {noise_scale:g} ln t, and this one was trained with "
            f"{model.process.noise_scale:g} ln t: its images would be wrong there.",
            f"train with --set process.noise_scale={noise_scale:g}",
        )
    return table


def _require_groups(table: AdmConfig | SongConfig, smallest: int, format: str) -> None:
    """Check that every normalization has min(32, width / smallest) groups, as in the other code base."""
    for width in {table.channels * mult for mult in table.channel_mult} | {table.channels}:
        theirs, ours = min(MAX_GROUPS, width // smallest), min(MAX_GROUPS, width // table.group_channels)
        if theirs != ours or width % theirs:
            raise UserError(
                f"--format {format} normalizes {width} channels in {theirs} groups, and this network in {ours}."
            )


def _untold(model: Model, say: Say) -> dict[str, Tensor]:
    """Return a network's tensors without the map of its augmentation labels, which samples do not use."""
    tensors = plain_tensors(model.network)
    if tensors.pop("map_augment.weight", None) is not None:
        say("the map of augmentation labels was left out: samples are made with zeros.")
    return tensors


def _save_state(tensors: dict[str, Tensor], out: Path) -> None:
    """Write a bare state dict: safetensors if the suffix says so, else a file for `torch.load(weights_only=True)`."""
    with atomic_write(out) as temporary:
        if out.suffix == ".safetensors":
            save_file(tensors, str(temporary), metadata={"format": "pt"})
        else:
            torch.save(OrderedDict(tensors), temporary)


def write_openai(model: Model, out: Path, say: Say) -> None:
    """Write a state dict for OpenAI's consistency_models repository."""
    table = _require(model, ("adm",), openai.NOISE_SCALE, "openai")
    _require_groups(table, 1, "openai")
    _save_state(_untold(model, say), out)
    starts = "cd_ or ct_" if model.kind == "consistency" else "edm_"
    say(f"the file does not say that this is a {model.kind} model; give it a name that begins with {starts}.")


def write_edm_state(model: Model, out: Path, say: Say) -> None:
    """Write a state dict for the networks of NVlabs EDM: SongUNet as it is, ADM as DhariwalUNet."""
    table = _require(model, ("song", "adm"), edm.NOISE_SCALE, "edm-state")
    _require_groups(table, 4, "edm-state")
    tensors = plain_tensors(model.network)
    if table.kind == "adm":
        tensors = edm.to_dhariwal(tensors, table, model.image_shape[1])
    elif table.scale_shift:
        raise UserError("EDM's SongUNet adds its embedding; this network scales and shifts by it.")
    _save_state({f"model.{name}": tensor for name, tensor in tensors.items()}, out)
    wrapper = "ECMPrecond (ECT)" if model.process.parameterization == "consistency" else "EDMPrecond"
    say(f"load it into {wrapper} with augment_dim={table.augment_labels}; the file does not say which of them it is.")


def write_dit(model: Model, out: Path, say: Say) -> None:
    """Write the state dict of DiT's and SiT's code, which reads it as `ema`; our own header lies beside it."""
    table = network_config(**model.header["network"])
    if table.kind != "dit":
        raise UserError(f"--format dit holds dit networks, and this model has a network of kind {table.kind}.")
    own = table.model_dump()
    newer = [f"network.{key} = {own[key]!r}" for key, value in _CLASSIC.items() if own[key] != value]
    if newer or model.process.truncated_at is not None:
        raise UserError(f"--format dit has no place for {' and '.join(newer) or 'a second, frozen network'}.")
    form = model.process.parameterization
    tensors = dit.to_dit(_untold(model, say), form, model.image_shape[0])
    network = {key: value for key, value in model.header["network"].items() if key != "augment_labels" or not value}
    header = {dit.HEADER: json.dumps(model.header | {"network": network})}
    with atomic_write(out) as temporary:
        if out.suffix == ".safetensors":
            save_file(tensors, str(temporary), metadata={"format": "pt", **header})
        else:
            torch.save({"ema": OrderedDict(tensors), **header}, temporary)
    fed = {"ddpm": "it predicts the noise of DiT's 1,000 steps", "flow": "it gives SiT's velocity"}
    usual = "DiT's code can hold it (learn_sigma=False), but the samplers of DiT and SiT ask for noise or a velocity"
    say(f"{fed.get(form, usual)}; our own settings are in the file too, so that cmtool import gives the model back.")


def write_diffusers(model: Model, out: Path, say: Say) -> None:
    """Write a folder that `ConsistencyModelPipeline.from_pretrained` opens (a teacher: `UNet2DModel`)."""
    _require(model, ("adm",), openai.NOISE_SCALE, "diffusers")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder.", "choose a new folder with --out")
    grid = int((model.header.get("origin") or {}).get("grid") or _GRID)
    diffusers.write(model, _untold(model, say), out, grid)
    two = model.header.get("times", {}).get("2")
    if two and model.kind == "consistency":
        levels = karras_grid(grid, model.sigma_min, model.sigma_max, model.rho)[::-1]
        places = sorted((min(range(grid), key=lambda i: abs(levels[i] - t)) for t in two), reverse=True)
        say(f"for this model's two-step times call the pipeline with timesteps={places}; its own choice is another.")


def _programs(format: str) -> Callable[[Model, Path, Say], None]:
    def write(model: Model, out: Path, say: Say) -> None:
        from cmtool.interop import programs

        programs.write(model, out, format, say)

    return write


def _hub(model: Model, out: Path, say: Say) -> None:
    from cmtool.interop import hub

    hub.write(model, out, say)


WRITERS: dict[str, Callable[[Model, Path, Say], None]] = {
    "openai": write_openai,
    "diffusers": write_diffusers,
    "edm-state": write_edm_state,
    "dit": write_dit,
    "onnx": _programs("onnx"),
    "torchscript": _programs("torchscript"),
    "hub": _hub,
}


def export_model(path: Path, format: str, out: Path, say: Say = lambda text: None) -> dict[str, Any]:
    """Write the model at `path` to `out` in another layout and return its header; `say` receives remarks.

    Raises:
        UserError: if the format is unknown or cannot express this model, or `out` cannot be written.
    """
    if format not in WRITERS:
        raise UserError(unknown("format", format, FORMATS))
    model = load(path)
    try:
        if model.condition is not None and format != "hub":
            raise UserError(
                f"--format {format} has no place for the picture that this model is conditioned on "
                f"({model.header['data']['condition']})."
            )
        if model.latent is not None and format in ("onnx", "torchscript"):
            raise UserError(f"--format {format} holds no autoencoder, and this model works on latents.")
        WRITERS[format](model, out, say)
    except UserError as error:
        if error.hint is None and format != "hub":
            error.hint = "choose another --format; hub holds every model"
        raise
    return model.header
