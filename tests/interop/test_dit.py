"""Files of DiT and SiT: names, counts and times; and what our own export brings back."""

import json

import pytest
import torch

from cmtool import models
from cmtool.checkpoint import load_tensors, read_header
from cmtool.config.networks import network_config
from cmtool.diffusion.parameterization import ddpm_levels, ddpm_step
from cmtool.errors import CheckpointError, UserError
from cmtool.interop import dit
from cmtool.interop.reading import ImportOptions, import_model
from cmtool.interop.writing import export_model
from cmtool.networks import build_network
from tests.interop import foreign
from tests.interop.own import own_model

SMALL = network_config(kind="dit", patch=2, width=32, depth=2, heads=4)
SIZES = {"S/2": (384, 12, 6), "XL/2": (1152, 28, 16)}


def published(size):
    """Names and shapes of a published size in latents of 32 x 32 x 4, made of a network without memory."""
    width, depth, heads = SIZES[size]
    table = network_config(kind="dit", patch=2, width=width, depth=depth, heads=heads)
    with torch.device("meta"):
        network = build_network(table, channels=4, resolution=32, num_classes=1000)
        return table, dit.to_dit(network.state_dict(), "ddpm", 4)


def test_the_largest_published_network_to_the_parameter():
    _, tensors = published("XL/2")
    assert sum(tensor.numel() for tensor in tensors.values()) == 675_129_632


def test_names_and_shapes_are_those_of_the_authors_code():
    table, tensors = published("S/2")
    layout = foreign.golden("dit_s2")[0]["layout"]
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == layout
    assert dit.detect({name: tuple(shape) for name, shape in layout.items()}, None) == (table, 32, 4)


def test_steps_of_the_schedule_are_exact_and_rise():
    """Ho et al. 2020: a_1 = 1 - 1e-4, and a_1000 = 4.0358e-5."""
    levels = ddpm_levels()
    assert levels[0] == pytest.approx((1e-4 / (1 - 1e-4)) ** 0.5)
    assert levels[-1] == pytest.approx((1 / 4.0358e-5 - 1) ** 0.5, rel=1e-4)
    assert torch.equal(ddpm_step(levels.float()), torch.arange(1000.0))
    between = ddpm_step(torch.linspace(-6, 6, 5000).exp())
    assert (between.diff() >= 0).all() and between[0] == 0 and between[-1] == 999
    middle = (levels[300].log() + levels[301].log()).div(2).exp()
    assert ddpm_step(middle[None]).item() == pytest.approx(300.5)


def test_the_step_has_a_derivative_for_consistency_in_continuous_time():
    t = torch.tensor([0.02, 1.3, 80.0, float(ddpm_levels()[400])], dtype=torch.float64)
    _, slope = torch.func.jvp(ddpm_step, (t,), (torch.ones_like(t),))
    difference = (ddpm_step(t * 1.0001) - ddpm_step(t)) / (t * 1e-4)
    torch.testing.assert_close(slope[:3], difference[:3], rtol=1e-3, atol=0)
    assert slope[3] > 0


def test_turning_the_time_twice_is_the_identity():
    tensors = dict(build_network(SMALL, channels=3, resolution=8).state_dict())
    tensors["final_layer.linear.bias"] = torch.ones(12)
    again = dict(tensors)
    dit.reverse_time(again)
    assert not torch.allclose(again["t_embedder.mlp.0.weight"], tensors["t_embedder.mlp.0.weight"], atol=1e-3)
    dit.reverse_time(again)
    for name, tensor in tensors.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize("classes", [3, None])
@pytest.mark.parametrize(("form", "file"), [("edm", "d.pt"), ("consistency", "d.safetensors"), ("ddpm", "d.pt"), ("flow", "d.pt")])  # fmt: skip
def test_import_of_an_export_is_the_identity(tmp_path, form, file, classes):
    kind = "diffusion" if form in ("edm", "ddpm") else "consistency"
    process = {"parameterization": form, "noise_scale": 0.25}
    path = own_model(tmp_path / "m.safetensors", SMALL, process, kind, classes, label_dropout=0.1)
    said = []
    export_model(path, "dit", tmp_path / file, say=said.append)
    import_model(tmp_path / file, tmp_path / "again.safetensors", ImportOptions(), say=said.append)
    (before, header), (after, again) = load_tensors(path), load_tensors(tmp_path / "again.safetensors")
    assert set(before) == set(after)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6 if form == "flow" else 0)
    assert again == {**header, "origin": again["origin"]}
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 30.0])
    first, second = models.load(path), models.load(tmp_path / "again.safetensors")
    torch.testing.assert_close(second(x, t), first(x, t), rtol=0, atol=1e-4 if form == "flow" else 0)


