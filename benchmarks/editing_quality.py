"""Do edits of held-out pictures deserve trust? Figures for inpainting, colorization and super-resolution.

    python benchmarks/editing_quality.py --model runs/digits-ict-pm [--data digits] [--images 100] [--variations 32]
        [--times paper | 80,1,0.5] [--steps 20] [--guidance 0,1.2] [--json]

For every task and every held-out picture (never trained on: `--set data.kind=train` for digits, the disjoint index
range of shapes) it makes variations, and prints over the unknown part: the squared error of their mean and of one of
them, that of the trivial answer (mean of the known pixels, gray, nearest neighbor), the share of pixels whose truth
lies inside the 5 % to 95 % interval of the variations (bytes, so half a level of slack), the share among pixels that
are not certain (interval wider than 8 levels), and the precision of the edits by the features of `digits_quality.py`
next to that of the model's own samples.

Measured on 50 held-out digits (trained with `cmtool train-ct --preset digits --set data.kind=train`, 3,000 steps), 32
variations, 20 evaluations; own precision .785 in one and .82 in two evaluations:

    task           g    mean   one    trivial  covered  precision
    inpaint        0    .253   .520   1.078    .87      .80
    inpaint        .8   .212   .437   1.078    .89      .82
    inpaint-half   0    .185   .381    .640    .92      .79
    inpaint-half   .8   .179   .355    .640    .91      .82
    superres2      0    .067   .125    .181    .85      .85     (last level .1)
    superres2      .4   .060   .113    .181    .86      .89

so over-relaxation lowers the error on every task; the paper's 39 levels gave .340 (inpaint) and .084 (superres2) on 40
digits where 20 tuned ones gave .231 and .064.

On 16 held-out shapes (12 for superres4), 20 (12) variations, the class inferred, with a distilled model of 2,000 steps
whose own samples have precision .545 in one and .745 in two evaluations:

    inpaint        .8   .143   .293    .657    .88      .61
    colorize       .6   .076   .161    .100    .93      .59
    superres4      .4   .003   .005    .058    .94      .98

Inpainted shapes sometimes change color at the rim of the hole: precision is .82 of that of two-step samples there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_quality import score
from torch import Tensor

from cmtool.checkpoint import resolve_file
from cmtool.cli.output import Output
from cmtool.data.images import from_uint8
from cmtool.data.shapes import HELD_OUT, shapes_images
from cmtool.models import Model, load
from cmtool.rng import SampleStreams, derive
from cmtool.samplers import editing
from cmtool.samplers.edit_plan import TUNED, plan_edit
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling

LEVEL = 2 / 255
# Intervals narrower than this many levels are of pixels that the model takes for certain, such as a black rim.
CERTAIN_LEVELS = 8
TRIALS = 2


def held_out(data: str, count: int) -> Tensor:
    """Return held-out pictures (count, C, H, W) in [-1, 1]."""
    if data == "shapes":
        return from_uint8(torch.from_numpy(shapes_images(HELD_OUT, count, 16)[0]))
    from cmtool.config.schema import DataConfig
    from cmtool.data.load import load_dataset

    dataset = load_dataset(DataConfig(source="digits", resolution=8, channels=1, kind="heldout"))
    return dataset.batch(torch.arange(min(count, len(dataset))))[0]


def task_parts(task: str, truth: Tensor) -> tuple[editing.Operator, Tensor, Tensor, Tensor]:
    """Return (operator, measurement, trivial answer, where the answer is unknown) of a task."""
    side = truth.shape[-1]
    if task.startswith("inpaint"):
        mask = torch.zeros(1, 1, side, side)
        if task == "inpaint-half":
            mask[..., side // 2 :] = 1
        else:
            mask[..., side // 4 : -(side // 4), side // 4 : -(side // 4)] = 1
        known = 1 - mask
        fill = (truth * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
        return editing.known_pixels(mask), truth * known, truth * known + fill * mask, mask.expand_as(truth) > 0
    everywhere = torch.ones_like(truth, dtype=torch.bool)
    if task == "colorize":
        gray = editing.luma_image(truth)
        return editing.known_luma(), gray, gray, everywhere
    factor = 2 if task.endswith("2") else 4
    flat = editing.repeat_patches(editing.patch_means(truth, factor), factor)
    return editing.known_patch_means(factor), flat, flat, everywhere


def legal(task: str, x: Tensor, y: Tensor) -> Tensor:
    """Bring an edit into [-1, 1] as `cmtool edit` does."""
    if task == "colorize":
        return editing.into_range(x, y, editing.by_pixel)
    if task.startswith("superres"):
        return editing.into_range(x, y, editing.by_patch(2 if task.endswith("2") else 4))
    return x.clamp(-1, 1)


def variations(
    model: Model, task: str, truth: Tensor, count: int, times: Sequence[float], guidance: float
) -> tuple[Tensor, Tensor]:
    """Return `count` edits of every picture, (count, B, C, H, W), and the labels used (B,) or empty."""
    operator, y, _, _ = task_parts(task, truth)
    labels = None
    if model.num_classes is not None:
        misfits = sum(
            editing.class_misfits(
                model, operator, y, _seeds(len(y), -1 - trial), times, model.num_classes, guidance=guidance
            )
            for trial in range(TRIALS)
        )
        labels = torch.as_tensor(misfits).argmin(dim=1)
    made = []
    for index in range(count):
        streams = SampleStreams(_seeds(len(y), index))
        made.append(legal(task, editing.edit(model, operator, y, streams, times, labels, guidance=guidance).image, y))
    return torch.stack(made), torch.empty(0) if labels is None else labels


def _seeds(images: int, variation: int) -> list[int]:
    return [derive(variation, "editing", image) for image in range(images)]


def measure(
    model: Model, task: str, truth: Tensor, count: int, times: Sequence[float], guidance: float, data: str
) -> dict[str, Any]:
    """Return one row of the table."""
    began = time.perf_counter()
    made, _ = variations(model, task, truth, count, times, guidance)
    seconds = time.perf_counter() - began
    _, _, trivial, unknown = task_parts(task, truth)
    low, high = (torch.quantile(made, share, dim=0) for share in (0.05, 0.95))
    covered = (truth >= low - LEVEL / 2) & (truth <= high + LEVEL / 2)
    unsure = unknown & (high - low > CERTAIN_LEVELS * LEVEL)

    def error(x: Tensor) -> float:
        return float((x - truth)[unknown].square().mean())

    return {
        "task": task,
        "nfe": len(times),
        "guidance": guidance,
        "mse mean": error(made.mean(0)),
        "mse one": float(np.mean([error(one) for one in made[:8]])),
        "mse trivial": error(trivial),
        "cover": float(covered[unknown].double().mean()),
        "cover unsure": float(covered[unsure].double().mean()) if unsure.any() else None,
        "precision": score(made[: max(1, 400 // len(truth))].flatten(0, 1), data)["precision"],
        "seconds": round(seconds, 1),
    }


def own_precision(model: Model, data: str, steps: int) -> float:
    """Precision of the model's own samples in `steps` evaluations."""
    plan = plan_sampling(model.header, steps=steps)
    return float(score(torch.cat([batch.x0 for batch in generate(model, plan, range(600))]), data)["precision"])


