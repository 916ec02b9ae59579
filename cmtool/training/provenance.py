"""What a run writes down so that somebody can repeat it: the command, the versions, the machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cmtool.checkpoint import model_hash
from cmtool.config.schema import RunConfig
from cmtool.errors import CheckpointError
from cmtool.version import __version__

_LIBRARIES = ("numpy", "safetensors", "pillow", "scikit-learn", "pydantic")


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    return {"cmtool": __version__, "torch": torch.__version__.split("+")[0], "python": platform.python_version()}


def machine(device: torch.device, config: RunConfig, precision: str) -> dict[str, Any]:
    """Return what decides the last bits of the numbers: device, precision, threads, deterministic algorithms.

    `precision` is the one in use; the settings may say "auto".
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "deterministic": config.train.deterministic,
    }


def provenance(
    config: RunConfig, device: torch.device, fingerprint: str, arguments: Sequence[str], precision: str
) -> dict[str, Any]:
    """Return what `run.log` begins with; together with `config.toml` it is all that is needed to repeat the run."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    said: dict[str, Any] = {
        "command": list(arguments),
        "folder": os.getcwd(),
        "versions": versions() | found,
        "system": platform.platform(),
        "interpreter": sys.executable,
        **machine(device, config, precision),
        "seed": config.train.seed,
        "data": fingerprint,
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("CMTOOL_")},
    }
    for role in ("teacher", "init"):
        path = getattr(config, role)
        if path is not None:
            said[role] = {"path": path, "hash": _hash(path)}
    return said


def _hash(path: str) -> str | None:
    try:
        file = Path(path)
        return model_hash(file / "model.safetensors" if file.is_dir() else file)
    except CheckpointError:
        return None
