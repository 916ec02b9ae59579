"""One training step of easy consistency tuning (ECT), ours against the method's own code and FastGen's.

All train the DDPM++ U-Net of EDM with the same weights on the same images: log-normal t, r from ECT's mapping at its
first stage, target without gradients, student, root of the squared distance over t - r, backward, RAdam, one moving
average. ECT's network, loss and loop body come from its repository; FastGen's step, optimizer and average are those of
its own consistency model; both are in float32. They are given by a path to a checkout, and their networks must give the
same answers as ours before they are timed. (ECT skips the target when every r is 0, in 3 of 100 batches of 16;
FastGen's r are at least .002.)
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.matched import TOLERANCE, checkout, pictures
from benchmarks.pairs import Contestant, compare, parser, peers_there, publish
from benchmarks.train_step import PASSES
from cmtool.checkpoint import save_model
from cmtool.config.load import resolve
from cmtool.config.schema import RunConfig
from cmtool.data.dataset import Dataset
from cmtool.models import Model
from cmtool.training.loop import Trainer
from cmtool.training.setup import fresh_student, prepare

RATE, DECAY, HALVED = 1e-4, 0.9999, 0.5


def config_of(asked: argparse.Namespace, recipe: str, *sets: str, **flags: Any) -> RunConfig:
    """ECT's published setting on a smaller DDPM++, without dropout."""
    sizes = (
        f"network.channels={asked.channels}",
        "network.channel_mult=[1, 2, 2]",
        f"network.num_blocks={asked.blocks}",
        f"network.attention=[{asked.side // 2}]",
        f"network.head_channels={1 << 20}",
        "network.dropout=0",
        f"data.resolution={asked.side}",
        "data.flip=false",
        "train.optimizer=radam",
        f"train.lr={RATE}",
        "train.log_every=1000000",
        f"train.ema={{kind='exponential', decay={DECAY}}}",
    )
    if recipe == "edm":
        sizes += ('network.embedding="positional"', 'network.encoder="standard"', "network.resample_filter=[1, 1]")
    given = {"train.batch_size": asked.batch, "train.steps": 100_000, "train.precision": "fp32", **flags}
    return resolve("cifar10", recipe=recipe, sets=(*sizes, *sets), flags=given).config


def own_trainer(asked: argparse.Namespace, data: Dataset, source: Path, precision: str, *sets: str) -> Trainer:
    """A trainer of ours that starts from the weights in `source`."""
    flags = {"train.precision": precision, "init": str(source)}
    return prepare(config_of(asked, "ect", *sets, **flags), data, torch.device(asked.device))


def song_arguments(model: Model) -> dict[str, Any]:
    """The sizes of our network by the names that both peers' networks use."""
    table = model.header["network"]
    return {
        "img_resolution": model.image_shape[-1],
        "img_channels": model.image_shape[0],
        "model_type": "SongUNet",
        "model_channels": table["channels"],
        "channel_mult": list(table["channel_mult"]),
        "num_blocks": table["num_blocks"],
        "attn_resolutions": list(table["attention"]),
        "dropout": 0.0,
    }


@contextmanager
def generator_of_the_cpu() -> Any:
    """Without a GPU, replace torch.cuda's generator state, which ECT's loss reads, by the CPU's."""
    kept = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    if not torch.cuda.is_available():
        torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
    try:
        yield
    finally:
        torch.cuda.get_rng_state, torch.cuda.set_rng_state = kept


