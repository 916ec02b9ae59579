"""The table of published models known by name; it needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cmtool.diffusion.grid import karras_grid
from cmtool.files.cache import cache_dir

OPENAI = "https://openaipublic.blob.core.windows.net/consistency"
MIRROR = "CMTOOL_MIRROR"


@dataclass(frozen=True)
class Published:
    """One published file.

    `fid` maps the number of evaluations to the published FID (50,000 samples, the paper's protocol). `grid` is the
    number N of grid points used in training, and `indices` is the published two-step choice, counted from sigma_max.
    """

    name: str
    title: str
    form: Literal["edm", "consistency"]
    preset: str
    parameters: int
    fid: dict[int, float] = field(default_factory=dict)
    grid: int | None = None
    indices: tuple[int, ...] = ()
    license: str = "MIT"
    source: str = "Song et al. 2023, tables 1 and 2"
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The published file's name."""
        return f"{self.name.removeprefix('openai/')}.pt"

    @property
    def url(self) -> str:
        """Where to fetch it: OpenAI's server, or the mirror named by `CMTOOL_MIRROR`."""
        return f"{os.environ.get(MIRROR, OPENAI).rstrip('/')}/{self.file}"

    @property
    def bytes(self) -> int:
        """Size of its float32 weights; the file is slightly larger."""
        return 4 * self.parameters

    @property
    def times(self) -> dict[str, list[float]]:
        """Noise levels by number of evaluations, as published."""
        if self.form == "edm":
            return {}
        known = {"1": [80.0]}
        if self.grid and self.indices:
            levels = karras_grid(self.grid)[::-1]
            known[str(len(self.indices))] = [levels[index] for index in self.indices]
        return known

    @property
    def cached(self) -> Path:
        """Where the converted model is kept."""
        return cache_dir() / "models" / f"{self.name}.safetensors"


def _family(data: str, preset: str, title: str, parameters: int, edm: float) -> list[Published]:
    """Return the four files of one data set, without figures."""
    rows = {
        f"edm_{data}_ema": ("edm", "EDM teacher", {79: edm}),
        f"cd_{data}_l2": ("consistency", "consistency distillation, l2", {}),
        f"cd_{data}_lpips": ("consistency", "consistency distillation, LPIPS", {}),
        f"ct_{data}": ("consistency", "consistency training", {}),
    }
    return [
        Published(f"openai/{name}", f"{title}, {what}", form, preset, parameters, fid)  # type: ignore[arg-type]
        for name, (form, what, fid) in rows.items()
    ]


_IMAGENET, _LSUN = 295_899_267, 526_304_771
# Published for each file: FID with one and two evaluations, grid points, and the two-step indices.
_FIGURES: dict[str, tuple[dict[int, float], int, tuple[int, ...]]] = {
    "cd_imagenet64_l2": ({}, 40, (0, 22)),
    "cd_imagenet64_lpips": ({1: 6.20, 2: 4.70}, 40, (0, 22)),
    "ct_imagenet64": ({1: 13.0, 2: 11.1}, 201, (0, 106)),
    "cd_bedroom256_l2": ({}, 40, (0, 18)),
    "cd_bedroom256_lpips": ({1: 7.80, 2: 5.22}, 40, (0, 17)),
    "ct_bedroom256": ({1: 16.0, 2: 7.85}, 151, (0, 67)),
    "cd_cat256_l2": ({}, 40, ()),
    "cd_cat256_lpips": ({1: 11.0, 2: 8.84}, 40, ()),
    "ct_cat256": ({1: 20.7, 2: 11.7}, 151, (0, 62)),
}


def _with_figures(entry: Published) -> Published:
    found = _FIGURES.get(entry.name.removeprefix("openai/"))
    if found is None:
        return entry
    return Published(entry.name, entry.title, entry.form, entry.preset, entry.parameters, *found)


PUBLISHED: dict[str, Published] = {
    entry.name: _with_figures(entry)
    for entry in (
        *_family("imagenet64", "imagenet64", "ImageNet 64x64", _IMAGENET, 2.44),
        *_family("bedroom256", "lsun_bedroom256", "LSUN Bedroom 256x256", _LSUN, 3.57),
        *_family("cat256", "lsun_cat256", "LSUN Cat 256x256", _LSUN, 6.69),
    )
}


def by_file_name(path: Path) -> Published | None:
    """Return the published model with this file name, whatever its folder and suffix."""
    return PUBLISHED.get(f"openai/{path.name.split('.')[0]}")
