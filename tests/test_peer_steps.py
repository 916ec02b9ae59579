"""The steps of the peers: that of OpenAI's code goes through the calls of its modules, which stand-ins take here."""

import sys

import pytest
import torch

from benchmarks import peer_steps
from benchmarks.matched import Peer, enliven, matched_config, pictures
from benchmarks.pairs import parser
from cmtool.training.setup import fresh_student

SMALL = ["--threads", "1", "--batch", "2", "--channels", "32", "--side", "8", "--blocks", "1", "--peers", "none"]

RELEASED = {
    "__init__": "",
    "logger": "class Logger:\n    def __init__(self, dir, output_formats): self.dir = dir\n",
    "nn": "def update_ema(old, new, rate):\n    for a, b in zip(old, new): a.mul_(rate).add_(b, alpha=1 - rate)\n",
    "fp16_util": """
class MixedPrecisionTrainer:
    def __init__(self, model, use_fp16): self.model = model
    def zero_grad(self): [p.grad.zero_() for p in self.model.parameters() if p.grad is not None]
    def backward(self, loss): loss.backward()
    def optimize(self, optimizer): optimizer.step()
""",
    "karras_diffusion": """
from piq import LPIPS
from mpi4py import MPI
import blobfile
import torch
asked = []
class KarrasDenoiser:
    def __init__(self, **settings): self.settings = settings
    def consistency_losses(self, model, x, num_scales, target_model, **teachers):
        asked.append((num_scales, sorted(teachers), self.settings))
        c = torch.ones(len(x))
        with torch.no_grad(): wanted = target_model(x + 1, c)
        return {"loss": ((model(x, c) - wanted) ** 2).mean((1, 2, 3))}
""",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Modules named as those of OpenAI's repository, with the calls that a step makes."""
    (tmp_path / "cm").mkdir()
    for name, text in RELEASED.items():
        (tmp_path / "cm" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name == "cm" or name.startswith("cm.")]:
        del sys.modules[name]


@pytest.mark.parametrize("recipe", ["ct", "ict", "cd"])
def test_openai_steps_through_its_own_losses_trainer_and_averages(checkout, recipe):
    options = parser("x").parse_args(SMALL)
    data = pictures(options, 4)
    network = fresh_student(matched_config(options, "ct"), data).network
    enliven(network)
    step = peer_steps.peer_step(Peer("openai UNetModel", network, network), data, options, recipe)
    assert isinstance(step, peer_steps.OpenAiStep)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    target = {name: value.clone() for name, value in step.target.state_dict().items()}
    step()
    [(scales, teachers, settings)] = sys.modules["cm.karras_diffusion"].asked
    assert scales == peer_steps.POINTS
    assert teachers == (["teacher_diffusion", "teacher_model"] if recipe == "cd" else [])
    assert settings["distillation"] and settings["sigma_min"] == 0.002 and settings["loss_norm"] == "l2"
    moved = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert moved
    for name in moved:
        now, kept = network.state_dict()[name], step.target.state_dict()[name]
        wanted = now if recipe == "ict" else target[name].lerp(now, 1 - peer_steps.TARGET_DECAY)
        torch.testing.assert_close(kept, wanted)
    # The stand-ins for what it imports and never calls are gone again.
    assert not [name for name in peer_steps.UNUSED if getattr(sys.modules.get(name, pytest), "__spec__", None) is None]
