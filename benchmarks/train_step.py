"""One training step, ours against peers with the same weights, batch and work.

A step of consistency training (ct): images, noise, two noise levels, target without gradients, student, l2 loss,
backward, RAdam, the target's and the sampling average. In improved training (ict) the target is the network itself and
has no average. A step of distillation (cd) adds two evaluations of a teacher (Heun). The peers' networks run in a plain
loop written as their own training scripts are, with torch's RAdam and, for diffusers, its EMAModel.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.matched import Peer, enliven, matched_config, peers_of, pictures
from benchmarks.pairs import Comparison, Contestant, compare, parser, publish
from cmtool.checkpoint import save_model
from cmtool.data.dataset import Dataset
from cmtool.diffusion.grid import karras_grid
from cmtool.models import Model
from cmtool.training.loop import Trainer
from cmtool.training.setup import fresh_student, prepare, start_from

PASSES = {
    "pair": "convolutions in bf16, the target's as differences: what `auto` takes",
    "backward": "gradients in bf16",
    "all": "all passes in bf16: less exact, not the default",
}
SIGMA_DATA, SIGMA_MIN, POINTS, DECAY, TARGET_DECAY = 0.5, 0.002, 18, 0.9999, 0.95


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


def preconditioned(raw: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, boundary: float) -> Tensor:
    """c_skip x + c_out F(c_in x, 250 ln t): a consistency function for `boundary` = sigma_min, a denoiser for 0."""
    s, level = SIGMA_DATA, t[:, None, None, None]
    shifted, root = level - boundary, (level**2 + s**2).sqrt()
    c_skip, c_out = s**2 / (shifted**2 + s**2), shifted * s / root
    return c_skip * x + c_out * raw(x / root, 250 * (t + 1e-44).log())


def averages_of(peer: Peer, network: nn.Module, decays: tuple[float, ...]) -> Callable[[], None]:
    """Move averages of a network: diffusers by its EMAModel, others by a loop over parameters."""
    if peer.name.startswith("diffusers"):
        from diffusers.training_utils import EMAModel

        kept = [EMAModel(network.parameters(), decay=decay, use_ema_warmup=False) for decay in decays]
        return lambda: [average.step(network.parameters()) for average in kept] and None
    copies = [copy.deepcopy(network).requires_grad_(False) for _ in decays]

    def move() -> None:
        with torch.no_grad():
            for average, decay in zip(copies, decays, strict=True):
                for old, new in zip(average.parameters(), network.parameters(), strict=True):
                    old.mul_(decay).add_(new, alpha=1 - decay)

    return move


class PeerStep:
    """The same step around a peer's network."""

    def __init__(
        self, peer: Peer, data: Dataset, asked: argparse.Namespace, recipe: str, half: torch.dtype | None = None
    ) -> None:
        self.half = half
        self.raw, self.images, self.batch, self.distils = peer.raw, data.images, asked.batch, recipe == "cd"
        self.device = torch.device(asked.device)
        self.network = peer.network.train()
        own = recipe == "ict"
        self.target = self.network if own else copy.deepcopy(peer.network).requires_grad_(False)
        self.teacher = copy.deepcopy(peer.network).requires_grad_(False).eval() if self.distils else None
        self.optimizer = torch.optim.RAdam(self.network.parameters(), lr=1e-4)
        self.move = averages_of(peer, self.network, (DECAY,) if own else (DECAY, TARGET_DECAY))
        self.grid = torch.tensor(karras_grid(POINTS), dtype=torch.float32, device=self.device)
        self.wrap = (
            (lambda n: lambda x, c: n(x, c, return_dict=False)[0]) if "diffusers" in peer.name else (lambda n: n)
        )

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's clean image."""
        assert self.teacher is not None
        return preconditioned(self.wrap(self.teacher), x, t, 0.0)

    def cleaner(self, x: Tensor, x0: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """One Heun step of the teacher's flow from t to r, or one step along the sample's own direction."""
        gap = (r - t)[:, None, None, None]
        if not self.distils:
            return x + gap * (x - x0) / t[:, None, None, None]
        slope = (x - self.denoised(x, t)) / t[:, None, None, None]
        ahead = x + gap * slope
        second = (ahead - self.denoised(ahead, r)) / r[:, None, None, None]
        return x + gap * (slope + second) / 2

    def __call__(self) -> None:
        """Do one step, on a GPU with convolutions in TF32: that is how a plain torch leaves them."""
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
        try:
            self._step()
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def _loss(self, x0: Tensor, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        x_t = x0 + t[:, None, None, None] * z
        with torch.no_grad():
            answer = preconditioned(self.wrap(self.target), self.cleaner(x_t, x0, t, r), r, SIGMA_MIN)
        return (preconditioned(self.raw, x_t, t, SIGMA_MIN).float() - answer.float()).square().mean()

    def _step(self) -> None:
        index = torch.randint(0, len(self.images), (self.batch,))
        x0 = (self.images[index].float() / 127.5 - 1).to(self.device)
        z = torch.randn_like(x0)
        at = torch.randint(0, POINTS - 1, (self.batch,), device=self.device)
        t, r = self.grid[at + 1], self.grid[at]
        with torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None):
            loss = self._loss(x0, z, t, r)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.move()


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
        entries.append(Contestant(peer.name, False, PeerStep(peer, data, asked, recipe), peer.note))
        if asked.peers_in_half:
            alike = PeerStep(peer, data, asked, recipe, torch.bfloat16)
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
