"""A training step of a preset's network on one GPU: formats, torch.compile and batches against the card's own rates.

    python -m benchmarks card [--preset imagenet64] [--recipe ct] [--batches 32,64,128] [--formats fp32,pair,replayed]

Images are random bytes, the distance is l2 (LPIPS would need its weights). Operations are those that torch counts in a
forward pass, times the passes of a step; the card's rate is that of a large matrix product in bfloat16, measured first.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.pairs import timed
from benchmarks.scale import evaluations, size_of
from cmtool.config.load import resolve
from cmtool.config.schema import RunConfig
from cmtool.machine.recorded import WARM_UP
from cmtool.samplers.generate import out_of_memory
from cmtool.training.bench import stand_in_data
from cmtool.training.loop import Trainer
from cmtool.training.precision import settle_precision
from cmtool.training.setup import prepare

# What each name sets. "tf32", which is not an option, lets float32 convolutions round their operands to ten bits.
FORMATS: dict[str, dict[str, object]] = {
    "fp32": {"train.precision": "fp32"},
    "tf32": {"train.precision": "fp32"},
    "pair": {"train.precision": "bf16", "train.half_passes": "pair"},
    "fused": {"train.precision": "bf16", "train.half_passes": "pair", "train.fused_norm": True},
    "step": {"train.precision": "bf16", "train.half_passes": "pair", "train.pairs_in_step": True},
    "replayed": {"train.precision": "bf16", "train.half_passes": "pair", "train.cuda_graphs": True},
    "backward": {"train.precision": "bf16", "train.half_passes": "backward"},
    "all": {"train.precision": "bf16", "train.half_passes": "all"},
    "compiled": {"train.precision": "bf16", "train.half_passes": "all", "train.compile": True},
}
# These change the networks themselves, so that those of other formats do not serve.
OWN_NETWORKS = ("compiled", "fused", "step")


@dataclass(frozen=True)
class Row:
    """One format and batch: milliseconds a step, images and 10^12 operations a second, peak memory in GB."""

    format: str
    batch: int
    ms: float
    images_per_s: float
    tflops: float
    share: float
    gb: float


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of one piece of work, after an uncounted one; waits for the GPU each time."""
    return statistics.median([timed(work, "wall") for _ in range(rounds + 1)][1:])


def card_rates(side: int = 8192) -> dict[str, float]:
    """TFLOP/s of a square matrix product in each format, and GB/s of a copy (bytes read and written)."""
    a, b = torch.randn(2, side, side, device="cuda").unbind()
    half = (a.bfloat16(), b.bfloat16())
    found = {"bf16": 2 * side**3 / seconds_of(lambda: half[0] @ half[1], 10) / 1e12}
    for name, allowed in (("tf32", True), ("fp32", False)):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        found[name] = 2 * side**3 / seconds_of(lambda: a @ b, 5) / 1e12
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * 4 * 2**30 / seconds_of(lambda: target.copy_(source), 5) / 1e9
    return found


def again(trainer: Trainer, config: RunConfig) -> Trainer:
    """The same networks, computed as another configuration says."""
    plan, state = settle_precision(config, trainer.device), trainer.state
    for model in {state.student, state.target, state.ema}:
        plan.apply(model)
    return Trainer(config, state, trainer.objective, trainer.dataset)


def sweep(asked: argparse.Namespace, config: Callable[..., RunConfig], peak: float) -> Iterator[Row]:
    """Yield a row for every format and batch that fits; networks are built anew where the format changes them."""
    trainer, work = None, evaluations(config())[0] * size_of(config()).forward
    data = stand_in_data(config(), 512)
    for name in asked.formats.split(","):
        for batch in map(int, asked.batches.split(",")):
            settings = config(batch=batch, **FORMATS[name])
            if trainer is None or name in OWN_NETWORKS:
                trainer = None
                gc.collect()
                trainer = prepare(settings, data, torch.device("cuda"))
                for note in trainer.notes:
                    print(f"# {name}: {note}", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                own = trainer if name in OWN_NETWORKS else again(trainer, settings)
                torch.backends.cudnn.allow_tf32 = name == "tf32" or settle_precision(settings, own.device).tf32
                for _ in range(1 if own.replay is None else WARM_UP + 2):
                    own.step()
                seconds = seconds_of(own.step, asked.rounds)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                break
            finally:
                trainer = None if name in OWN_NETWORKS else trainer
            rate = work * batch / seconds / 1e12
            memory = torch.cuda.max_memory_allocated() / 1e9
            yield Row(name, batch, 1e3 * seconds, batch / seconds, rate, rate / peak, memory)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a Markdown table; write JSON too if `--out` is given."""
    made = argparse.ArgumentParser(prog="python -m benchmarks card", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--preset", default="imagenet64")
    made.add_argument("--recipe", default="ct")
    made.add_argument("--batches", default="32,64,128")
    made.add_argument("--formats", default=",".join(FORMATS))
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--set", action="append", default=["recipe.distance.kind=l2"], dest="sets")
    made.add_argument("--teacher")
    made.add_argument("--out", type=Path, help="file for JSON")
    asked = made.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device.")

    def config(batch: int = 1, **flags: object) -> RunConfig:
        given = {"train.batch_size": batch, "train.log_every": 10**6, "train.cuda_graphs": False, **flags}
        given["teacher"] = asked.teacher
        return resolve(asked.preset, recipe=asked.recipe, sets=tuple(asked.sets), flags=given).config

    rates = card_rates()
    figures = ", ".join(f"{name} {value:.0f}" for name, value in rates.items())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {figures}\n")
    print("| format | batch | ms a step | images/s | TFLOP/s | share of the card's | peak GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for row in sweep(asked, config, rates["bf16"]):
        rows.append(row)
        cells = f"{row.ms:.0f} | {row.images_per_s:.0f} | {row.tflops:.0f} | {100 * row.share:.0f} % | {row.gb:.1f}"
        print(f"| {row.format} | {row.batch} | {cells} |", flush=True)
    if asked.out:
        document = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "rates": rates}
        asked.out.write_text(json.dumps({**document, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