def main() -> None:
    """Print the table of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", choices=("digits", "shapes"), default="digits")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--variations", type=int, default=32)
    parser.add_argument(
        "--tasks", default=None, help="comma-separated: inpaint, inpaint-half, superres2, superres4, colorize"
    )
    parser.add_argument("--times", default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", default=None, help="comma-separated; default: the tuned one")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    output = Output(given.json)
    model = load(resolve_file(Path(given.model)))
    truth = held_out(given.data, given.images)
    usual = "inpaint,inpaint-half,superres2" + (",superres4,colorize" if given.data == "shapes" else "")
    rows = []
    for task in (given.tasks or usual).split(","):
        kind = task.rstrip("24").removesuffix("-half")
        times: Any = given.times
        times = [float(t) for t in times.split(",")] if times and times != "paper" else times
        plan = plan_edit(model.header, kind, steps=given.steps, times=times)
        strengths = [float(g) for g in given.guidance.split(",")] if given.guidance else [TUNED[kind].guidance]
        for guidance in strengths:
            rows.append(measure(model, task, truth, given.variations, plan.times, guidance, given.data))
            output.say(f"{rows[-1]}")
    own = {f"precision of own samples, nfe {steps}": own_precision(model, given.data, steps) for steps in (1, 2)}
    output.table(f"{given.model}: {len(truth)} held-out pictures", list(rows[0]), [list(row.values()) for row in rows])
    output.say(str(own))
    output.json({"model": given.model, "rows": rows, "own": own})


if __name__ == "__main__":
    main()