class EctStep:
    """The body of ECT's training loop: its loss, gradients made finite, RAdam, its average."""

    name, note = "ECT", "its network, loss and loop body"

    def __init__(self, model: Model, data: Dataset, asked: argparse.Namespace) -> None:
        checkout(asked.ect_path, "--ect-path", "ECT_PATH")
        networks, losses = importlib.import_module("training.networks"), importlib.import_module("training.loss")
        self.network = networks.ECMPrecond(**song_arguments(model))
        self.network.model.load_state_dict(model.network.state_dict())
        self.network.train().to(asked.device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.loss = losses.ECMLoss()
        self.loss.update_schedule(0)
        self.optimizer = torch.optim.RAdam(self.network.parameters(), lr=RATE)
        self.data, self.batch, self.device = data.images, asked.batch, asked.device

    def answer(self, x: Tensor, t: Tensor) -> Tensor:
        """The image that its network finds, as in training."""
        return self.network(x, t)

    def __call__(self) -> None:
        """Do one step."""
        self.optimizer.zero_grad(set_to_none=True)
        images = self.data[torch.randint(0, len(self.data), (self.batch,))].to(self.device).float() / 127.5 - 1
        with generator_of_the_cpu():
            self.loss(net=self.network, images=images).mean().backward()
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
            kept.copy_(new.detach().lerp(kept, DECAY))


class FastGenStep:
    """FastGen's consistency model: its training step, optimizer and average."""

    name, note = "FastGen", "its CMModel, optimizer and average"

    def __init__(self, model: Model, data: Dataset, asked: argparse.Namespace) -> None:
        checkout(asked.fastgen_path, "--fastgen-path", "FASTGEN_PATH")
        settings = importlib.import_module("fastgen.configs.methods.config_cm").ModelConfig()
        networks = importlib.import_module("fastgen.networks.EDM.network")
        lazy = importlib.import_module("fastgen.utils").LazyCall
        settings.net = lazy(networks.EDMPrecond)(label_dim=0, r_timestep=False, **song_arguments(model))
        settings.device, settings.precision = torch.device(asked.device), "float32"
        settings.pretrained_model_path, settings.input_shape = "", list(model.image_shape)
        settings.net_optimizer.lr, settings.net_optimizer.weight_decay = RATE, 0.0
        self.model = importlib.import_module("fastgen.methods").CMModel(settings)
        for network in (self.model.net, self.model.ema):
            network.model.load_state_dict(model.network.state_dict(), strict=False)
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.model.ratio = HALVED
        self.network: nn.Module = self.model.net
        self.average = importlib.import_module("fastgen.callbacks.ema").EMACallback(beta=DECAY)
        self.average.on_model_init_end(self.model)
        self.data, self.batch, self.device, self.count = data.images, asked.batch, asked.device, 0

    def answer(self, x: Tensor, t: Tensor) -> Tensor:
        """The image that its network finds, as in training."""
        return self.network(x, t, fwd_pred_type="x0")

    def __call__(self) -> None:
        """Do one step."""
        self.count += 1
        images = self.data[torch.randint(0, len(self.data), (self.batch,))].to(self.device).float() / 127.5 - 1
        none = torch.zeros(self.batch, 0, device=self.device)
        batch = {"real": images, "condition": none, "neg_condition": none}
        self.model.optimizers_zero_grad(self.count)
        losses, outputs = self.model.single_train_step(batch, self.count)
        self.model.grad_scaler.scale(losses["total_loss"]).backward()
        self.model.optimizers_schedulers_step(self.count)
        self.average.on_training_step_end(self.model, batch, outputs, losses, self.count)


PEERS: dict[str, Callable[[Model, Dataset, argparse.Namespace], EctStep | FastGenStep]] = {
    "ect": EctStep,
    "fastgen": FastGenStep,
}


def redraw(network: nn.Module, seed: int = 0) -> None:
    """Give all weights the size that keeps variances, and norms and biases something to do.

    DDPM++ starts its last layers at 1e-5, so answers would be the same whatever the rest of the network does.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            drawn = torch.randn(parameter.shape, generator=g)
            if parameter.dim() > 1:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * drawn)


def disagreement(model: Model, peer: EctStep | FastGenStep) -> float:
    """Largest difference between the raw networks' answers F on random inputs, relative to the largest of them."""
    g = torch.Generator().manual_seed(7)
    t = torch.tensor([0.3, 2.0, 20.0, 80.0], device=model.device)
    level = t[:, None, None, None]
    x = torch.randn(4, *model.image_shape, generator=g).to(model.device) * (0.25 + level**2).sqrt()

    def raw(image: Tensor) -> Tensor:
        """Undo the preconditioning of Karras et al. 2022."""
        return (image - x * 0.25 / (level**2 + 0.25)) * (level**2 + 0.25).sqrt() / (0.5 * level)

    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        ours, theirs = raw(model(x, t)), raw(peer.answer(x, t))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main(arguments: list[str] | None = None) -> None:
    """Measure and publish."""
    made = parser(__doc__)
    made.set_defaults(peers=",".join(PEERS))
    for name, what in (("ect", "locuslab/ect"), ("fastgen", "NVlabs/FastGen")):
        default = os.environ.get(f"{name.upper()}_PATH")
        made.add_argument(f"--{name}-path", default=default, help=f"checkout of {what}; default: ${name.upper()}_PATH")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    data = pictures(asked)
    source = fresh_student(config_of(asked, "edm"), data)
    redraw(source.network)
    makers: dict[str, Callable[[], Any]] = {name: partial(make, source, data, asked) for name, make in PEERS.items()}
    peers, absent = peers_there(asked, makers)
    for peer in peers.values():
        if (difference := disagreement(source.to(asked.device), peer)) > TOLERANCE:
            raise AssertionError(f"{peer.name} with the same weights differs by {difference:.2e}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edm.safetensors"
        save_model(path, source.network.state_dict(), source.header)
        entries = [Contestant("cmtool fp32", True, own_trainer(asked, data, path, "fp32").step)]
        for passes, note in PASSES.items():
            trainer = own_trainer(asked, data, path, "bf16", f"train.half_passes={passes}")
            entries.append(Contestant(f"cmtool bf16 {passes}", True, trainer.step, note))
    entries += [Contestant(peer.name, False, peer, peer.note) for peer in peers.values()]
    parameters = sum(p.numel() for p in source.parameters())
    title = f"ect training step: DDPM++, {parameters / 1e6:.1f} M parameters, {asked.side} px, batch {asked.batch}"
    publish("ect-step", [compare(title, entries, asked.rounds, asked.clock, absent)], asked)


if __name__ == "__main__":
    main()
