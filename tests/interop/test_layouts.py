"""Recognizing layouts from names and shapes, at full size and when something is wrong."""

import json

import pytest
import torch

from cmtool import models
from cmtool.checkpoint import read_header, save_model
from cmtool.config.networks import network_config
from cmtool.errors import CheckpointError, UsageError, UserError
from cmtool.interop import edm, openai, unet2d
from cmtool.interop.layout import reorder_qkv, shapes_of
from cmtool.interop.reading import ImportOptions, import_model, read_foreign
from cmtool.networks import build_network
from tests.interop import foreign

IMAGENET64 = network_config(
    channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attention=(32, 16, 8), head_channels=64
)
LSUN256 = network_config(
    channels=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_blocks=2,
    attention=(32, 16, 8),
    head_channels=64,
    scale_shift=False,
)
FULL = [(IMAGENET64, 64, 1000, 541, 629, 553), (LSUN256, 256, None, 566, 630, None)]
TINY = network_config(channels=32, channel_mult=(1, 2, 3, 4), attention=(32, 16, 8), head_channels=32)


def tensors_of(config, side, classes, device="cpu"):
    with torch.device(device):
        network = build_network(config, channels=3, resolution=side, num_classes=classes)
    return dict(network.state_dict())


@pytest.mark.parametrize(("config", "side", "classes", "ours", "theirs", "nvlabs"), FULL, ids=["imagenet64", "lsun256"])
def test_full_size_layouts(config, side, classes, ours, theirs, nvlabs):
    tensors = tensors_of(config, side, classes, "meta")
    assert len(tensors) == ours
    assert openai.detect(shapes_of(tensors)) == (config, side)
    translated = unet2d.to_diffusers(tensors, config, side)
    assert len(translated) == theirs
    described = unet2d.unet_config(config, 3, side, classes)
    assert unet2d.network_of(described) == (config, side)
    assert shapes_of(unet2d.from_diffusers(dict(translated), config, side)) == shapes_of(tensors)
    if nvlabs:
        assert len(edm.to_dhariwal(tensors, config, side)) == nvlabs
    else:
        with pytest.raises(UserError, match="scale-shift"):
            edm.to_dhariwal(tensors, config, side)


def test_reordering_by_hand():
    # Two heads of two channels: rows are named (letter, head, channel).
    rows = [(letter, head, channel) for letter in "qkv" for head in (0, 1) for channel in (0, 1)]
    number = {row: float(index) for index, row in enumerate(rows)}
    plain = torch.tensor([number[row] for row in rows])
    per_head = torch.tensor([number[letter, head, c] for head in (0, 1) for letter in "qkv" for c in (0, 1)])
    interleaved = torch.tensor([number[letter, head, c] for head in (0, 1) for c in (0, 1) for letter in "qkv"])
    assert torch.equal(reorder_qkv(per_head, 2, "heads-three-channels", "three-heads-channels"), plain)
    assert torch.equal(reorder_qkv(interleaved, 2, "heads-channels-three", "three-heads-channels"), plain)
    assert torch.equal(reorder_qkv(plain, 2, "three-heads-channels", "heads-channels-three"), interleaved)
    assert torch.equal(reorder_qkv(per_head, 2, "heads-three-channels", "heads-channels-three"), interleaved)


def save(path, tensors):
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def tiny():
    return tensors_of(TINY, 64, 1000)


