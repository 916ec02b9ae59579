"""The pictures of README and docs, made by the project itself.

    python docs/make_pictures.py                     the drawings, and what the models that came along make
    python docs/make_pictures.py --digits RUN --avatars RUN     from other models

Writes docs/pictures/*.svg and *.png.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cmtool.config.load import resolve  # noqa: E402
from cmtool.config.schema import ProcessConfig  # noqa: E402
from cmtool.diffusion.grid import karras_grid  # noqa: E402
from cmtool.diffusion.parameterization import build_parameterization  # noqa: E402
from cmtool.schedules.curriculum import curriculum_at  # noqa: E402

PICTURES = HERE / "pictures"
BLUE, ORANGE, GRAY = "#2b78c5", "#d9731a", "#8a939b"


def _figure(width: float = 6.4, height: float = 3.0) -> tuple[Figure, object]:
    matplotlib.rcParams.update({"svg.hashsalt": "cmtool", "font.size": 9, "svg.fonttype": "path"})
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Figure, name: str) -> None:
    figure.savefig(PICTURES / name, format="svg", metadata={"Date": None})
    print(PICTURES / name)


def denoise(x: np.ndarray, t: float) -> np.ndarray:
    """E[x0 | x] for data at -1 and 1 with equal weight: tanh(x / t^2)."""
    return np.tanh(x / t**2)


def paths() -> None:
    """Paths of the ODE for data at two points, by Heun's method on a fine grid."""
    levels = np.array(karras_grid(400, 0.002, 3.0))[::-1]
    starts = np.linspace(-6, 6, 25)
    x, lines = starts.copy(), [starts.copy()]
    for t, r in itertools.pairwise(levels):
        slope = (x - denoise(x, t)) / t
        ahead = x + (r - t) * slope
        x = x + (r - t) / 2 * (slope + (ahead - denoise(ahead, r)) / r)
        lines.append(x.copy())
    curves = np.stack(lines)
    figure, axes = _figure()
    for column in range(curves.shape[1]):
        axes.plot(levels, curves[:, column], color=BLUE if curves[-1, column] > 0 else ORANGE, lw=0.9)
    for column, at in ((4, 60), (19, 150)):
        start = (levels[at], curves[at, column])
        axes.annotate("", (0.0, curves[-1, column]), start, arrowprops={"arrowstyle": "->", "color": "0.15", "lw": 1.4})
        axes.plot(*start, "o", color="0.15", ms=4)
        axes.annotate("$(x, t)$", start, xytext=(6, 6), textcoords="offset points")
    axes.annotate("$f(x, t)$", (0.0, 1.0), xytext=(10, -13), textcoords="offset points")
    axes.set(xlabel="noise level $t$", ylabel="$x$", xlim=(-0.02, 3.0), ylim=(-6, 6))
    _write(figure, "paths.svg")


def scalings() -> None:
    """c_skip and c_out over the noise level."""
    t = torch.logspace(-2.7, 1.9, 300, dtype=torch.float64)
    c = build_parameterization(ProcessConfig()).coefficients(t)
    figure, axes = _figure(height=2.4)
    axes.semilogx(t, c.c_skip, color=BLUE, label="$c_{skip}$: how much of $x$ is kept")
    axes.semilogx(t, c.c_out, color=ORANGE, label="$c_{out}$: how much the network adds")
    axes.axvline(0.002, color=GRAY, ls=":", lw=1)
    axes.set(xlabel="noise level $t$")
    axes.legend(frameon=False)
    _write(figure, "scalings.svg")


def grids() -> None:
    """The number of grid points over a run, for three recipes."""
    figure, axes = _figure(height=2.4)
    for preset, name, color in (("cifar10", "ct", ORANGE), ("cifar10", "ict", BLUE), ("digits", "ict-pm", GRAY)):
        config = resolve(preset, recipe=name).config
        recipe, steps = config.recipe, config.train.steps
        at = range(0, steps, max(1, steps // 500))
        points = [curriculum_at(recipe.curriculum, recipe.target, recipe.gap, k, steps).num_scales for k in at]
        axes.step([k / steps for k in at], points, color=color, label=f"{name} ({preset})")
    axes.set(xlabel="share of the run", ylabel="grid points $N$", yscale="log")
    axes.legend(frameon=False)
    _write(figure, "grids.svg")


def from_models(digits: str, avatars: str) -> None:
    """Samples and an edit, by the Python interface."""
    import cmtool

    model = cmtool.load(digits, "cpu")
    cmtool.save(model.sample(64), PICTURES / "digits-one-step.png")
    one, two = model.sample(8, seed=1), model.sample(8, seed=1, steps=2)
    from cmtool.data import save_grid

    save_grid(torch.cat([one, two]), PICTURES / "digits-steps.png", columns=8)
    editor = cmtool.load(avatars, "cpu")
    from cmtool.data import to_nhwc

    cmtool.save(editor.sample(64), PICTURES / "avatars-one-step.png")
    rows = []
    for seed, hole in ((7, (slice(3, 13), slice(3, 13))), (3, (slice(None), slice(8, None)))):
        picture = to_nhwc(editor.sample(1, seed=seed, steps=2))[0]
        mask = np.zeros(picture.shape[:2], dtype=bool)
        mask[hole] = True
        filled = cmtool.edit.inpaint(editor, picture, mask, num=6)
        rows.append(np.concatenate([picture[None], np.where(mask[..., None], np.uint8(128), picture)[None], filled]))
    save_grid(np.concatenate(rows), PICTURES / "edit-strip.png", columns=8)
    for name in ("digits-one-step", "digits-steps", "avatars-one-step", "edit-strip"):
        print(PICTURES / f"{name}.png")


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", default="demo/digits", help="a consistency model of the preset digits")
    parser.add_argument("--avatars", default="demo/avatars", help="a consistency model of any color images")
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    paths()
    scalings()
    grids()
    from_models(given.digits, given.avatars)


if __name__ == "__main__":
    main()
