"""Import, export, import again is the identity; what cannot be expressed elsewhere is refused in words."""

import json

import pytest
import torch

from cmtool import models
from cmtool.checkpoint import load_tensors, read_header
from cmtool.config.networks import network_config
from cmtool.errors import UserError
from cmtool.interop import programs
from cmtool.interop.reading import ImportOptions, import_model
from cmtool.interop.writing import export_model
from tests.interop import foreign
from tests.interop.own import own_model


def brought_in(name, folder):
    folder.mkdir(exist_ok=True)
    path, options = foreign.write(name, folder)
    import_model(path, folder / "m.safetensors", ImportOptions(**options))
    return folder / "m.safetensors"


@pytest.mark.parametrize(
    ("name", "format", "file", "options"),
    [
        ("openai_imagenet64", "openai", "cd_again.pt", {"head_channels": 32}),
        ("openai_lsun256", "openai", "again.safetensors", {}),
        ("openai_imagenet64", "diffusers", "folder", {}),
        ("openai_lsun256", "diffusers", "folder", {}),
        ("openai_imagenet64_edm", "diffusers", "folder", {}),
        ("diffusers_imagenet64", "openai", "again.pt", {"head_channels": 32}),
        ("edm_ddpmpp", "edm-state", "again.pt", {"form": "edm"}),
        ("edm_ncsnpp", "edm-state", "again.safetensors", {"form": "edm"}),
        ("edm_adm", "edm-state", "again.pt", {"form": "edm"}),
        ("jax_ncsnpp", "edm-state", "again.pt", {}),
    ],
)
def test_import_export_import_is_the_identity(tmp_path, name, format, file, options):
    first = brought_in(name, tmp_path / "in")
    export_model(first, format, tmp_path / file)
    import_model(tmp_path / file, tmp_path / "second.safetensors", ImportOptions(**options))
    (before, header), (after, again) = load_tensors(first), load_tensors(tmp_path / "second.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for key in ("kind", "process"):
        assert again[key] == header[key]
    assert {**again["network"], "dropout": 0} == {**header["network"], "dropout": 0}
    assert again["data"]["num_classes"] == header["data"]["num_classes"]


def test_the_exported_files_hold_the_foreign_names_again(tmp_path):
    for name, format in (("openai_imagenet64", "openai"), ("diffusers_lsun256", "diffusers"), ("edm_adm", "edm-state")):
        out = tmp_path / f"{name}.out"
        export_model(brought_in(name, tmp_path / name), format, out)
        if format == "diffusers":
            from safetensors.torch import load_file

            tensors = load_file(str(out / "unet/diffusion_pytorch_model.safetensors"))
            config = json.loads((out / "unet/config.json").read_text())
            theirs = foreign.golden(name)[0]["full"]
            assert {key: config[key] for key in theirs if key in config} == {
                key: value for key, value in theirs.items() if key in config
            }
            assert json.loads((out / "scheduler/scheduler_config.json").read_text())["num_train_timesteps"] == 201
        else:
            tensors = torch.load(out, weights_only=True)
        expected = foreign.state(name)
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_a_diffusers_export_says_how_to_take_two_steps(tmp_path):
    grid = {"grid": 40}
    path = own_model(
        tmp_path / "m.safetensors", side=16, origin=grid, times={"1": [80.0], "2": [80.0, 1.3823679566485092]}
    )
    said = []
    export_model(path, "diffusers", tmp_path / "d", say=said.append)
    assert any("timesteps=[22, 0]" in text for text in said)
    config = json.loads((tmp_path / "d/unet/config.json").read_text())
    assert config["block_out_channels"] == [32, 64]
    assert config["down_block_types"] == ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"]


@pytest.mark.parametrize(
    ("change", "format", "words"),
    [
        ({"process": {"noise_scale": 0.25}}, "diffusers", "feeds the network 250 ln t, and this one was trained with 0.25 ln t"),
        ({"process": {"noise_scale": 0.25}}, "openai", "its images would be wrong there"),
        ({}, "edm-state", "feeds the network 0.25 ln t"),
        ({"network": network_config(channels=32, channel_mult=(1, 2), two_time=True)}, "openai", "no place for a second time input"),
        ({"network": network_config(channels=32, channel_mult=(1, 2), group_channels=4)}, "openai", "32 channels in 32 groups, and this network in 8"),
        ({"network": network_config(channels=48, channel_mult=(1, 2))}, "diffusers", "normalizes 32 groups everywhere"),
        ({"network": network_config(channels=32, channel_mult=(1, 2), num_blocks=(1, 2))}, "diffusers", "one number of blocks"),
        ({"network": network_config(kind="song", channels=32, channel_mult=(1, 2))}, "openai", "holds adm networks, and this model has a song network"),
        ({"network": network_config(channels=32, channel_mult=(1, 2), scale_shift=False, group_channels=4), "process": {"noise_scale": 0.25}}, "edm-state", "needs scale-shift"),
        ({"kind": "diffusion"}, "torchscript", "a teacher is not"),
    ],
)  # fmt: skip
def test_what_another_layout_cannot_express_is_refused(tmp_path, change, format, words):
    path = own_model(tmp_path / "m.safetensors", **change)
    with pytest.raises(UserError, match=words):
        export_model(path, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_not_overwritten(tmp_path):
    path = own_model(tmp_path / "m.safetensors")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/notes.txt").write_text("mine")
    for format in ("diffusers", "hub"):
        with pytest.raises(UserError, match="not an empty folder"):
            export_model(path, format, tmp_path / "d")
    assert [entry.name for entry in (tmp_path / "d").iterdir()] == ["notes.txt"]


def test_a_torchscript_program_answers_like_the_model(tmp_path):
    path = own_model(tmp_path / "m.safetensors")
    said = []
    export_model(path, "torchscript", tmp_path / "m.ts", say=said.append)
    assert "differs from the model by at most" in said[0]
    model, program = models.load(path), torch.jit.load(str(tmp_path / "m.ts"))
    z, label = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 0, 1])
    expected = model(80 * z, torch.full((5,), 80.0), label).clamp(-1, 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(program(z, label), expected, rtol=0, atol=1e-5)


def test_a_program_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    path = own_model(tmp_path / "m.safetensors")
    monkeypatch.setattr(programs, "_run_torchscript", lambda file: lambda inputs: inputs[0].numpy())
    with pytest.raises(UserError, match="it was not kept"):
        export_model(path, "torchscript", tmp_path / "m.ts")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_an_onnx_program_answers_like_the_model(tmp_path):
    pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    path = own_model(tmp_path / "m.safetensors")
    said = []
    export_model(path, "onnx", tmp_path / "m.onnx", say=said.append)
    assert "differs from the model by at most" in said[0]


def test_onnx_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match="needs the package 'onnx'") as caught:
        export_model(own_model(tmp_path / "m.safetensors"), "onnx", tmp_path / "m.onnx")
    assert caught.value.hint == "pip install 'cmtool-consistency[onnx]'"


def test_a_hub_folder_is_whole_and_loads(tmp_path):
    published = {"fid": {"1": 6.2}, "source": "Song et al. 2023"}
    path = own_model(
        tmp_path / "m.safetensors",
        published=published,
        figures={"2": 1509.29},
        origin={"license": "MIT", "layout": "openai", "name": "openai/x"},
    )
    export_model(path, "hub", tmp_path / "hub")
    assert sorted(entry.name for entry in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "grid.png",
        "model.safetensors",
    ]
    card = (tmp_path / "hub/README.md").read_text()
    for words in (
        "license: mit",
        "FID 6.2 with 1 evaluation, as published (Song et al. 2023)",
        "distance 1509 with 2 evaluations",
        "no published FID",
        "preset digits, recipe ct",
        "80, 0.8",
        "cmtool.load(",
    ):
        assert words in card
    assert read_header(tmp_path / "hub/model.safetensors") == read_header(path)
