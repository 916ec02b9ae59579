"""Names of published models: fetched once from a server on this machine, resumed, verified, converted, kept."""

import base64
import hashlib
import http.server
import json
import threading

import pytest
import torch

from cmtool.checkpoint import load_tensors, read_header, save_model
from cmtool.errors import CheckpointError, OfflineError, UserError
from cmtool.interop import fetch, known, names
from tests.interop import foreign


class Server:
    """Serves bytes by path with ranges; can break off, change its file, or lie about its hash."""

    def __init__(self):
        self.files, self.requests = {}, []
        self.break_after, self.ranges, self.md5, self.tag = None, True, True, "v1"
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, request):
        path = request.path.partition("?")[0]
        asked = request.headers.get("Range")
        self.requests.append((path, asked))
        if path not in self.files:
            request.send_error(404)
            return
        data, start = self.files[path], 0
        if asked and self.ranges and request.headers.get("If-Range") == f'"{self.tag}"':
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(data) > 0 and asked:
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{self.tag}"')
        request.send_header("Content-Length", str(len(data) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        elif self.md5:
            digest = hashlib.md5(data).digest() if self.md5 is True else self.md5
            request.send_header("Content-MD5", base64.b64encode(digest).decode())
        request.end_headers()
        stop = len(data) if self.break_after is None else min(len(data), start + self.break_after)
        request.wfile.write(data[start:stop])


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = Server()
    monkeypatch.setenv("CMTOOL_OFFLINE", "0")
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CMTOOL_MIRROR", made.url)
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    yield made
    made.http.shutdown()


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_broken_download_is_resumed_where_it_stopped(server, tmp_path):
    data = bytes(range(256)) * 40
    server.files["/f.bin"], server.break_after = data, 4000
    target, seen = tmp_path / "f.bin", []
    with pytest.raises(UserError, match=r"stopped after 4 kB of 10\.2 kB") as caught:
        fetch.download(f"{server.url}/f.bin", target)
    assert "resume" in caught.value.hint
    assert not target.exists()
    server.break_after = None
    fetch.download(f"{server.url}/f.bin", target, progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == data
    assert [asked for _, asked in server.requests] == [None, "bytes=4000-"]
    assert seen[-1] == (len(data), len(data))
    assert names_in(tmp_path) == ["f.bin"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.files["/f.bin"], server.break_after = b"a" * 5000, 2000
    with pytest.raises(UserError, match="stopped"):
        fetch.download(f"{server.url}/f.bin", tmp_path / "f.bin")
    server.files["/f.bin"], server.break_after, server.tag = b"b" * 5000, None, "v2"
    fetch.download(f"{server.url}/f.bin", tmp_path / "f.bin")
    assert (tmp_path / "f.bin").read_bytes() == b"b" * 5000


@pytest.mark.parametrize(
    ("size", "sha256", "md5", "reason"),
    [
        (99, None, True, "it has 100 bytes instead of 99"),
        (None, "0" * 64, True, "its SHA-256 is another"),
        (None, None, b"0" * 16, "its MD5 is another"),
    ],
)
def test_a_file_of_wrong_length_or_hash_is_removed(server, tmp_path, size, sha256, md5, reason):
    server.files["/f.bin"], server.md5 = b"x" * 100, md5
    with pytest.raises(UserError, match=reason):
        fetch.download(f"{server.url}/f.bin", tmp_path / "f.bin", size=size, sha256=sha256)
    assert names_in(tmp_path) == []


def test_a_whole_part_is_taken_and_a_right_hash_passes(server, tmp_path):
    data = b"y" * 100
    server.files["/f.bin"] = data
    (tmp_path / "f.bin.part").write_bytes(data)
    (tmp_path / "f.bin.json").write_text(json.dumps({"url": f"{server.url}/f.bin", "tag": '"v1"', "md5": None}))
    fetch.download(f"{server.url}/f.bin", tmp_path / "f.bin", sha256=hashlib.sha256(data).hexdigest())
    assert (tmp_path / "f.bin").read_bytes() == data


def test_missing_files_and_silent_servers(server, tmp_path):
    with pytest.raises(UserError, match="answered 404"):
        fetch.download(f"{server.url}/none", tmp_path / "none")
    with pytest.raises(OfflineError, match="could not be fetched"):
        fetch.download("http://127.0.0.1:9/f", tmp_path / "f")
    assert names_in(tmp_path) == []


def test_two_processes_do_not_write_into_one_part(server, tmp_path):
    server.files["/f.bin"] = b"x" * 100
    with (
        fetch._alone(tmp_path / "f.bin.part"),
        pytest.raises(UserError, match=r"f\.bin is being fetched by another process"),
    ):
        fetch.download(f"{server.url}/f.bin", tmp_path / "f.bin")
    fetch.download(f"{server.url}/f.bin", tmp_path / "f.bin")
    assert names_in(tmp_path) == ["f.bin"]


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