def test_missing_surplus_and_misshapen_tensors_are_counted_and_named(tiny, tmp_path):
    broken = dict(tiny)
    for index in range(1, 5):
        del broken[f"input_blocks.{index}.0.out_layers.0.bias"]
    broken |= {f"extra{index:02}.weight": torch.zeros(1) for index in range(12)}
    broken["out.0.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        import_model(save(tmp_path / "cd.pt", broken), tmp_path / "m.safetensors", ImportOptions(head_channels=32))
    text = caught.value.message
    assert "4 missing: input_blocks.1.0.out_layers.0.bias" in text
    assert "12 surplus: extra00.weight" in text and "extra09.weight and 2 more" in text
    assert "1 of another shape: out.0.weight (3,) instead of (32,)" in text
    assert not (tmp_path / "m.safetensors").exists()


def test_half_precision_is_widened_and_said(tiny, tmp_path):
    mixed = {name: value.half() if value.ndim == 4 else value for name, value in tiny.items()}
    said = []
    path = save(tmp_path / "target_model.pt", mixed)
    import_model(path, tmp_path / "m.safetensors", ImportOptions(head_channels=32), say=said.append)
    model = models.load(tmp_path / "m.safetensors")
    assert {value.dtype for value in model.network.state_dict().values()} == {torch.float32}
    halves = sum(value.ndim == 4 for value in tiny.values())
    assert any(f"{halves} of {len(tiny)} tensors are half precision; they were widened" in text for text in said)


def test_shared_storages_and_parameters_as_a_half_precision_run_writes_them(tiny, tmp_path):
    flat = torch.cat([value.flatten() for value in tiny.values()]).requires_grad_()
    views, start = {}, 0
    for name, value in tiny.items():
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    import_model(save(tmp_path / "cd.pt", views), tmp_path / "m.safetensors", ImportOptions(head_channels=32))
    model = models.load(tmp_path / "m.safetensors")
    assert all(torch.equal(model.network.state_dict()[name], value) for name, value in tiny.items())


@pytest.mark.parametrize("nested", ["model_ema_state_dict", "state_dict"])
def test_a_state_dict_within_a_training_checkpoint(tiny, tmp_path, nested):
    content = {
        "training_step": 5,
        "model_state_dict" if "ema" in nested else "other": {"a": 1},
        nested: {f"module.{k}": v for k, v in tiny.items()},
    }
    path = save(tmp_path / "best_model.pt", content)
    assert read_foreign(path, ImportOptions(head_channels=32)).num_classes == 1000


def test_unusual_multipliers_need_a_resolution(tmp_path):
    config = network_config(channels=32, channel_mult=(1, 2), attention=(16,), head_channels=64)
    path = save(tmp_path / "cd.pt", tensors_of(config, 32, None))
    with pytest.raises(UserError, match="cannot be known from channel multipliers 1-2") as caught:
        read_foreign(path, ImportOptions())
    assert "--resolution" in caught.value.hint
    found = read_foreign(path, ImportOptions(resolution=32))
    assert (found.network, found.resolution) == (config, 32)


def test_a_resolution_that_the_file_contradicts_is_refused(tmp_path):
    path, _ = foreign.write("edm_ddpmpp", tmp_path)
    with pytest.raises(UsageError, match="for 32 px, and --resolution says 64"):
        import_model(path, tmp_path / "m.safetensors", ImportOptions(resolution=64))


def test_an_output_with_a_variance_half_loses_it(tiny, tmp_path):
    six = dict(tiny) | {"out.2.weight": torch.randn(6, 32, 3, 3), "out.2.bias": torch.randn(6)}
    found = read_foreign(save(tmp_path / "x.pt", six), ImportOptions(head_channels=32))
    assert torch.equal(found.tensors["out.2.bias"], six["out.2.bias"][:3])
    assert any("variance half of its 6 output channels" in note for note in found.notes)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)},
            "no layout that is known here: 2 tensors, among them fc.bias, fc.weight",
        ),
        (
            {"conv_in.weight": torch.zeros(1), "down_blocks.0.x": torch.zeros(1)},
            "diffusers weights without their config.json",
        ),
        ({}, "holds no state dict; it holds: nothing"),
        ({"opt": [1, 2], "step": 3}, "holds no state dict; it holds: opt, step"),
    ],
)
def test_unknown_layouts_say_what_was_found_and_what_is_known(tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words):
        read_foreign(save(tmp_path / "x.pt", tensors), ImportOptions())


