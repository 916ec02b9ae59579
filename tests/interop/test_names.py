"""Names of published models: fetched once from a server on this machine, resumed, verified, converted, kept."""

import hashlib
import json

import pytest
import torch

from cmtool.checkpoint import load_tensors, read_header, save_model
from cmtool.errors import CheckpointError, OfflineError, UserError
from cmtool.interop import known
from cmtool.interop import published as names
from tests.files.server import Server, names_in
from tests.interop import foreign


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = Server()
    monkeypatch.setenv("CMTOOL_OFFLINE", "0")
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CMTOOL_MIRROR", made.url)
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    yield made
    made.http.shutdown()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The known name cd_imagenet64_lpips, served at a reduced size with one 64-channel head per layer."""
    import cmtool.interop.openai as openai

    monkeypatch.setattr("cmtool.interop.openai.HEAD_CHANNELS", 32)
    assert openai.HEAD_CHANNELS == 32
    path, _ = foreign.write("openai_imagenet64", tmp_path)
    return path.read_bytes()


def test_a_known_name_is_fetched_converted_kept_and_not_fetched_again(server, small, tmp_path):
    server.files["/cd_imagenet64_lpips.pt"] = small
    path = names.resolve_model("openai/cd_imagenet64_lpips")
    assert names_in(tmp_path / "cache") == ["models/openai/cd_imagenet64_lpips.safetensors"]
    header = read_header(path)
    assert header["kind"] == "consistency" and header["preset"] == "imagenet64"
    assert header["times"]["2"] == [80.0, pytest.approx(1.382368, abs=1e-6)]
    assert header["published"]["fid"] == {"1": 6.2, "2": 4.7}
    tensors, _ = load_tensors(path)
    assert all(torch.equal(tensors[name], value) for name, value in foreign.state("openai_imagenet64").items())
    count = len(server.requests)
    assert names.resolve_model("openai/cd_imagenet64_lpips") == path
    assert len(server.requests) == count


def test_a_damaged_download_is_never_kept_as_whole(server, small, tmp_path):
    server.files["/cd_imagenet64_l2.pt"], server.md5 = small[:-5000], False
    with pytest.raises(CheckpointError, match="removed from the cache"):
        names.resolve_model("openai/cd_imagenet64_l2")
    assert names_in(tmp_path / "cache") == []


def test_a_pipeline_from_the_hub(server, tmp_path):
    folder, _ = foreign.write("diffusers_imagenet64", tmp_path)
    siblings = [{"rfilename": "README.md", "size": 3}]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name, data = str(path.relative_to(folder)), path.read_bytes()
            server.files[f"/openai/diffusers-x/resolve/main/{name}"] = data
            blob = (
                {"lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
                if name.endswith("safetensors")
                else {}
            )
            siblings.append({"rfilename": name, "size": len(data), **blob})
    server.files["/api/models/openai/diffusers-x"] = json.dumps({"siblings": siblings}).encode()
    path = names.resolve_model("hf:openai/diffusers-x")
    assert read_header(path)["origin"]["layout"] == "diffusers"
    assert names_in(tmp_path / "cache") == ["models/hf/openai/diffusers-x.safetensors"]
    assert not any("README" in asked for asked, _ in server.requests)


def serve_repository(server, name, files):
    """Let the server answer as the hub does for a repository of these files."""
    for file, data in files.items():
        server.files[f"/{name}/resolve/main/{file}"] = data
    siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
    server.files[f"/api/models/{name}"] = json.dumps({"siblings": siblings}).encode()


def test_of_several_weights_in_a_repository_the_average_in_full_precision_is_fetched(server, tmp_path):
    folder, _ = foreign.write("diffusers_imagenet64", tmp_path)
    config, whole = (folder / "unet" / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
    files = {"model_index.json": (folder / "model_index.json").read_bytes()}
    for place, factor in (("unet", 1), ("unet_ema", 2)):
        tensors = {name: value * factor for name, value in foreign.state("diffusers_imagenet64").items()}
        files[f"{place}/config.json"] = config.read_bytes()
        torch.save(tensors, whole)
        files[f"{place}/diffusion_pytorch_model.bin"] = whole.read_bytes()
        files[f"{place}/diffusion_pytorch_model.fp16.safetensors"] = b"never fetched"
    serve_repository(server, "x/y", files)
    right = foreign.state("diffusers_imagenet64")["conv_in.weight"]
    for weights, factor in ((None, 2), ("raw", 1), ("ema", 2), ("unet", 1)):
        tensors, header = load_tensors(names.resolve_model("hf:x/y", weights=weights))
        assert torch.equal(tensors["input_blocks.0.0.weight"], right * factor)
        assert header["origin"]["weights"] == ("unet_ema" if factor == 2 else "unet")
    assert not any("fp16" in asked for asked, _ in server.requests)
    with pytest.raises(
        UserError, match=r"hf:x/y holds no weights 'swa'; it holds 'unet' \(raw\), 'unet_ema' \(average\)"
    ):
        names.resolve_model("hf:x/y", weights="swa")


def test_a_model_of_ours_from_the_hub(server, tmp_path):
    save_model(tmp_path / "m.safetensors", {"a": torch.zeros(1)}, {"kind": "consistency"})
    data = (tmp_path / "m.safetensors").read_bytes()
    server.files["/me/mine/resolve/main/model.safetensors"] = data
    server.files["/api/models/me/mine"] = json.dumps(
        {"siblings": [{"rfilename": "model.safetensors", "size": len(data)}]}
    ).encode()
    assert names.resolve_model("hf:me/mine").read_bytes() == data
    server.files["/api/models/me/other"] = json.dumps({"siblings": [{"rfilename": "x.gguf"}]}).encode()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor a diffusers pipeline; it holds: x\.gguf"):
        names.resolve_model("hf:me/other")


def test_offline_says_so_and_asks_nothing(server, monkeypatch, tmp_path):
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    for name in ("openai/cd_imagenet64_l2", "hf:me/mine"):
        with pytest.raises(OfflineError, match="CMTOOL_OFFLINE"):
            names.resolve_model(name)
    assert server.requests == []


def test_names_are_resolved_in_order_and_wrong_ones_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m.safetensors", {"a": torch.zeros(1)}, {"kind": "consistency"})
    assert names.resolve_model("m.safetensors").name == "m.safetensors"
    with pytest.raises(
        UserError, match=r"unknown model 'openai/cd_imagenet64_l3'.* Did you mean openai/cd_imagenet64_l2\?"
    ):
        names.resolve_model("openai/cd_imagenet64_l3")
    with pytest.raises(UserError, match="no hub name"):
        names.resolve_model("hf:../..")
    with pytest.raises(CheckpointError, match=r"there is no model at here/m\.pt"):
        names.resolve_model("here/m.pt")


def test_the_table_of_published_models():
    table = known.PUBLISHED
    assert len(table) == 12
    assert {name.split("_")[0] for name in table} == {"openai/edm", "openai/cd", "openai/ct"}
    assert table["openai/ct_bedroom256"].parameters == 526_304_771
    twos = {name: entry.times["2"][1] for name, entry in table.items() if "2" in entry.times}
    expected = {
        "cd_imagenet64_l2": 1.382368, "cd_imagenet64_lpips": 1.382368, "ct_imagenet64": 1.912844,
        "cd_bedroom256_lpips": 4.365562, "cd_bedroom256_l2": 3.519699, "ct_bedroom256": 3.991219, "ct_cat256": 5.248503,
    }  # fmt: skip
    assert {name.removeprefix("openai/"): pytest.approx(value, abs=2e-6) for name, value in twos.items()} == expected
    assert table["openai/cd_cat256_lpips"].fid == {1: 11.0, 2: 8.84}
    assert all(entry.url == f"{known.OPENAI}/{entry.file}" for entry in table.values())
