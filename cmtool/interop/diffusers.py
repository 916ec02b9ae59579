"""The folder layout of `ConsistencyModelPipeline` and `UNet2DModel`, both ways and without the diffusers package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from cmtool.checkpoint import atomic_text, atomic_write
from cmtool.config.networks import network_config
from cmtool.errors import CheckpointError
from cmtool.interop.layout import Foreign, compare_names, shapes_of
from cmtool.interop.openai import NOISE_SCALE
from cmtool.interop.torch_file import read_safetensors, read_tensors
from cmtool.interop.unet2d import DEFAULTS, from_diffusers, network_of, to_diffusers, unet_config
from cmtool.models import Model

WEIGHTS = "diffusion_pytorch_model"
SOURCE_KEY = "cmtool_source"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path} is no readable JSON file.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value


def recognizes(folder: Path) -> bool:
    """Whether a folder is a pipeline or a UNet2DModel."""
    return (
        (folder / "model_index.json").is_file()
        or (folder / "config.json").is_file()
        or (folder / "unet/config.json").is_file()
    )


def _weights(folder: Path) -> Path:
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.fp16.bin"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no weights: {WEIGHTS}.safetensors (or .fp16.safetensors, .bin) is missing.")


def read(folder: Path) -> Foreign:
    """Read a `ConsistencyModelPipeline` or `UNet2DModel` folder.

    Raises:
        CheckpointError: if it is another pipeline, incomplete, or its network is of another kind.
    """
    index = _json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    pipeline = index.get("_class_name")
    if pipeline not in (None, "ConsistencyModelPipeline"):
        raise CheckpointError(
            f"{folder} is a {pipeline}; cmtool reads ConsistencyModelPipeline and UNet2DModel folders."
        )
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _json(inner / "config.json")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise CheckpointError(f"{inner} holds a {config['_class_name']}; cmtool reads UNet2DModel.")
    table, side = network_of(config)
    weights = _weights(inner)
    tensors, metadata = read_safetensors(weights) if weights.suffix == ".safetensors" else (read_tensors(weights), {})
    translated = from_diffusers(tensors, table, side)
    filled = DEFAULTS | config
    foreign = Foreign(
        "diffusers", table, int(filled["in_channels"]), side, filled["num_class_embeds"], NOISE_SCALE, translated
    )
    if pipeline:
        foreign.form = "consistency"
    elif metadata.get(SOURCE_KEY) in ("edm", "consistency"):
        foreign.form = metadata[SOURCE_KEY]  # type: ignore[assignment]
    if (folder / "scheduler/scheduler_config.json").is_file():
        scheduler = _json(folder / "scheduler/scheduler_config.json")
        foreign.sigma_min, foreign.sigma_max = scheduler.get("sigma_min"), scheduler.get("sigma_max")
        foreign.sigma_data, foreign.grid = scheduler.get("sigma_data"), scheduler.get("num_train_timesteps")
    return foreign


def write(model: Model, tensors: dict[str, Tensor], folder: Path, num_scales: int = 40) -> None:
    """Write a folder: a whole `ConsistencyModelPipeline`, or for a diffusion model its UNet2DModel alone.

    `num_scales`: points of the scheduler's grid. Raises `UserError` for networks that UNet2DModel cannot express.
    """
    from safetensors.torch import save_file

    channels, side, _ = model.image_shape
    table = network_config(**model.header["network"])
    config = unet_config(table, channels, side, model.num_classes)
    translated = to_diffusers(tensors, table, side)
    compare_names(shapes_of(from_diffusers(dict(translated), table, side)), shapes_of(tensors), "the exported network")
    consistency = model.kind == "consistency"
    inner = folder / "unet" if consistency else folder
    with atomic_write(inner / f"{WEIGHTS}.safetensors") as temporary:
        save_file(
            translated, str(temporary), metadata={"format": "pt", SOURCE_KEY: "consistency" if consistency else "edm"}
        )
    atomic_text(inner / "config.json", json.dumps(config, indent=2) + "\n")
    if not consistency:
        return
    scheduler = {
        "_class_name": "CMStochasticIterativeScheduler",
        "clip_denoised": True,
        "num_train_timesteps": num_scales,
        "rho": model.rho,
        "s_noise": 1.0,
        "sigma_data": model.sigma_data,
        "sigma_max": model.sigma_max,
        "sigma_min": model.sigma_min,
    }
    atomic_text(folder / "scheduler/scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    index = {
        "_class_name": "ConsistencyModelPipeline",
        "_diffusers_version": "0.35.2",
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    atomic_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
