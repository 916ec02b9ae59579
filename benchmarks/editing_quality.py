"""Can edits of held-out pictures be trusted? Figures for inpainting, colorization, enlarging and sharpening.

    python benchmarks/editing_quality.py --model runs/digits-ict-pm [--data digits] [--images 50] [--variations 32]
        [--first 50] [--seed 1] [--times paper | 80,1,0.5] [--steps 20] [--guidance 0,1.2] [--fresh 0.1]
        [--loops usual,4:0.1] [--candidates 4] [--lpips 64] [--conditioned RUN ...] [--json]

For every task and every held-out picture (never trained on: `--set data.kind=train` for digits, the disjoint index
range of shapes) it makes variations, and prints over the unknown part: the squared error of their mean and of one of
them, that of the trivial answer (mean of the known pixels, gray, nearest neighbor), the share of pixels whose truth
lies inside the 5 % to 95 % interval of the variations (bytes, so half a level of slack), the share among pixels that
are not certain (interval wider than 8 levels), and the precision of the edits by the features of `digits_quality.py`
next to that of the model's own samples; faces have no such features. A loop of `--loops` is a number of evaluations and
the share of new noise between them, `usual` what `cmtool edit` takes. `--lpips 64` adds LPIPS of pictures enlarged to
64 pixels, for which VGG16's weights must be there. `--conditioned` names models with `data.condition`: each is a row
in one and a row in two evaluations, beside the edits that are given the same (`--tasks colorize,superres4`). `kept` is
how far the condition of an answer is from the given one, in levels of bytes.

docs/howto/edit.md has the measured figures. On 64 held-out shapes (4 variations of each, the class given, levels
from 20 to .3) over-relaxation of 0, .8 and 2 gave inpainting errors of .415, .306 and .219 (one), .218, .148 and .104
(mean), and precision .63, .67 and .63 (+- .035). On levels from 5 to .6, .8 gave precision .79.
As the best of 1, 4 and, in half the evaluations, 8 candidates colorized shapes had precision .56, .71 and .70 (+- .04).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from conditioned import answers, condition_of_task, kept, refusal
from digits_quality import SIDES, measured
from numpy.typing import NDArray
from torch import Tensor

import cmtool
from cmtool.cli.output import Output
from cmtool.config.condition import Condition
from cmtool.config.parts import DistancePart
from cmtool.config.schema import DataConfig
from cmtool.data import split_indices
from cmtool.data.condition import derived
from cmtool.data.images import from_uint8
from cmtool.data.load import load_dataset
from cmtool.data.shapes import HELD_OUT, shapes_images
from cmtool.editing import loop as editing
from cmtool.editing.levels import plan_edit
from cmtool.editing.operators import BYTES, blur, reduction, trust
from cmtool.evaluation import domain
from cmtool.evaluation.manifold import manifold
from cmtool.losses.distance import Distance
from cmtool.losses.perceptual import backbone_path, build_lpips
from cmtool.models import Model
from cmtool.rng import SampleStreams, derive
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling

LEVEL = 2 / 255
# Intervals narrower than this many levels belong to pixels that the model is certain of, such as a black rim.
CERTAIN_LEVELS = 8
TRIALS = 2
NOISE = 0.3
# The blur's width in pixels, the noise of noisy measurements, and the share of pixels that a random mask takes.
BLUR, MEASUREMENT, ERASED = 1.5, 0.05, 0.8
USUAL = {
    "digits": "inpaint,inpaint-half,superres2,stroke,denoise",
    "shapes": "inpaint,inpaint-half,inpaint-random,colorize,superres2,superres4,superres4-bicubic,deblur,deblur-noisy,"
    "stroke,denoise",
    "avatars": "deblur,deblur-noisy,superres4-bicubic,inpaint-random",
}
SHAPES = {"digits": {"resolution": 8, "channels": 1}, "avatars": {"resolution": 16, "channels": 3}}


@dataclass(frozen=True)
class Case:
    """A task on pictures (B, C, H, W): what is known, what is given, the trivial answer, and where it is unknown."""

    operator: editing.Operator
    y: Tensor
    trivial: Tensor
    unknown: Tensor


class Judge:
    """Tells which pictures lie on the manifold of the real ones, by the features of `digits_quality.py`.

    Held-out digits are left out of the reference: otherwise an edit would be judged by the picture it was made from.
    """

    def __init__(self, data: str) -> None:
        self.judges = data in SIDES
        if not self.judges:
            return
        self._model, features = measured(data)
        held = split_indices(len(features))[1] if data == "digits" else []
        self._features = np.delete(features, held, axis=0)

    def inside(self, images: Tensor) -> NDArray[Any]:
        """Whether each image (B, C, H, W) counts as precise, (B,)."""
        return manifold(self._features, domain.extract(self._model, images.clamp(-1, 1))[0]).inside


def held_out(data: str, count: int, first: int = 0) -> Tensor:
    """Return held-out pictures (count, C, H, W) in [-1, 1], from number `first` on."""
    if data == "shapes":
        return from_uint8(torch.from_numpy(shapes_images(HELD_OUT + first, count, 16)[0]))
    dataset = load_dataset(DataConfig.model_validate({"source": data, "kind": "heldout", **SHAPES[data]}))
    return dataset.batch(torch.arange(first, min(first + count, len(dataset))))[0]


def make_case(task: str, truth: Tensor, seed: int) -> Case:
    """Measure the pictures as a task does."""
    everywhere = torch.ones_like(truth, dtype=torch.bool)
    if task.startswith("inpaint"):
        return _holed(truth, _mask(task, truth, seed))
    if task.startswith("deblur") or task.endswith("bicubic"):
        return _measured(task, truth, seed)
    if task == "colorize":
        gray = editing.luma_image(truth)
        return Case(editing.known_luma(), gray, gray, everywhere)
    if task == "denoise":
        noisy = truth + NOISE * SampleStreams(_seeds(len(truth), seed, 0, "noise")).normal(truth.shape[1:])
        return Case(editing.nothing_known(), noisy, noisy, everywhere)
    factor = _factor(task)
    flat = editing.repeat_patches(editing.patch_means(truth, factor), factor)
    operator = editing.nothing_known() if task == "stroke" else editing.known_patch_means(factor)
    return Case(operator, flat, flat, everywhere)


def _mask(task: str, truth: Tensor, seed: int) -> Tensor:
    side = truth.shape[-1]
    mask = torch.zeros(1, 1, side, side)
    if task == "inpaint-random":
        u = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(seed))
        return (u < ERASED).float()
    if task == "inpaint-half":
        mask[..., side // 2 :] = 1
    else:
        mask[..., side // 4 : -(side // 4), side // 4 : -(side // 4)] = 1
    return mask


def _measured(task: str, truth: Tensor, seed: int) -> Case:
    """Blur or reduce, add noise or round to bytes; trivial: the blurred one, or the least that explains."""
    side, everywhere = truth.shape[-1], torch.ones_like(truth, dtype=torch.bool)
    blurs = task.startswith("deblur")
    way = blur(side, side, BLUR, BLUR) if blurs else reduction(side, side, _factor(task.split("-")[0]), "bicubic")
    given = way.measure(truth.double()).float()
    noisy = task.endswith("noisy")
    if noisy:
        given = given + MEASUREMENT * SampleStreams(_seeds(len(truth), seed, 0, "noise")).normal(given.shape[1:])
    else:
        given = ((given + 1) * 127.5).round() / 127.5 - 1
    # As `cmtool edit` takes them: a reduction is exact, a blur is of bytes at best.
    noise = MEASUREMENT if noisy else BYTES if blurs else 0.0
    y = way.restore(given.double()).float()
    return Case(way.known(trust(noise)), y, given if blurs else y, everywhere)


def _holed(truth: Tensor, mask: Tensor) -> Case:
    known = 1 - mask
    fill = (truth * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    unknown = mask.expand_as(truth) > 0
    return Case(editing.known_pixels(mask), truth * known, truth * known + fill * mask, unknown)


def _factor(task: str) -> int:
    """Simulate strokes by flat patches of 4 pixels."""
    return 2 if task.endswith("2") else 4


def legal(task: str, x: Tensor, y: Tensor) -> Tensor:
    """Bring an edit into [-1, 1] as `cmtool edit` does."""
    if task == "colorize":
        return editing.into_range(x, y, editing.by_pixel)
    if task.startswith("superres") and not task.endswith("bicubic"):
        return editing.into_range(x, y, editing.by_patch(_factor(task)))
    return x.clamp(-1, 1)


def _seeds(images: int, seed: int, variation: int, what: str = "editing") -> list[int]:
    return [derive(seed, what, variation, image) for image in range(images)]


def class_misfits(
    model: Model,
    operator: editing.Operator,
    y: Tensor,
    seeds: Sequence[int],
    times: Sequence[float],
    classes: int,
    *,
    guidance: float = 0.0,
) -> Tensor:
    """How badly the edits for each class agree with what is known: (B, classes), the `misfit` of `edit`.

    Every class is tried with the same noise (one seed for each image), so that only the class differs.
    """
    tried = []
    for label in range(classes):
        streams = SampleStreams(seeds, y.device, y.dtype)
        labels = torch.full((len(y),), label, device=y.device)
        tried.append(editing.edit(model, operator, y, streams, times, labels, guidance=guidance).misfit)
    return torch.stack(tried, dim=1)


def likeliest(model: Model, case: Case, times: Sequence[float], guidance: float, seed: int) -> Tensor | None:
    """Return the class (B,) whose edits agree best with what is known, as `cmtool edit` finds it."""
    if model.num_classes is None:
        return None
    misfits = torch.zeros(len(case.y), model.num_classes)
    for trial in range(TRIALS):
        seeds = _seeds(len(case.y), seed, trial, "class")
        misfits = misfits + class_misfits(
            model, case.operator, case.y, seeds, times, model.num_classes, guidance=guidance
        )
    return misfits.argmin(dim=1)


def variations(
    model: Model,
    task: str,
    case: Case,
    count: int,
    times: Sequence[float],
    guidance: float,
    candidates: int,
    seed: int,
    search: Sequence[float],
    fresh: float = 1.0,
) -> Tensor:
    """Return `count` edits of every picture, (count, B, C, H, W), with the class that fits best at levels `search`."""
    if task == "denoise":
        return legal(task, editing.denoise(model, case.y, NOISE), case.y)[None]
    labels = likeliest(model, case, search, guidance, seed)
    made = []
    for index in range(count):
        seeds = _seeds(len(case.y), seed, index)
        edited = editing.edit_best(
            model, case.operator, case.y, seeds, times, labels, candidates=candidates, guidance=guidance, fresh=fresh
        )
        made.append(legal(task, edited.image, case.y))
    return torch.stack(made)


def measure(
    made: Tensor,
    truth: Tensor,
    case: Case,
    judge: Judge,
    lpips: Distance | None = None,
    condition: Condition | None = None,
) -> dict[str, float | None]:
    """Return the figures of edits (N, B, C, H, W) of `truth` (B, C, H, W), of which `condition` was known."""
    unknown = case.unknown
    low, high = (torch.quantile(made, share, dim=0) for share in (0.05, 0.95))
    covered = (truth >= low - LEVEL / 2) & (truth <= high + LEVEL / 2)
    unsure = unknown & (high - low > CERTAIN_LEVELS * LEVEL)

    def error(x: Tensor) -> float:
        return float((x - truth)[unknown].square().mean())

    several = len(made) > 1
    return {
        "mse mean": error(made.mean(0)) if several else None,
        "mse one": float(np.mean([error(one) for one in made])),
        "mse trivial": error(case.trivial),
        "psnr": float(np.mean([psnr(one, truth) for one in made])),
        "psnr trivial": psnr(case.trivial, truth),
        "kept": None if condition is None else kept(made, truth, condition),
        "cover": float(covered[unknown].double().mean()) if several else None,
        "cover unsure": float(covered[unsure].double().mean()) if several and unsure.any() else None,
        **_precision(made, judge),
        **({} if lpips is None else {"lpips": _apart(lpips, made[0], truth)}),
        **({} if lpips is None else {"lpips trivial": _apart(lpips, case.trivial, truth)}),
    }


def _precision(made: Tensor, judge: Judge) -> dict[str, float | None]:
    if not judge.judges:
        return {}
    inside = judge.inside(made.flatten(0, 1)).reshape(made.shape[:2]).mean(axis=0)
    # Variations of one picture are not independent, so pictures are counted, not variations.
    return {"precision": float(inside.mean()), "+-": float(inside.std(ddof=1) / made.shape[1] ** 0.5)}


def _apart(distance: Distance, images: Tensor, truth: Tensor) -> float:
    """Mean over pictures of a distance, a few at a time."""
    pairs = zip(images.clamp(-1, 1).split(16), truth.split(16), strict=True)
    with torch.no_grad():
        return float(torch.cat([distance.between(a, b) for a, b in pairs]).mean())


def psnr(x: Tensor, truth: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, of the whole pictures."""
    wrong = (x.clamp(-1, 1) - truth).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / wrong.clamp_min(1e-12))).mean())


