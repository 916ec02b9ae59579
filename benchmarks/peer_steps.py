"""One training step as the peers do it, around their own networks."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.matched import Peer
from cmtool.data.dataset import Dataset
from cmtool.diffusion.grid import karras_grid

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, POINTS, DECAY, TARGET_DECAY = 0.5, 0.002, 80.0, 18, 0.9999, 0.95

# Modules that its code imports but that a step without LPIPS on one process never calls.
UNUSED = {"piq": "LPIPS", "mpi4py": "MPI", "blobfile": "BlobFile"}


def released() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Return `cm.karras_diffusion`, `cm.fp16_util` and `cm.nn` of the checkout on the search path."""
    for name, attribute in UNUSED.items():
        if importlib.util.find_spec(name) is None:
            empty = ModuleType(name)
            setattr(empty, attribute, None)
            sys.modules[name] = empty
    try:
        found = [importlib.import_module(f"cm.{name}") for name in ("karras_diffusion", "fp16_util", "nn", "logger")]
    finally:
        for name in UNUSED:
            if getattr(sys.modules.get(name), "__spec__", None) is None:
                sys.modules.pop(name, None)
    diffusion, half, shared, logger = found
    logger.Logger.CURRENT = logger.Logger(dir=None, output_formats=[])
    return diffusion, half, shared


def preconditioned(raw: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, boundary: float) -> Tensor:
    """c_skip x + c_out F(c_in x, 250 ln t): a consistency function for `boundary` = sigma_min, a denoiser for 0."""
    s, level = SIGMA_DATA, t[:, None, None, None]
    shifted, root = level - boundary, (level**2 + s**2).sqrt()
    c_skip, c_out = s**2 / (shifted**2 + s**2), shifted * s / root
    return c_skip * x + c_out * raw(x / root, 250 * (t + 1e-44).log())


class PeerStep:
    """The same step around a peer's network, in a plain loop with torch's RAdam and diffusers' EMAModel."""

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
        self.move = self.averages(self.network, (DECAY,) if own else (DECAY, TARGET_DECAY))
        self.grid = torch.tensor(karras_grid(POINTS), dtype=torch.float32, device=self.device)

    def averages(self, network: nn.Module, decays: tuple[float, ...]) -> Callable[[], None]:
        """Return what moves averages of a network."""
        from diffusers.training_utils import EMAModel

        kept = [EMAModel(network.parameters(), decay=decay, use_ema_warmup=False) for decay in decays]
        return lambda: [average.step(network.parameters()) for average in kept] and None

    def answer(self, network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """F of a copy of the peer's network."""
        return lambda x, c: network(x, c, return_dict=False)[0]

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's clean image."""
        assert self.teacher is not None
        return preconditioned(self.answer(self.teacher), x, t, 0.0)

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
        """Do one step; on a GPU convolutions are in TF32, which is plain torch's default."""
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
        try:
            self._step()
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def _loss(self, x0: Tensor, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        x_t = x0 + t[:, None, None, None] * z
        with torch.no_grad():
            answer = preconditioned(self.answer(self.target), self.cleaner(x_t, x0, t, r), r, SIGMA_MIN)
        return (preconditioned(self.raw, x_t, t, SIGMA_MIN).float() - answer.float()).square().mean()

    def batch_of_images(self) -> Tensor:
        """Images drawn from the data set, (B, C, H, W) in [-1, 1]."""
        index = torch.randint(0, len(self.images), (self.batch,))
        return (self.images[index].float() / 127.5 - 1).to(self.device)

    def _step(self) -> None:
        x0 = self.batch_of_images()
        z = torch.randn_like(x0)
        at = torch.randint(0, POINTS - 1, (self.batch,), device=self.device)
        t, r = self.grid[at + 1], self.grid[at]
        with torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None):
            loss = self._loss(x0, z, t, r)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.move()


class OpenAiStep(PeerStep):
    """The step of the released OpenAI code: its losses, trainer and averages.

    It has the parts of its loop that make a step: gradients zeroed in place, `consistency_losses`, the norms of weights
    and gradients that its `MixedPrecisionTrainer` takes, torch's RAdam, `update_ema` parameter by parameter. (The loop
    itself requires MPI, and its target's average fits only flattened half-precision weights.)
    """

    def __init__(
        self, peer: Peer, data: Dataset, asked: argparse.Namespace, recipe: str, half: torch.dtype | None = None
    ) -> None:
        self.diffusion, trainers, self.shared = released()
        super().__init__(peer, data, asked, recipe, half)
        settings = {"sigma_data": SIGMA_DATA, "sigma_max": SIGMA_MAX, "sigma_min": SIGMA_MIN, "loss_norm": "l2"}
        self.student = self.diffusion.KarrasDenoiser(distillation=True, weight_schedule="uniform", **settings)
        self.solved = self.diffusion.KarrasDenoiser(distillation=False, **settings)
        self.trainer = trainers.MixedPrecisionTrainer(model=self.network, use_fp16=False)

    def averages(self, network: nn.Module, decays: tuple[float, ...]) -> Callable[[], None]:
        """Move averages of a network by its `update_ema`; the last one is the target's."""
        weights = list(network.parameters())
        kept = [[weight.detach().clone() for weight in weights] for _ in decays]
        if len(decays) > 1:
            kept[-1] = list(self.target.parameters())

        def move() -> None:
            with torch.no_grad():
                for average, decay in zip(kept, decays, strict=True):
                    self.shared.update_ema(average, weights, rate=decay)

        return move

    def loss(self, x0: Tensor) -> Tensor:
        """Its loss: an Euler step along the sample's own direction, or Heun's with a teacher."""
        extra = {"teacher_model": self.teacher, "teacher_diffusion": self.solved} if self.distils else {}
        found: Tensor = self.student.consistency_losses(self.network, x0, POINTS, target_model=self.target, **extra)[
            "loss"
        ]
        return found.mean()

    def _step(self) -> None:
        self.trainer.zero_grad()
        x0 = self.batch_of_images()
        with torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None):
            loss = self.loss(x0)
        self.trainer.backward(loss)
        self.trainer.optimize(self.optimizer)
        self.move()


def peer_step(
    peer: Peer, data: Dataset, asked: argparse.Namespace, recipe: str, half: torch.dtype | None = None
) -> PeerStep:
    """Return the step of a peer by its name; `half`: under autocast in that format."""
    kind = OpenAiStep if peer.name.startswith("openai") else PeerStep
    return kind(peer, data, asked, recipe, half)
