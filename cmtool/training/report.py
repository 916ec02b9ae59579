"""What a training run reports: the numbers since its last report, who listens to them, what looks like divergence."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from cmtool.config.schema import RunConfig
from cmtool.data.images import save_grid, save_scatter
from cmtool.machine.world import World
from cmtool.models import Model
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling
from cmtool.talk import Talk, Update
from cmtool.training.forecast import Forecast

# Edges of the noise-level bands that reports break the distance down by.
BANDS = (0.02, 0.1, 0.5, 2.0, 10.0)
# How many reports the watch remembers, and from how many on it judges.
_MEMORY, _ENOUGH = 20, 5


@dataclass(frozen=True)
class Report:
    """What happened over the steps since the last report; `step` counts finished steps."""

    step: int
    steps: int
    loss: float
    distance: float
    bands: dict[str, float]
    num_scales: int
    target_ema: float
    lr: float
    grad_norm: float
    images_per_s: float
    images_seen: int

    def row(self) -> dict[str, object]:
        """Return the row of `metrics.jsonl`: plain JSON, null where a number is not finite."""
        return {key: None if _odd(value) else value for key, value in self.__dict__.items()}


def _odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass
class Tally:
    """Numbers since the last report. They stay on their device, because reading one would wait for it."""

    losses: list[Tensor] = field(default_factory=list)
    distances: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    paused: float = field(default_factory=time.perf_counter)
    images: int = 0

    def add(self, weighted: Tensor, distance: Tensor, t: Tensor) -> None:
        """Keep the numbers (B,) of one pass."""
        self.losses.append(weighted)
        self.distances.append(distance)
        self.times.append(t)
        self.images += len(t)

    def mark(self) -> tuple[int, int]:
        """Return what `rewind` needs to forget every pass after this point."""
        return len(self.losses), self.images

    def rewind(self, mark: tuple[int, int]) -> None:
        """Forget the passes since `mark`: they are going to be repeated."""
        kept, self.images = mark
        for numbers in (self.losses, self.distances, self.times):
            del numbers[kept:]

    def gathered(self, world: World) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses, distances (float64) and times of all processes, on the CPU."""
        mine = [torch.cat(kept).cpu() for kept in (self.losses, self.distances, self.times)]
        mine[1] = mine[1].double()
        if world.size > 1:
            mine = [torch.cat(columns) for columns in zip(*world.gather(mine), strict=True)]
        return mine[0], mine[1], mine[2]

    def finite(self) -> bool:
        """Whether every loss and gradient norm so far is a finite number (reads them: waits for the device)."""
        kept = [tensor.reshape(-1).float() for tensor in (*self.losses, *self.norms)]
        return not kept or bool(torch.isfinite(torch.cat(kept)).all())


def band_means(distance: Tensor, t: Tensor) -> dict[str, float]:
    """Mean distance (B,) for each band of noise levels t (B,) that has images in it."""
    edges = torch.tensor(BANDS, dtype=t.dtype, device=t.device)
    band = torch.bucketize(t, edges)
    names = [f"<{BANDS[0]:g}", *(f"<{edge:g}" for edge in BANDS[1:]), f">={BANDS[-1]:g}"]
    return {name: float(distance[band == i].mean()) for i, name in enumerate(names) if bool((band == i).any())}


class Listener:
    """Receives what a session reports; subclasses override what they need."""

    def started(self, step: int, steps: int, needs: Forecast) -> None:
        """Training begins at `step` of `steps`."""

    def expects(self, sentence: str) -> None:
        """It is known how long the run will take; said once."""

    def report(self, report: Report) -> None:
        """Some steps are done."""

    def saved(self, path: Path) -> None:
        """A checkpoint, grid or model was written."""

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """The sampling average was judged."""

    def warn(self, message: str) -> None:
        """Something is wrong but the run continues."""


