"""`--conditioned` of benchmarks/editing_quality.py: models that see a picture, in rows beside the edits."""

import json
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.conditioned import answers, condition_of_task, kept
from cmtool.checkpoint import save_model
from cmtool.config.schema import DataConfig
from cmtool.data.condition import derived
from cmtool.data.load import load_dataset
from cmtool.models import build_model
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling

DATA = {"source": "avatars", "resolution": 16, "channels": 3}
NETWORK = {"kind": "adm", "channels": 8, "channel_mult": [1], "head_channels": 8}
COMMAND = "editing-quality --model demo/avatars --data avatars --images 2 --variations 2 --tasks superres4 --steps 1"


def conditioned(condition):
    data = {**DATA, "kind": None, "num_classes": None, "float_samples": False, "condition": condition}
    model = build_model({"kind": "consistency", "network": NETWORK, "process": {}, "data": data}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.network.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return model


@pytest.fixture
def typed(monkeypatch, capsys):
    """Run the benchmark with further options in this process; return what it printed."""

    def run(*more):
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [])
        main([*COMMAND.split(), *more])
        return capsys.readouterr().out

    yield run
    for name in ("conditioned", "digits_quality"):
        sys.modules.pop(name, None)


def faces(count):
    return load_dataset(DataConfig(**DATA, kind="heldout")).batch(torch.arange(count))[0]


def test_what_is_kept_in_levels_of_bytes():
    truth = faces(2)
    gray, small = condition_of_task("colorize", truth), condition_of_task("superres4", truth)
    brighter = (truth + 3 * 2 / 255).expand(2, *truth.shape)
    assert kept(brighter, truth, gray) == pytest.approx(3, abs=1e-3)
    assert kept(brighter, truth, small) == pytest.approx(3, abs=1e-3)
    flat = derived(truth, small)[None]
    assert kept(flat, truth, small) == pytest.approx(0, abs=1e-4) and kept(flat, truth, gray) > 5
    assert condition_of_task("inpaint", truth) is None


def test_a_model_is_shown_the_conditions_of_its_own_data():
    """`sample` shows held-out picture s to seed s; here the pictures are given, and the samples are the same."""
    model = conditioned("superres:4")
    expected = next(generate(model, plan_sampling(model.header, steps=2), [0, 1])).x0
    made = answers(model, faces(2), 2, [[0, 1], [2, 3]])
    assert torch.equal(made[0], expected) and not torch.allclose(made[1], expected, atol=1e-3)


def test_conditioned_models_are_rows_beside_the_edits(typed, tmp_path):
    model = conditioned("superres:4")
    save_model(tmp_path / "model.safetensors", model.network.state_dict(), model.header)
    rows = json.loads(typed("--conditioned", str(tmp_path / "model.safetensors"), "--json"))["rows"]
    assert [(row["task"], row["nfe"]) for row in rows] == [
        ("superres4", 1),
        ("superres:4, conditioned", 1),
        ("superres:4, conditioned", 2),
    ]
    assert rows[0]["kept"] < 1e-3 < 1 < rows[1]["kept"]  # an edit projects; random weights keep nothing
    assert rows[1]["psnr trivial"] == pytest.approx(rows[0]["psnr trivial"], abs=1e-3)
    assert list(rows[0]) == list(rows[1])


def test_a_model_that_sees_no_picture_is_refused(typed, capsys):
    with pytest.raises(SystemExit):
        typed("--conditioned", "demo/avatars")
    assert "--conditioned demo/avatars sees no picture" in capsys.readouterr().err
