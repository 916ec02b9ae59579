"""One- and two-step sampling end to end, to an .npz file and to a folder of PNGs, ours against diffusers' pipeline.

It times everything from seeds to files: noise, network, bytes, writing. Loading programs and weights is not counted on
either side.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.matched import Peer, enliven, matched_config, peers_of, pictures
from benchmarks.pairs import Comparison, Contestant, compare, parser, publish
from cmtool.data.images import to_uint8
from cmtool.data.sample_files import FolderSink, NpzSink, in_background
from cmtool.models import Model, apply_precision
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling
from cmtool.training.setup import fresh_student

# Indices 0 and 22 of 40 grid points, as published for two steps.
TIMESTEPS = {1: None, 2: [22, 0]}


def own(model: Model, steps: int, form: str, count: int, batch: int, folder: Path) -> Callable[[], None]:
    """Sample and write with our own sinks, writing while computing as the command does."""
    plan, seeds = plan_sampling(model.header, steps=steps), list(range(count))

    def run() -> None:
        place = folder / ("ours.npz" if form == "npz" else "ours")
        _remove(place)
        sink: Any = NpzSink(place, {"seeds": count}, {}) if form == "npz" else FolderSink(place, {}, {}, seeds)
        with in_background(sink) as writer:
            for made in generate(model, plan, seeds, batch_size=batch):
                writer.append(to_uint8(made.x0.float()).permute(0, 2, 3, 1).cpu().numpy(), None)
        sink.finish()

    return run


def pipeline(
    peer: Peer, steps: int, form: str, count: int, batch: int, folder: Path, device: str
) -> Callable[[], None]:
    """Sample and write with ConsistencyModelPipeline, numpy and Pillow."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    pipe = ConsistencyModelPipeline(unet=peer.network.eval(), scheduler=CMStochasticIterativeScheduler()).to(device)
    pipe.set_progress_bar_config(disable=True)

    def images(start: int, output_type: str) -> Any:
        made = [torch.Generator().manual_seed(seed) for seed in range(start, min(start + batch, count))]
        given: dict[str, Any] = {"num_inference_steps": 1} if steps == 1 else {"timesteps": TIMESTEPS[steps]}
        given |= {"num_inference_steps": None} if steps > 1 else {}
        return pipe(batch_size=len(made), generator=made, output_type=output_type, **given).images

    def run() -> None:
        place = folder / ("theirs.npz" if form == "npz" else "theirs")
        _remove(place)
        if form == "npz":
            parts = [images(start, "np") for start in range(0, count, batch)]
            np.savez(place, arr_0=(np.concatenate(parts) * 255).round().astype(np.uint8))
            return
        place.mkdir()
        for start in range(0, count, batch):
            for row, image in enumerate(images(start, "pil")):
                image.save(place / f"{start + row:06d}.png")

    return run


def _remove(place: Path) -> None:
    for path in place.parent.glob(f"*{place.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def contest(asked: argparse.Namespace, steps: int, form: str, folder: Path) -> Comparison:
    """Compare one number of steps and one form of output."""
    data = pictures(asked, 16)
    source = fresh_student(matched_config(asked, "ct"), data).requires_grad_(False).eval().to(asked.device)
    enliven(source.network)
    found, absent = peers_of(source, asked)
    entries = []
    for precision in ("fp32", "bf16"):
        model = fresh_student(matched_config(asked, "ct"), data).requires_grad_(False).eval().to(asked.device)
        model.load_state_dict(source.state_dict())
        model = apply_precision(model.to(memory_format=torch.channels_last), precision)
        run = own(model, steps, form, asked.count, asked.batch, folder)
        entries.append(Contestant(f"cmtool {precision}", True, run))
    for peer in found:
        if peer.name.startswith("diffusers"):
            run = pipeline(peer, steps, form, asked.count, asked.batch, folder, asked.device)
            entries.append(Contestant("diffusers pipeline", False, run))
        else:
            absent[peer.name] = "its sampler writes no such files"
    title = f"{steps}-step sampling of {asked.count} images to {form}, {asked.side} px, batches of {asked.batch}"
    return compare(title, entries, asked.rounds, asked.clock, absent)


def main(arguments: list[str] | None = None) -> None:
    """Measure and publish."""
    made = parser(__doc__)
    made.add_argument("--count", type=int, default=32, help="images a round")
    made.add_argument("--steps", default="1,2")
    made.add_argument("--forms", default="npz,png")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    results = []
    with tempfile.TemporaryDirectory() as name:
        for steps in map(int, asked.steps.split(",")):
            for form in asked.forms.split(","):
                folder = Path(name) / f"{steps}-{form}"
                folder.mkdir()
                results.append(contest(asked, steps, form, folder))
    publish("sample", results, asked)


if __name__ == "__main__":
    main()