def own_precision(model: Model, judge: Judge, steps: int, count: int = 1000) -> float:
    """Precision of the model's own samples in `steps` evaluations."""
    plan = plan_sampling(model.header, steps=steps)
    return float(judge.inside(torch.cat([batch.x0 for batch in generate(model, plan, range(count))])).mean())


def table(
    given: argparse.Namespace, model: Model, others: Sequence[Model], truth: Tensor, judge: Judge, output: Output
) -> list[dict[str, Any]]:
    """Return one row for every task, loop and over-relaxation, then those of conditioned models."""
    rows = []
    lpips = build_lpips(DistancePart(kind="lpips", resize=given.lpips)) if given.lpips else None
    tasks, loops = (given.tasks or USUAL[given.data]).split(","), (given.loops or "usual").split(",")
    for task, loop in itertools.product(tasks, loops):
        steps, share = (given.steps, given.fresh) if loop == "usual" else _loop(loop)
        kind = task.split("-")[0].rstrip("24")
        times: Any = given.times
        times = [float(t) for t in times.split(",")] if times and times != "paper" else times
        plan = plan_edit(model.header, kind, steps=None if times else steps, times=times, sigma=NOISE)
        candidates = given.candidates or plan.candidates
        case, search = make_case(task, truth, given.seed), plan.class_times
        for guidance in [float(g) for g in given.guidance.split(",")] if given.guidance else [plan.guidance]:
            began = time.process_time()
            fresh = share or plan.fresh
            made = variations(
                model, task, case, given.variations, plan.times, guidance, candidates, given.seed, search, fresh
            )
            figures = measure(made, truth, case, judge, lpips, condition_of_task(task, truth))
            head = {"task": task, "nfe": len(plan.times) * candidates, "fresh": fresh, "guidance": guidance}
            rows.append(_row(head, figures, began, output))
    for other, steps in itertools.product(others, (1, 2)):
        began = time.process_time()
        seeds = [_seeds(len(truth), given.seed, index) for index in range(given.variations)]
        made = answers(other, truth, steps, seeds)
        head = {"task": f"{other.header['data']['condition']}, conditioned", "nfe": steps, "fresh": None}
        figures = measure(made, truth, shown(other.condition, truth), judge, lpips, other.condition)
        rows.append(_row({**head, "guidance": None}, figures, began, output))
    return rows


