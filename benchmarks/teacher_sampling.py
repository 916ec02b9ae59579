"""Sampling of a teacher by Heun's method, 18 steps and 35 evaluations per image, ours against peers' networks.

All start from the same noise with the same weights and follow the same levels; the images must agree before they are
timed. The peers' networks run in a plain loop of Karras et al. 2022, Algorithm 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.matched import Peer, enliven, matched_config, peers_of, pictures
from benchmarks.pairs import Comparison, Contestant, compare, parser, publish
from benchmarks.peer_steps import preconditioned
from cmtool.models import apply_precision
from cmtool.rng import SampleStreams
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling
from cmtool.training.setup import fresh_student

TOLERANCE = 1e-3


def heun(raw: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: list[float]) -> Tensor:
    """Solve the probability-flow ODE from levels[0] down to 0, where a last denoising ends it."""

    def slope(x: Tensor, t: float) -> Tensor:
        clean = preconditioned(raw, x, torch.full((len(x),), t, device=x.device), 0.0)
        return (x - clean.clamp(-1, 1)) / t

    for t, r in pairwise([*levels, 0.0]):
        first = slope(x, t)
        ahead = x + (r - t) * first
        x = ahead if r == 0 else x + (r - t) * (first + slope(ahead, r)) / 2
    return x


def contest(asked: argparse.Namespace) -> Comparison:
    """Compare the sampling of one batch."""
    data = pictures(asked, 16)
    config = matched_config(asked, "edm")
    source = fresh_student(config, data).requires_grad_(False).eval().to(asked.device)
    enliven(source.network)
    found, absent = peers_of(source, asked)
    plan = plan_sampling(source.header, sampler="heun", steps=asked.steps)
    seeds, entries, answers = range(asked.batch), [], []
    for precision in ("fp32", "bf16"):
        model = fresh_student(config, data).requires_grad_(False).eval().to(asked.device)
        model.load_state_dict(source.state_dict())
        model = apply_precision(model.to(memory_format=torch.channels_last), precision)

        def own(model: torch.nn.Module = model) -> Tensor:
            return torch.cat([made.x0 for made in generate(model, plan, seeds, batch_size=asked.batch)])

        entries.append(Contestant(f"cmtool {precision}", True, own))
        answers.append(own())
    noise = SampleStreams(seeds, asked.device).normal(source.image_shape)
    for peer in found:
        run = theirs(peer, plan.times[0] * noise, list(plan.times))
        off = float((run() - answers[0]).abs().max())
        assert off < TOLERANCE, f"{peer.name} makes other images: {off:.1e}"
        entries.append(Contestant(peer.name, False, run, peer.note))
    title = f"a teacher's {asked.steps} Heun steps ({plan.nfe} evaluations), {asked.batch} images of {asked.side} px"
    return compare(title, entries, asked.rounds, asked.clock, absent)


def theirs(peer: Peer, x: Tensor, levels: list[float]) -> Callable[[], Tensor]:
    """Return a peer's sampling from x (B, C, H, W)."""
    peer.network.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return heun(peer.raw, x, levels)

    return run


def main(arguments: list[str] | None = None) -> None:
    """Measure and publish."""
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=18)
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    publish("teacher", [contest(asked)], asked)


if __name__ == "__main__":
    main()
