"""The folder layout of `ConsistencyModelPipeline` and `UNet2DModel`, in both directions, without diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmtool.checkpoint import read_preamble
from cmtool.config.networks import network_config
from cmtool.errors import CheckpointError
from cmtool.files.atomic import atomic_text, atomic_write
from cmtool.interop.layout import Foreign, compare_names, shapes_of
from cmtool.interop.openai import NOISE_SCALE
from cmtool.interop.torch_file import find_tensors, load_torch, read_safetensors
from cmtool.interop.unet2d import DEFAULTS, from_diffusers, network_of, to_diffusers, unet_config
from cmtool.interop.weights import Found, choose, judged, says_average, settled
from cmtool.models import Model

WEIGHTS = "diffusion_pytorch_model"
SOURCE_KEY = "cmtool_source"
_WEIGHTS = re.compile(
    r"(?P<folder>[^/]+/)?diffusion_pytorch_model(?P<first>(?:\.[\w-]+)*?)\.(?:safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<last>[\w-]+))?\.json)?"
)
_HALVES, _FULL = ("fp16", "bf16"), ("fp32",)


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
    """Whether a folder is a pipeline, a UNet2DModel, or a training checkpoint with such folders inside."""
    return (folder / "model_index.json").is_file() or any(
        (folder / place / "config.json").is_file() for place in ("", *_inner_folders(_names(folder)))
    )


def _names(folder: Path) -> list[str]:
    """Return the files of a folder and of its direct subfolders, relative to it."""
    return sorted(
        str(file.relative_to(folder).as_posix())
        for pattern in ("*", "*/*")
        for file in folder.glob(pattern)
        if file.is_file()
    )


def _inner_folders(names: Iterable[str]) -> list[str]:
    """Return the subfolders named after a network or an average: `unet`, `unet_ema`, `ema`."""
    folders = dict.fromkeys(name.partition("/")[0] for name in names if "/" in name)
    return [name for name in folders if "unet" in name.lower() or says_average([name]) is not None]


@dataclass(frozen=True)
class WeightFile:
    """A file of weights in a diffusers folder: its `name` in the folder, and whether it is in half precision."""

    name: str
    half: bool
    sharded: bool = False

    @property
    def order(self) -> tuple[bool, bool, bool, str]:
        """Sort key: full precision first, then safetensors, then single files."""
        return self.half, not re.search(r"\.safetensors", self.name), self.sharded, self.name


def weight_files(names: Iterable[str], halves: Callable[[str], bool] = lambda name: False) -> list[Found[WeightFile]]:
    """Return the sets of weights among the files of a folder or repository, with the best file of each.

    Full precision beats half precision. `halves` answers for files whose names do not say which they are.
    """
    names = list(names)
    best: dict[tuple[str, bool | None], tuple[WeightFile, tuple[str, ...]]] = {}
    for name in names:
        found = _WEIGHTS.fullmatch(name)
        place = (found["folder"] or "").rstrip("/") if found else ""
        if found is None or (place and place not in _inner_folders(names)):
            continue
        variants = [part for part in f"{found['first']}.{found['last'] or ''}".split(".") if part]
        half = any(part in _HALVES for part in variants) or halves(name)
        file = WeightFile(name, half, bool(found["index"]))
        kind = place, says_average(variants)
        parts = (*([place] if place else []), *(part for part in variants if part not in (*_HALVES, *_FULL)))
        if kind not in best or file.order < best[kind][0].order:
            best[kind] = file, parts
    return settled(judged(parts, file) for file, parts in best.values())


def _half_inside(folder: Path, name: str) -> bool:
    """Return whether a safetensors file's preamble lists mostly half-precision tensors."""
    if not name.endswith(".safetensors"):
        return False
    try:
        entries = read_preamble(folder / name)
    except CheckpointError:
        return False
    kinds = [entry.get("dtype") for key, entry in entries.items() if key != "__metadata__"]
    return 2 * sum(kind in ("F16", "BF16") for kind in kinds) > len(kinds)


def _read_weights(folder: Path, file: WeightFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / file.name
    if not file.sharded:
        if path.suffix == ".safetensors":
            tensors, metadata = read_safetensors(path)
            return find_tensors(tensors, path)[0], metadata
        return find_tensors(load_torch(path), path)[0], {}
    places = _json(path).get("weight_map")
    shards = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not shards or any(Path(name).name != name or not name.endswith(".safetensors") for name in shards):
        raise CheckpointError(f"{path} names no safetensors files.")
    joined: dict[str, Tensor] = {}
    for name in shards:
        joined |= read_safetensors(path.parent / name)[0]
    return joined, {}


def _choose(folder: Path, wanted: str | None) -> tuple[str, WeightFile, list[str]]:
    """Return the chosen set of weights: its name, its file, and sentences for the user about the choice."""
    names = _names(folder)
    found = weight_files(names, lambda name: _half_inside(folder, name))
    usable = [one for one in found if (folder / one.contents.name).with_name("config.json").is_file()]
    if not usable:
        inner = folder / "unet" if (folder / "unet").is_dir() else folder
        network_of(_network_config(inner))
        raise CheckpointError(
            f"{inner} holds no weights: {WEIGHTS}.safetensors (or .fp16.safetensors, .bin) is missing."
        )
    taken, said = choose(usable, wanted, folder)
    notes = [said] if said and len(usable) > 1 else []
    file = taken.contents
    place = (folder / file.name).parent
    beside = [name for name in names if (folder / name).parent == place and re.search(r"\.(fp16|bf16)\.", name)]
    if not file.half and beside:
        notes.append(f"took {file.name} in full precision, not {beside[0]}.")
    return taken.name, file, notes


def _network_config(inner: Path) -> dict[str, Any]:
    config = _json(inner / "config.json")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise CheckpointError(f"{inner} holds a {config['_class_name']}; cmtool reads UNet2DModel.")
    return config


def read(folder: Path, wanted: str | None = None) -> Foreign:
    """Read a `ConsistencyModelPipeline` or `UNet2DModel` folder, or a training checkpoint that holds the latter.

    `wanted`: "ema" or "raw" weights, or a name; None prefers an average.

    Raises:
        CheckpointError: if it is incomplete, another pipeline, or has another kind of network.
        UserError: if it does not hold the wanted weights.
    """
    index = _json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    pipeline = index.get("_class_name")
    if pipeline not in (None, "ConsistencyModelPipeline"):
        raise CheckpointError(
            f"{folder} is a {pipeline}; cmtool reads ConsistencyModelPipeline and UNet2DModel folders."
        )
    name, file, notes = _choose(folder, wanted)
    config = _network_config((folder / file.name).parent)
    table, side = network_of(config)
    tensors, metadata = _read_weights(folder, file)
    translated = from_diffusers(tensors, table, side)
    filled = DEFAULTS | config
    foreign = Foreign(
        "diffusers", table, int(filled["in_channels"]), side, filled["num_class_embeds"], NOISE_SCALE, translated
    )
    foreign.notes, foreign.weights = notes, name
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
    """Write a folder: a whole `ConsistencyModelPipeline`, or only the UNet2DModel of a diffusion model.

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