def test_an_export_leaves_out_what_only_training_is_told(tmp_path):
    path = own_model(tmp_path / "m.safetensors", SMALL.model_copy(update={"augment_labels": 9}))
    said = []
    export_model(path, "dit", tmp_path / "d.pt", say=said.append)
    header = import_model(tmp_path / "d.pt", tmp_path / "again.safetensors", ImportOptions(), say=said.append)
    assert "augment_labels" not in header["network"] and "map of augmentation labels was left out" in " ".join(said)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 30.0])
    torch.testing.assert_close(models.load(tmp_path / "again.safetensors")(x, t), models.load(path)(x, t))


def test_a_file_of_others_becomes_a_teacher_with_its_own_range(tmp_path):
    torch.save(foreign.state("dit_s2"), tmp_path / "DiT-S-2.pt")
    said = []
    header = import_model(tmp_path / "DiT-S-2.pt", tmp_path / "m.safetensors", ImportOptions(), say=said.append)
    assert {**header, "format": 1} == read_header(tmp_path / "m.safetensors")
    assert (header["kind"], header["label_dropout"], header["data"]["num_classes"]) == ("diffusion", 0.1, 1000)
    assert header["process"]["sigma_min"] == pytest.approx(0.0100005, abs=1e-6)
    assert header["process"]["sigma_max"] == pytest.approx(157.41, abs=0.01)
    assert "the noise of 1,000 steps" in " ".join(said) and "learned-variance half" in " ".join(said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"network": network_config(channels=32, channel_mult=(1, 2))},
            "holds dit networks, and this model has a network of kind adm",
        ),
        ({"network": SMALL.model_copy(update={"two_time": True})}, "no place for network.two_time = True"),
        (
            {"network": SMALL.model_copy(update={"mlp": "swiglu", "qk_norm": True})},
            "network.mlp = 'swiglu' and network.qk_norm = True",
        ),
        (
            {"network": SMALL.model_copy(update={"mlp": "gelu_erf", "input_gate": True})},
            "network.mlp = 'gelu_erf' and network.input_gate = True",
        ),
    ],
)
def test_what_their_code_cannot_hold_is_refused(tmp_path, change, words):
    path = own_model(tmp_path / "m.safetensors", **change)
    with pytest.raises(UserError, match=words):
        export_model(path, "dit", tmp_path / "d.pt")
    assert not (tmp_path / "d.pt").exists()


@pytest.mark.parametrize("header", ["[]", "{", "[" * 5000, json.dumps({"network": {"kind": "dit", "heads": 0}})])
def test_a_strange_header_beside_the_weights_is_refused(tmp_path, header):
    path = own_model(tmp_path / "m.safetensors", SMALL)
    export_model(path, "dit", tmp_path / "d.pt")
    content = torch.load(tmp_path / "d.pt", weights_only=True)
    torch.save({**content, dit.HEADER: header}, tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="header of this export cannot be understood"):
        import_model(tmp_path / "d.pt", tmp_path / "again.safetensors", ImportOptions())


def test_a_dit_of_another_form_is_named(tmp_path):
    state = dict(build_network(SMALL, channels=3, resolution=8).state_dict())
    torch.save({**state, "blocks.0.attn.q_norm.weight": torch.ones(8)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"surplus: blocks\.0\.attn\.q_norm\.weight"):
        import_model(tmp_path / "x.pt", tmp_path / "m.safetensors", ImportOptions(head_channels=8))
    del state["pos_embed"]
    torch.save(state, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="lack 'pos_embed'"):
        import_model(tmp_path / "y.pt", tmp_path / "m.safetensors", ImportOptions())