def test_other_variants_are_named(tiny, tmp_path):
    plain = dict(tiny) | {"input_blocks.4.0.op.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="plain convolutions"):
        read_foreign(save(tmp_path / "x.pt", plain), ImportOptions())
    foreign.write_snapshot(tmp_path / "vp.pkl", {"model.a.weight": torch.zeros(1)}, "VPPrecond", {})
    with pytest.raises(CheckpointError, match="VPPrecond: cmtool does not have the VP parameterization"):
        read_foreign(tmp_path / "vp.pkl", ImportOptions())
    foreign.write_snapshot(tmp_path / "norm.pkl", foreign.state("tcm_edm2"), "ECMPrecond", {"emb_norm": True})
    with pytest.raises(CheckpointError, match="emb_norm = True"):
        read_foreign(tmp_path / "norm.pkl", ImportOptions())


def test_a_learned_scale_of_the_frequencies_becomes_part_of_them():
    tensors = foreign.state("edm_ncsnpp")
    freqs = tensors["model.map_noise.freqs"].clone()
    found = edm.read(tensors | {"model.map_noise.scale": torch.tensor(1.6)})
    torch.testing.assert_close(found.tensors["map_noise.freqs"], freqs * 16)
    with pytest.raises(CheckpointError, match="attends otherwise"):
        edm.read(foreign.state("edm_ncsnpp"), kwargs={"attn_type": "l2"})


def test_ect_keeps_the_boundary_and_tcm_does_not(tmp_path):
    """Both call their class ECMPrecond; the text of the embedded source tells them apart."""
    tensors = foreign.state("edm_ddpmpp")
    for source, expected in (("c_out = (sigma - self.sigma_min) * x", "consistency"), ("c_out = sigma * x", "edm")):
        with foreign.nvlabs(), open(tmp_path / "s.pkl", "wb") as stream:
            network = foreign.module_tree(tensors, "ECMPrecond", sigma_min=0.003)
            network.meta["module_src"] = source
            foreign.pickle.dump({"ema": network}, stream)
        header = import_model(tmp_path / "s.pkl", tmp_path / "m.safetensors")
        assert header["kind"] == "consistency"
        assert header["process"]["parameterization"] == expected
        assert header["process"]["sigma_min"] == 0.003


def test_a_pipeline_of_another_kind_and_an_unet_of_another_kind(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="is a StableDiffusionPipeline"):
        read_foreign(tmp_path, ImportOptions())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DModel", "sample_size": 32, "block_out_channels": [32]})
    )
    with pytest.raises(CheckpointError, match="no ADM U-Net: downsample_type = 'conv'"):
        read_foreign(tmp_path, ImportOptions())


def test_old_attention_names_and_missing_settings_of_a_pipeline(tmp_path):
    meta, *_ = foreign.golden("diffusers_imagenet64")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, value in foreign.state("diffusers_imagenet64").items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[name] = value
    short = {key: value for key, value in meta["full"].items() if key in meta["config"]}
    foreign.write_pipeline(tmp_path / "p", renamed, short)
    found = read_foreign(tmp_path / "p", ImportOptions())
    foreign.write("diffusers_imagenet64", tmp_path)
    usual = read_foreign(tmp_path / "pipeline", ImportOptions())
    assert found.network == usual.network
    assert all(torch.equal(found.tensors[name], value) for name, value in usual.tensors.items())


def test_our_own_files_and_strange_places_are_answered(tmp_path, tiny):
    save_model(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, {"kind": "consistency"})
    with pytest.raises(UserError, match="cmtool model already"):
        read_foreign(tmp_path / "model.safetensors", ImportOptions())
    with pytest.raises(UserError, match="cmtool run already"):
        read_foreign(tmp_path, ImportOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no folder that is known here; it holds: nothing"):
        read_foreign(tmp_path / "empty", ImportOptions())
    with pytest.raises(CheckpointError, match="does not exist"):
        read_foreign(tmp_path / "nothing.pt", ImportOptions())
    (tmp_path / "text.pt").write_text("hello, this is not a model")
    with pytest.raises(CheckpointError, match="no file that is known here"):
        read_foreign(tmp_path / "text.pt", ImportOptions())


def test_published_file_names_say_form_and_times(tiny, tmp_path):
    for file, kind, times in (
        ("cd_imagenet64_l2.pt", "consistency", {"1": [80.0], "2": [80.0, pytest.approx(1.382368, abs=1e-6)]}),
        ("ct_imagenet64.pt", "consistency", {"1": [80.0], "2": [80.0, pytest.approx(1.912844, abs=1e-6)]}),
        ("edm_imagenet64_ema.pt", "diffusion", {}),
    ):
        import_model(save(tmp_path / file, tiny), tmp_path / "m.safetensors", ImportOptions(head_channels=32))
        header = read_header(tmp_path / "m.safetensors")
        assert (header["kind"], header["times"]) == (kind, times)
        assert header["origin"]["license"] == "MIT"
    given = ImportOptions(
        head_channels=32, form="edm", sigma_min=0.01, sigma_max=50.0, sigma_data=0.4, noise_scale=0.25
    )
    header = import_model(tmp_path / "ct_imagenet64.pt", tmp_path / "m.safetensors", given)
    process = header["process"]
    assert header["kind"] == "diffusion" and header["times"] == {}
    assert [process[key] for key in ("sigma_min", "sigma_max", "sigma_data", "noise_scale")] == [0.01, 50.0, 0.4, 0.25]
