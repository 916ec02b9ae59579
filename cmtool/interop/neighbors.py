"""Averages that other code bases write to separate files next to the raw weights of the same step."""

from __future__ import annotations

import re
from pathlib import Path

from cmtool.interop.weights import Found, judged, says_average

# guided-diffusion and consistency_models: model010000.pt, ema_0.9999_010000.pt, target_model010000.pt.
_SERIES = re.compile(r"(?P<what>model|target_model|teacher_model|ema_(?P<decay>[\d.]+)_)(?P<step>\d{6,})\.pt")
_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors")
_MOST = 2000


def _series(folder: Path) -> dict[str, list[Found[Path]]]:
    """Return the weights in a guided-diffusion run's folder by step."""
    steps: dict[str, list[Found[Path]]] = {}
    for file in sorted(folder.iterdir())[:_MOST]:
        if (match := _SERIES.fullmatch(file.name)) and file.is_file():
            name = match["what"].rstrip("_")
            decay = float(match["decay"]) if re.fullmatch(r"\d*\.\d+", match["decay"] or "") else None
            steps.setdefault(match["step"], []).append(judged((name,), file, decay))
    return steps


def newest_of_series(folder: Path) -> list[Found[Path]]:
    """Return the weights of the newest step of a guided-diffusion or consistency_models run, [] for other folders."""
    steps = _series(folder)
    return steps[max(steps, key=int)] if steps else []


def _stem(name: str) -> str:
    """Return a file name without the parts that distinguish an average from raw weights."""
    head = name
    for ending in _ENDINGS:
        head = head.removesuffix(ending)
    kept = re.sub(r"(?i)(^|[._-])(ema|swa|averaged?|0?\.\d+)(?=[._-]|$)", r"\1", head)
    return re.sub(r"[._-]+", "", kept.lower())


def full_beside(path: Path) -> list[str]:
    """Return the files next to one in half precision that hold the same in full: `x.safetensors` for `x.fp16...`."""
    plain = re.sub(r"(?i)[._-](fp16|bf16|half)(?=[._-])", "", path.name)
    names = (f"{plain.removesuffix(path.suffix)}{ending}" for ending in dict.fromkeys((path.suffix, *_ENDINGS)))
    return [name for name in names if plain != path.name and (path.parent / name).is_file()][:1]


def averages_beside(path: Path) -> list[str]:
    """Return the averages of raw weights among their neighbors, e.g. `x-EMA.ckpt` for `x.ckpt`.

    Empty for a path that is an average itself.
    """
    if says_average([path.stem if path.is_file() else path.name]) or not path.parent.is_dir():
        return []
    match = _SERIES.fullmatch(path.name)
    if match:
        return [one.contents.name for one in _series(path.parent).get(match["step"], []) if one.average]
    names = [entry.name for entry in sorted(path.parent.iterdir())[:_MOST] if entry.is_dir() == path.is_dir()]
    names = [name for name in names if path.is_dir() or name.endswith(_ENDINGS)]
    return [name for name in names if name != path.name and says_average([name]) and _stem(name) == _stem(path.name)]
