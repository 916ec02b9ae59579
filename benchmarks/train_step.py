"""One training step, ours against peers with the same weights, batch and work.

A step of consistency training (ct): images, noise, two noise levels, target without gradients, student, l2 loss,
backward, RAdam, the target's and the sampling average. In improved training (ict) the target is the network itself and
has no average. A step of distillation (cd) adds two evaluations of a teacher (Heun). OpenAI's network runs in its own
losses, trainer and averages, diffusers' in a plain loop with torch's RAdam and its EMAModel.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.matched import enliven, matched_config, peers_of, pictures
from benchmarks.pairs import Comparison, Contestant, compare, parser, publish
from benchmarks.peer_steps import POINTS, TARGET_DECAY, peer_step
from cmtool.checkpoint import save_model
from cmtool.data.dataset import Dataset
from cmtool.models import Model
from cmtool.training.loop import Trainer
from cmtool.training.setup import fresh_student, prepare, start_from

PASSES = {
    "pair": "convolutions in bf16, the target's as differences: what `auto` takes",
    "backward": "gradients in bf16",
    "all": "all passes in bf16: less exact, not the default",
}


def own_trainer(
    asked: argparse.Namespace,
    data: Dataset,
    recipe: str,
    source: Model,
    teacher: Path | None,
    precision: str,
    *sets: str,
) -> Trainer:
    """A trainer of ours that starts from the weights of `source`."""
    sets = ("recipe.curriculum.scales=fixed", f"recipe.curriculum.s1={POINTS}", *sets)
    sets += (f"recipe.target.ema={0 if recipe == 'ict' else TARGET_DECAY}",)
    sets += ("recipe.target.adaptive=false", "train.ema={kind='exponential', decay=0.9999}", "recipe.distance.kind=l2")
    flags = {"train.precision": precision, "teacher": None if teacher is None else str(teacher)}
    config = matched_config(asked, "ct" if recipe == "ict" else recipe, *sets, **flags)
    trainer = prepare(config, data, torch.device(asked.device))
    for model in (trainer.state.student, trainer.state.target, trainer.state.ema):
        start_from(model, source)
    return trainer


def contest(asked: argparse.Namespace, recipe: str, scratch: Path) -> Comparison:
    """Compare the steps of one recipe."""
    data = pictures(asked)
    source = fresh_student(matched_config(asked, "ct"), data)
    enliven(source.network)
    teacher = None
    if recipe == "cd":
        denoiser = fresh_student(matched_config(asked, "edm"), data)
        denoiser.network.load_state_dict(source.network.state_dict())
        teacher = scratch / "teacher.safetensors"
        save_model(teacher, denoiser.network.state_dict(), denoiser.header)
    found, absent = peers_of(source.to(asked.device), asked)
    fp32 = own_trainer(asked, data, recipe, source, teacher, "fp32")
    entries = [Contestant("cmtool fp32", True, fp32.step)]
    for passes in asked.passes.split(",") if asked.passes != "none" else ():
        trainer = own_trainer(asked, data, recipe, source, teacher, "bf16", f"train.half_passes={passes}")
        entries.append(Contestant(f"cmtool bf16 {passes}", True, trainer.step, PASSES[passes]))
    if asked.compile:
        compiled = own_trainer(asked, data, recipe, source, teacher, "fp32", "train.compile=true")
        entries.append(Contestant("cmtool fp32 compiled", True, compiled.step, compiled.notes[-1]))
    for peer in found:
        entries.append(Contestant(peer.name, False, peer_step(peer, data, asked, recipe), peer.note))
        if asked.peers_in_half:
            alike = peer_step(peer, data, asked, recipe, torch.bfloat16)
            entries.append(Contestant(f"{peer.name}, bf16 autocast", False, alike, "rounds both passes by themselves"))
    parameters = sum(p.numel() for p in source.parameters())
    title = f"{recipe} training step: {parameters / 1e6:.1f} M parameters, {asked.side} px, batch {asked.batch}"
    return compare(title, entries, asked.rounds, asked.clock, absent)


def main(arguments: list[str] | None = None) -> None:
    """Measure and publish."""
    made = parser(__doc__)
    made.add_argument("--recipes", default="ct,ict,cd")
    made.add_argument("--peers-in-half", action="store_true", help="peers under torch.autocast (bfloat16) as well")
    made.add_argument("--passes", default=",".join(PASSES), help="what our bfloat16 rounds, of these; none")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = [contest(asked, recipe, Path(folder)) for recipe in asked.recipes.split(",")]
    publish("train-step", results, asked)


if __name__ == "__main__":
    main()