class Teller(Listener):
    """Tells a person what happens: notes next to the progress bar, what was saved, warnings."""

    def __init__(self, talk: Talk, update: Update) -> None:
        self._talk = talk
        self._update = update
        self._steps = 0

    def started(self, step: int, steps: int, needs: Forecast) -> None:
        """Say what the run needs, and where it resumes."""
        for line in needs.lines():
            self._talk.say(line)
        if step:
            self._talk.say(f"going on from step {step} of {steps}")
        self._steps = steps
        self._update(completed=step, note="starting")

    def report(self, report: Report) -> None:
        """Move the bar."""
        # Most important first: on a narrow line, what does not fit is dropped from the end.
        note = f"loss {report.loss:.4g}  {report.images_per_s:,.0f} images/s  N {report.num_scales}  lr {report.lr:.1e}"
        # The end of a run that follows a clock moves; the bar's does not.
        self._update(completed=report.step * self._steps / report.steps, note=note)

    def expects(self, sentence: str) -> None:
        """Say how long the run will take."""
        self._talk.say(sentence)

    def saved(self, path: Path) -> None:
        """Say where a sample grid went."""
        if path.suffix == ".png":
            self._talk.say(f"samples: {path}")

    def warn(self, message: str) -> None:
        """Pass a warning on."""
        self._talk.warn(message)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Say the figures in one line."""
        self._talk.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


@dataclass(frozen=True)
class Outcome:
    """How a session ended: the model if the run is finished, else why it stopped."""

    model: Path | None
    step: int
    signal: int = 0
    out_of_time: bool = False


class Watch:
    """Warns of signs of divergence that leave every number finite; it changes nothing.

    The loss is compared with the median of the last reports at the same N, since it moves with N by itself; the norm of
    the sampling average with the median of its last values; a quality figure (FID: smaller is better) with its best.
    """

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._best: dict[str, float] = {}
        self._warned: set[str] = set()

    def report(self, report: Report, average_norm: float) -> list[str]:
        """Return warnings about a report and the Euclidean norm of the sampling average's weights at its step."""
        here = f"step {report.step}"
        loss = self._jumps(f"loss at N = {report.num_scales}", report.loss, 10.0)
        norm = self._jumps("norm of the sampling average", average_norm, 3.0)
        return [
            f"{here}: the {what}. The run may be diverging; a smaller train.lr or train.grad_clip=1.0 helps."
            for what in (loss, norm)
            if what
        ]

    def figures(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Return warnings about an evaluation: a distance that rises, or samples that begin to be copies."""
        worse = self.quality(step, "fid", figures["fid"]) if "fid" in figures else []
        return worse + (self.copying(step, figures["copies"], figures["copies_std"]) if "copies" in figures else [])

    def copying(self, step: int, share: float, error: float) -> list[str]:
        """Return a warning, once, if more samples are near training images than held-out ones than chance explains."""
        if share <= 0.5 + 3 * error:
            self._warned.discard("copies")
            return []
        if "copies" in self._warned:
            return []
        self._warned.add("copies")
        return [
            f"step {step}: {share:.0%} of the samples lie nearer to a training image than to a held-out one, where "
            f"chance gives 50 ± {100 * error:.1f} %: the model begins to copy. More images, dropout or fewer steps "
            "help."
        ]

    def quality(self, step: int, name: str, value: float) -> list[str]:
        """Return a warning if a figure (smaller is better) has become much worse than its best."""
        best = self._best.setdefault(name, value)
        self._best[name] = min(best, value)
        if value <= 2.0 * best:
            self._warned.discard(name)
            return []
        if name in self._warned:
            return []
        self._warned.add(name)
        return [f"step {step}: {name} is {value:.4g} after {best:.4g} at its best. The run may be diverging."]

    def _jumps(self, name: str, value: float, factor: float) -> str | None:
        """Say so, once, when `value` leaves the `factor`-fold of the median of its last values.

        A loss with learned weights passes zero on its way down: there the largest of the last values sets the scale.
        """
        recent = self._recent.setdefault(name, deque(maxlen=_MEMORY))
        if len(recent) < _ENOUGH:
            recent.append(value)
            return None
        usual = median(recent)
        scale = usual if min(recent) > 0 else max(abs(number) for number in recent)
        recent.append(value)
        if value <= usual + (factor - 1) * scale:
            self._warned.discard(name)
            return None
        if name in self._warned:
            return None
        self._warned.add(name)
        return f"{name} is {value:.4g} where {usual:.4g} was usual"


# Pictures in a grid, points in a scatter plot.
GRID, CLOUD = 64, 2000


def preview(model: Model, count: int) -> Tensor:
    """Return `count` samples (count, C, H, W) on the CPU: in one step, or in 18 Heun steps for a teacher."""
    plan = plan_sampling(model.header)
    return torch.cat([batch.x0.float().cpu() for batch in generate(model, plan, range(count))])


def write_preview(model: Model, path: Path, config: RunConfig, step: int, points: bool) -> Tensor:
    """Write a grid of samples (for points a scatter plot) to `path`; return the samples (count, C, H, W)."""
    samples = preview(model, CLOUD if points else GRID)
    if points:
        save_scatter(samples, path)
    else:
        save_grid(samples, path, text={"preset": config.preset, "recipe": config.recipe_name, "step": step})
    return samples
