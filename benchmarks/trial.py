"""One training run of a small preset, counted in network evaluations and judged: the unit of the comparisons.

Used by `recipe_shootout.py` and `ablations.py`; not a command of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits_quality import score
from scipy.stats import t as student_t
from torch.utils.flop_counter import FlopCounterMode

from cmtool.checkpoint import read_header
from cmtool.config.load import resolve
from cmtool.config.methods import METHODS
from cmtool.config.schema import RunConfig
from cmtool.data.load import load_dataset
from cmtool.data.toy import HELD_OUT, toy2d_points
from cmtool.evaluation.manifold import manifold
from cmtool.models import Model, load
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import SamplePlan, plan_sampling
from cmtool.theory.distances import assignment_w1
from cmtool.training.inherit import adopt
from cmtool.training.loop import Trainer
from cmtool.training.setup import prepare

CPU = torch.device("cpu")
SAMPLES = 1797
# The distance for each data set: Frechet distance of a classifier's features, or transport of points.
MEASURES = {"digits": "FD", "shapes": "FD", "toy2d": "1000 W1"}


@dataclass(frozen=True)
class Trial:
    """A recipe with changes (`sets`), a seed, and the model it starts from, if any."""

    preset: str
    recipe: str
    seed: int
    sets: tuple[str, ...] = ()
    source: Path | None = None

    def config(self, steps: int) -> RunConfig:
        """Resolve the trial for this many steps."""
        flags: dict[str, Any] = {"train.steps": steps, "train.seed": self.seed}
        method = METHODS[resolve(self.preset, recipe=self.recipe).config.recipe.method]
        if self.source is not None:
            flags["teacher" if method.get("needs") == "teacher" else "init"] = str(self.source)
        config = resolve(self.preset, recipe=self.recipe, sets=self.sets, flags=flags).config
        return adopt(config, read_header(self.source)) if self.source is not None else config


def needs(preset: str, recipe: str) -> str:
    """Return what a recipe needs to start from: "nothing", "teacher", "init" or "consistency_init"."""
    return resolve(preset, recipe=recipe).config.recipe.needs


def flops_of(work: Any) -> int:
    """Floating-point operations of calling `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def evaluations_per_step(trial: Trial) -> float:
    """Cost of an optimizer step in forward passes of one image, by counted operations: backward and JVP included."""
    config = trial.config(1000)
    trainer: Trainer = prepare(config, load_dataset(config.data), CPU)
    trainer.step()
    step = flops_of(trainer.step)
    student = trainer.state.ema
    x, t = torch.zeros(1, *student.image_shape), torch.ones(1)
    with torch.no_grad():
        single = flops_of(lambda: student(x, t))
    return step / single


def train(trial: Trial, steps: int, out: Path) -> Path:
    """Train and write the sampling average to `out`, unless it is there."""
    if not out.is_file():
        config = trial.config(steps)
        trainer = prepare(config, load_dataset(config.data), CPU)
        while trainer.state.step < steps:
            trainer.step()
        trainer.state.export(out)
    return out


def plan_for(model: Model, nfe: int) -> SamplePlan:
    """Return the plan for this many evaluations: Algorithm 1, or a diffusion model's solver that needs no more."""
    if model.kind == "consistency":
        return plan_sampling(model.header, steps=nfe)
    own = (model.header.get("sample") or {}).get("sampler")
    return plan_sampling(model.header, sampler=own or "euler", steps=nfe)


def score_points(points: torch.Tensor) -> dict[str, float]:
    """Score points (n, 2, 1, 1) against as many that were held out: exact W1 in thousandths, precision, recall."""
    made = points.flatten(1).double().numpy()
    real = toy2d_points("gaussians8", HELD_OUT, len(made))[0].reshape(len(made), 2).astype(float)
    close = manifold(real, made)
    return {"distance": 1000 * assignment_w1(made, real), "precision": close.precision, "recall": close.recall}


def quality(path: Path, nfe: int, data: str, seed: int = 10_000) -> dict[str, float]:
    """Return distance (see `MEASURES`), precision and recall of 1,797 samples with this many evaluations each."""
    model = load(path)
    made = [batch.x0 for batch in generate(model, plan_for(model, nfe), range(seed, seed + SAMPLES), batch_size=256)]
    samples = torch.cat(made)
    if data == "toy2d":
        return score_points(samples)
    found = score(samples, data)
    return {"distance": float(found["fd"] or 0.0), **{key: float(found[key] or 0.0) for key in ("precision", "recall")}}


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Add `--set`: changes of the preset that apply to every run and its sources."""
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="e.g. network.channels=16"
    )


def file_name(*parts: object) -> str:
    """Join parts to a name without characters that mean something in a path."""
    return "-".join("".join(c if c.isalnum() or c == "." else "-" for c in str(part)) for part in parts)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines, so that a comparison that was cut off can continue."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as text."""
    middle = statistics.fmean(values)
    return f"{middle:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{middle:.1f}"


def verdict(better: Sequence[float], worse: Sequence[float]) -> str:
    """Say whether `better` is below `worse`, two lists of distances over the same seeds.

    Runs of one seed share teacher, first weights and draws, so that differences are taken seed by seed. "holds" and
    "does not hold" need zero outside the 95 % interval of their mean (Student's t).
    """
    gaps = [b - a for a, b in zip(better, worse, strict=True)]
    middle = statistics.fmean(gaps)
    if len(gaps) < 2:
        return f"difference {middle:+.1f} (one seed: nothing can be said)"
    reach = float(student_t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
    word = "holds" if middle > reach else "does not hold" if middle < -reach else "is open"
    return f"{word}: difference {middle:+.1f} ± {reach:.1f}"
