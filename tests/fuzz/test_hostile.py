"""Files made to hurt, one by one: what random changes of good files would hardly ever come to."""

from __future__ import annotations

import base64
import json
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import pytest

from cmtool.checkpoint import read_header, save_model
from cmtool.config.load import resolve
from cmtool.config.toml import parse_value
from cmtool.data.listing import list_folder
from cmtool.errors import CheckpointError, ConfigError, DataError, UserError
from cmtool.evaluation.samples import open_images
from cmtool.reporting.pictures import grid_pictures
from cmtool.studio.work import open_uri
from tests.cli.tiny import write_model
from tests.fuzz import examples


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a little of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": 7},
        {"kind": ["consistency"]},
        {"network": 7},
        {"process": []},
        {"data": {"resolution": "8"}},
        {"data": {"resolution": 8, "channels": 1, "class_names": [["a"]]}},
        {"data": {"resolution": 8, "channels": 1, "class_names": "ab"}},
        {"step": "\x1b[2J"},
        {"step": True},
        {"recipe": "ct"},
        {"sample": 5},
        {"edit": []},
        {"times": [1, 2]},
        {"times": {"2": {"a": 2}}},
        {"times": {"2": "80"}},
        {"times": {"x": [80.0]}},
        {"times": {"1": [float("nan")]}},
        {"times": {"1": [float("inf")]}},
        {"times": {"1": [-80.0]}},
        {"times": {"1": [80.0] * 10_000}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_headers_of_the_wrong_form_are_refused_where_they_are_read(tmp_path, changes):
    model = write_model(tmp_path)
    header = read_header(model)
    save_model(tmp_path / "bad.safetensors", {}, header | changes)
    with pytest.raises(CheckpointError, match="in its header"):
        read_header(tmp_path / "bad.safetensors")


def test_a_file_of_no_kind_is_no_model(cmtool):
    save_model(Path("m.safetensors"), {}, {"network": {}})
    done = cmtool("sample", "--model", "m.safetensors", "--num", 1)
    assert done.code == 1 and "no known kind" in done.err and "should not happen" not in done.err


@pytest.mark.parametrize("lacks", [{"network": {}}, {"process": None}, {"data": {}}, {"data": {"resolution": 8}}])
def test_a_model_that_lacks_what_running_it_needs_is_named(cmtool, tmp_path, lacks):
    save_model(tmp_path / "m.safetensors", {}, read_header(write_model(tmp_path)) | lacks)
    for words in (("sample", "--num", 1), ("interpolate",), ("studio",)):
        done = cmtool(*words, "--model", tmp_path / "m.safetensors")
        assert done.code == 1 and "no whole model" in done.err, done.err


def test_names_in_a_header_steer_no_terminal(cmtool, tmp_path):
    header = read_header(write_model(tmp_path))
    save_model(tmp_path / "m.safetensors", {}, header | {"preset": "\x1b[2Jx"})
    done = cmtool("info", tmp_path / "m.safetensors")
    assert done.code == 0 and "\\x1b[2Jx" in done.out and "\x1b" not in done.out


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        ".".join("a" * 5000) + " = 1",
        "a = [" + "1," * 600_000 + "]",
        "a = " + "[" * 60 + "]" * 60,
    ],
)
def test_presets_made_to_hurt_are_one_sentence(tmp_path, text):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"nested too deeply|larger than 1 MB|not valid TOML"):
        resolve(str(tmp_path / "p.toml"), recipe="ct")


def test_a_value_nested_too_deeply_is_a_word():
    assert parse_value("[" * 100_000) == "[" * 100_000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_pipes_and_devices_among_images_are_passed_over(tmp_path):
    (tmp_path / "b.png").write_bytes(examples.image("PNG"))
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(".")
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(list_folder(tmp_path)), daemon=True)
    reader.start()
    reader.join(20)
    [listing] = found
    assert listing.images == ["b.png"]
    assert listing.skipped == {"no plain file": 2, "a link to a folder around it": 1}


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_an_image_that_claims_gigapixels_is_refused_as_samples(tmp_path, form):
    path = tmp_path / ("s.zip" if form == "zip" else "s")
    if form == "zip":
        path.write_bytes(examples.zipped({"a.png": png_of(60_000, 60_000)}))
    else:
        path.mkdir()
        (path / "a.png").write_bytes(png_of(60_000, 60_000))
    with pytest.raises(DataError, match="100 megapixels"):
        open_images(path)


def test_a_sample_grid_that_claims_gigapixels_is_left_out_of_the_report(tmp_path):
    (tmp_path / "step-1.png").write_bytes(png_of(60_000, 60_000))
    (tmp_path / "step-2.png").write_bytes(examples.image("PNG"))
    assert [step for step, _ in grid_pictures([(n, tmp_path / f"step-{n}.png") for n in (1, 2)])] == [2]


def test_samples_that_expand_like_a_bomb_are_refused(tmp_path):
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (16777216, 8, 8, 1), }".ljust(117) + b"\n"
    with (
        zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("arr_0.npy", "w") as out,
    ):
        out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + head)
        for _ in range(256):
            out.write(bytes(1 << 22))
    with pytest.raises(DataError, match="decompression bomb"):
        open_images(tmp_path / "s.npz")


def test_the_studio_refuses_a_picture_that_claims_gigapixels():
    text = "data:image/png;base64," + base64.b64encode(png_of(60_000, 60_000)).decode()
    with pytest.raises(UserError, match="is no picture"):
        open_uri(text, 8, "the picture")
