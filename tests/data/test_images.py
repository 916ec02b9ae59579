import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmtool.data.images import (
    compose_grid,
    from_uint8,
    npz_writer,
    read_png_text,
    save_folder,
    save_grid,
    save_npz,
    save_png,
    save_points,
    save_scatter,
    to_nhwc,
    to_uint8,
)
from cmtool.errors import DataError, UserError

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_rounding_returns_every_byte_and_truncation_loses_63():
    assert torch.equal(to_uint8(from_uint8(LEVELS)), LEVELS)
    lower = LEVELS.int() - to_uint8(from_uint8(LEVELS), "truncate").int()
    assert lower.max() == 1 and int(lower.sum()) == 63


@pytest.mark.parametrize(
    ("value", "rounded", "truncated"), [(-1, 0, 0), (1, 255, 255), (0, 128, 127), (-3, 0, 0), (9, 255, 255)]
)
def test_known_bytes(value, rounded, truncated):
    x = torch.tensor([float(value)])
    assert to_uint8(x).item() == rounded and to_uint8(x, "truncate").item() == truncated


@settings(max_examples=50, deadline=None)
@given(st.floats(-2, 2))
def test_rounding_is_edm_rule_in_every_precision(value):
    expected = np.clip(np.floor(np.float32(value) * np.float32(127.5) + np.float32(128)), 0, 255)
    assert to_uint8(torch.tensor([value], dtype=torch.float32)).item() == expected
    half = torch.tensor([value], dtype=torch.bfloat16)
    assert to_uint8(half).item() == to_uint8(half.float()).item()


def test_quantizer_refuses_what_has_no_byte():
    with pytest.raises(DataError, match="1 of 2 pixel values"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    with pytest.raises(TypeError):
        to_uint8(LEVELS)
    with pytest.raises(TypeError):
        from_uint8(torch.zeros(1))
    with pytest.raises(DataError, match="round or truncate"):
        to_uint8(torch.zeros(1), "ceil")
    assert to_uint8(torch.tensor([float("inf"), -float("inf")])).tolist() == [255, 0]


def test_layout_is_told_by_type():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    array = to_nhwc(images)
    assert array.shape == (2, 4, 5, 3) and np.array_equal(to_nhwc(array), array)
    assert np.array_equal(to_nhwc(from_uint8(images)), array)
    with pytest.raises(DataError, match="no batch of uint8 images"):
        to_nhwc(torch.zeros(3, 2, 1, 1))


@pytest.mark.parametrize(("side", "factor"), [(8, 8), (16, 4), (32, 2), (64, 1), (256, 1)])
def test_grid_places_and_enlarges(side, factor):
    images = torch.randint(0, 256, (5, 1, side, side), dtype=torch.uint8)
    grid = compose_grid(images)
    pitch = side * factor + 2
    assert grid.shape == (2 * pitch + 2, 3 * pitch + 2, 1)
    tile = grid[2 + pitch : 2 + pitch + side * factor : factor, 2 + pitch : 2 + pitch + side * factor : factor, 0]
    assert np.array_equal(tile, images[4, 0].numpy())


def test_grid_columns_text_and_limits(tmp_path):
    path = save_grid(
        torch.zeros(6, 3, 8, 8), tmp_path / "new" / "g.png", columns=6, text={"seed": [1, 2], "model": "é"}
    )
    assert Image.open(path).size == (6 * 66 + 2, 68)
    assert read_png_text(path) == {"seed": "[1, 2]", "model": "é"}
    with pytest.raises(DataError, match="at least one"):
        compose_grid(torch.zeros(0, 3, 8, 8))
    with pytest.raises(DataError, match="few programs open"):
        compose_grid(np.zeros((600, 1, 64, 1), dtype=np.uint8), columns=600)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_and_folder_keep_the_bytes(tmp_path, channels):
    images = torch.randint(0, 256, (3, channels, 6, 6), dtype=torch.uint8)
    save_folder(images, tmp_path / "f", start=40, text={"nfe": 1})
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["000040.png", "000041.png", "000042.png"]
    read = np.asarray(Image.open(tmp_path / "f" / "000041.png")).reshape(6, 6, channels)
    assert np.array_equal(read, images[1].permute(1, 2, 0).numpy())
    save_png(images[0], tmp_path / "one.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")).reshape(6, 6, channels), to_nhwc(images)[0])


def test_npz_is_what_evaluators_stream(tmp_path):
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    save_npz(tmp_path / "s.npz", images, torch.tensor([3, 1, 2, 0]), {"nfe": 2, "times": [80.0, 0.8]})
    with np.load(tmp_path / "s.npz") as held:
        assert held["arr_0"].dtype == np.uint8 and np.array_equal(held["arr_0"], to_nhwc(images))
        assert held["arr_1"].tolist() == [3, 1, 2, 0] and held["arr_1"].dtype == np.int64
        assert json.loads(str(held["meta"])) == {"nfe": 2, "times": [80.0, 0.8]}
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        assert {i.filename: i.compress_type for i in archive.infolist()} == {
            "arr_0.npy": 0,
            "arr_1.npy": 0,
            "meta.npy": 0,
        }
        assert archive.read("arr_0.npy")[:8] == b"\x93NUMPY\x01\x00"


def test_npz_of_batches_equals_the_whole_and_is_all_or_nothing(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3), dtype=np.uint8)
    with npz_writer(tmp_path / "a.npz", images.shape) as writer:
        writer.append(images[:3])
        writer.append(images[3:])
    save_npz(tmp_path / "b.npz", images)
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], np.load(tmp_path / "b.npz")["arr_0"])
    with pytest.raises(ValueError, match="3 of 5"), npz_writer(tmp_path / "c.npz", images.shape) as writer:
        writer.append(images[:3])
    with pytest.raises(ValueError, match="does not fit"), npz_writer(tmp_path / "c.npz", images.shape) as writer:
        writer.append(images.astype(np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_points_stay_floats_and_are_drawn(tmp_path):
    points = torch.randn(30, 2, 1, 1)
    save_points(tmp_path / "p.npz", points, torch.zeros(30, dtype=torch.long), {"nfe": 1})
    assert np.array_equal(np.load(tmp_path / "p.npz")["arr_0"], points.numpy())
    path = save_scatter(points, tmp_path / "p.png", torch.zeros(30), reference=points[:5], text={"seed": 7})
    assert read_png_text(path)["seed"] == "7" and min(Image.open(path).size) >= 300


def test_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        save_png(torch.zeros(3, 4, 4), tmp_path / "file" / "x.png")

    def fail(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="disk is full"):
        save_png(torch.zeros(3, 4, 4), tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