def shown(condition: Condition, truth: Tensor) -> Case:
    """Return what a conditioned model is asked: every value is unknown, and its condition is the trivial answer."""
    seen = derived(truth, condition)
    return Case(editing.nothing_known(), seen, seen.expand_as(truth), torch.ones_like(truth, dtype=torch.bool))


def _row(head: dict[str, Any], figures: dict[str, Any], began: float, output: Output) -> dict[str, Any]:
    row = {**head, **figures, "seconds": round(time.process_time() - began, 1)}
    output.say("  ".join(f"{key} {_text(value)}" for key, value in row.items()))
    return row


def _loop(text: str) -> tuple[int, float]:
    steps, share = text.split(":")
    return int(steps), float(share)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Print the table of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", choices=tuple(USUAL), default="digits")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first held-out picture")
    parser.add_argument("--variations", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default=None, help=f"comma-separated; usual: {USUAL['shapes']}")
    parser.add_argument("--times", default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", default=None, help="comma-separated; default: the tuned one")
    parser.add_argument("--fresh", type=float, default=None, help="share of new noise; default: the tuned one")
    parser.add_argument("--loops", default=None, help="comma-separated, such as usual,4:1,4:0.1")
    parser.add_argument("--lpips", type=int, default=0, help="side that pictures are enlarged to for LPIPS; 0: none")
    parser.add_argument("--candidates", type=int, default=None, help="default: the tuned number")
    parser.add_argument("--conditioned", nargs="+", default=[], metavar="RUN", help="models with data.condition")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    output = Output(given.json)
    model, judge = cmtool.load(given.model, "cpu").module, Judge(given.data)
    truth = held_out(given.data, given.images, given.first)
    others = [cmtool.load(run, "cpu").module for run in given.conditioned]
    for run, other in zip(given.conditioned, others, strict=True):
        if reason := refusal(other, truth):
            parser.error(f"--conditioned {run} {reason}.")
    own = {}
    if judge.judges:
        own = {f"own samples, {steps} evaluations": own_precision(model, judge, steps) for steps in (1, 2)}
        own["the held-out pictures themselves"] = float(judge.inside(truth).mean())
        output.say(f"precision: {own}")
    if given.lpips:
        output.say(f"LPIPS of pictures enlarged to {given.lpips} pixels, with {backbone_path()}")
    rows = table(given, model, others, truth, judge, output)
    output.table(f"{given.model}: {len(truth)} held-out pictures", list(rows[0]), [list(row.values()) for row in rows])
    output.json({"model": given.model, "rows": rows, "precision": own})


if __name__ == "__main__":
    main()
