"""Sets of images: every container, and everything that can be wrong with one."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset, save_folder, save_npz
from cmtool.errors import DataError
from cmtool.evaluation.samples import from_array, from_dataset, open_images


def pictures(count=7, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_pixels_in_every_container_have_one_fingerprint(tmp_path, channels):
    images = pictures(channels=channels)
    save_npz(tmp_path / "a.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    save_folder(images, tmp_path / "folder")
    zipped(tmp_path / "folder", tmp_path / "b.zip")
    places = [tmp_path / name for name in ("a.npz", "packed.npz", "folder", "b.zip")]
    sets = [open_images(place) for place in places] + [from_array(images, "memory")]
    for found in sets:
        assert (found.count, found.shape) == (7, (8, 8, channels))
        assert np.array_equal(found.all(), images)
        assert np.array_equal(np.concatenate(list(found.batches(3))), images)
    assert len({found.fingerprint for found in sets}) == 1
    assert from_array(images[::-1].copy(), "reversed").fingerprint != sets[0].fingerprint
    assert sets[0].first(6).fingerprint != sets[0].fingerprint


def test_labels_meta_and_the_first_few(tmp_path):
    save_npz(tmp_path / "a.npz", pictures(), np.arange(7), {"nfe": 2, "times": [80.0, 0.8]})
    found = open_images(tmp_path / "a.npz")
    assert found.labels.tolist() == list(range(7))
    assert found.meta["nfe"] == 2
    few = found.first(3)
    assert (few.count, few.labels.tolist()) == (3, [0, 1, 2])
    assert sum(len(batch) for batch in few.batches(2)) == 3
    with pytest.raises(DataError, match="holds 7 images; 8 are asked for"):
        found.first(8)


def class_files(root, order, side=8):
    """One image a name "class/number.png"; its first pixel says its class."""
    for number, name in enumerate(order):
        image = pictures(1, side, seed=number)[0]
        image[0, 0] = "abcd".index(name[0])
        save_folder(image[None], root / name[0], start=number)
    return root


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_some_of_a_class_folder_come_from_every_class(tmp_path, form):
    root = class_files(tmp_path / "set", "a" * 40 + "b" * 20 + "c" * 20)
    place = root if form == "folder" else zipped(root, tmp_path / "set.zip")
    some = open_images(place).some(20)
    classes = some.all()[:, 0, 0, 0].tolist()
    assert [classes.count(rank) for rank in range(3)] == [10, 5, 5] and some.groups.tolist() == classes
    assert some.notes == ("20 of 80 images, spread evenly over its 3 classes",)
    assert some.fingerprint == open_images(place).some(20).fingerprint
    assert len({image.tobytes() for image in some.all()}) == 20
    assert sum(len(batch) for batch in some.batches(7)) == 20 and len(next(some.batches(7))) == 7
    assert open_images(place).some(80).notes == ()
    with pytest.raises(DataError, match="holds 80 images; 81 are asked for"):
        open_images(place).some(81)


def test_some_of_a_set_that_cycles_meet_every_phase(tmp_path):
    images = pictures(1000)
    images[:, 0, 0, 0] = np.arange(1000) % 10
    some = from_array(images, "memory").some(100)
    found = some.all()[:, 0, 0, 0]
    assert len(np.unique(found)) == 10 and some.notes == ("100 of 1,000 images, spread evenly over its files",)
    rows = [int(np.flatnonzero((images == image).all((1, 2, 3)))[0]) for image in some.all()]
    assert [row // 10 for row in rows] == list(range(100))  # one of every ten


def test_samples_of_consecutive_seeds_are_taken_from_the_first(tmp_path):
    save_npz(tmp_path / "a.npz", pictures(50), meta={"seeds": "0-49"})
    assert np.array_equal(open_images(tmp_path / "a.npz").some(9).all(), pictures(50)[:9])


def test_points_stay_floats(tmp_path):
    points = np.random.default_rng(0).standard_normal((9, 2, 1, 1)).astype(np.float32) * 3
    np.savez(tmp_path / "points.npz", arr_0=points)
    found = open_images(tmp_path / "points.npz")
    assert found.points and np.array_equal(found.all(), points)


def test_a_data_set_is_a_set():
    data = load_dataset(DataConfig(source="digits", resolution=8, channels=1, labels=True))
    found = from_dataset(data, "digits")
    assert (found.count, found.shape) == (1797, (8, 8, 1))
    assert np.array_equal(found.all()[:, :, :, 0], data.images[:, 0].numpy())
    assert found.labels[:10].tolist() == list(range(10))


def test_floats_in_range_are_rounded(tmp_path):
    images = pictures()
    np.savez(tmp_path / "floats.npz", arr_0=images.astype(np.float32) / 127.5 - 1)
    assert np.array_equal(open_images(tmp_path / "floats.npz").all(), images)


def write(path, kind):
    """Write something that is no set of samples."""
    images = pictures()
    if kind == "missing":
        return
    if kind == "empty file":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "cut off":
        save_npz(path, pictures(50, 32))
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "objects":
        np.savez(path, arr_0=np.array([{"a": 1}, None], dtype=object))
    elif kind == "object labels":
        np.savez(path, arr_0=images, arr_1=np.array([{"a": 1}] * 7, dtype=object))
    else:
        arrays = {
            "no images by name": {"weights": images},
            "no images": {"arr_0": images[:0]},
            "two channels": {"arr_0": images[..., :2]},
            "no squares": {"arr_0": images.reshape(7, -1)[:, 1:]},
            "int32": {"arr_0": images.astype(np.int32)},
            "floats 0..255": {"arr_0": images.astype(np.float32)},
            "NaN": {"arr_0": np.full((2, 8, 8, 3), np.nan, np.float32)},
            "labels of another length": {"arr_0": images, "arr_1": np.arange(3)},
            "fortran": {"arr_0": np.asfortranarray(images)},
            "meta that is no JSON": {"arr_0": images, "meta": np.array("{")},
        }
        np.savez(path, **arrays[kind])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there are no samples"),
        ("empty file", "damaged or is no npz"),
        ("text", "is no npz"),
        ("cut off", "damaged"),
        ("objects", "Python objects, which are never loaded"),
        ("object labels", "Python objects, which are never loaded"),
        ("no images by name", "has no images: its arrays are weights"),
        ("no images", "holds no images"),
        ("two channels", r"uint8 \(N, H, W, C\)"),
        ("no squares", "no square RGB images"),
        ("int32", "uint8, or floats"),
        ("floats 0..255", r"float images must lie in \[-1, 1\]"),
        ("NaN", "not finite"),
        ("labels of another length", r"labels of shape \(3,\) for 7 images"),
        ("fortran", "Fortran order"),
        ("meta that is no JSON", "damaged"),
    ],
)
def test_npz_that_is_no_sample_set(tmp_path, kind, words):
    write(tmp_path / "bad.npz", kind)
    with pytest.raises(DataError, match=words):
        open_images(tmp_path / "bad.npz").all()


def test_folders_and_zips_that_are_no_sample_set(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_images(tmp_path / "empty")
    save_folder(pictures(2), tmp_path / "mixed")
    save_folder(pictures(2, side=9), tmp_path / "mixed", start=2)
    with pytest.raises(DataError, match=r"8 x 8 and .* is 9 x 9; all must be of one size"):
        open_images(tmp_path / "mixed").all()
    (tmp_path / "mixed" / "000000.png").write_bytes(b"no image")
    (tmp_path / "mixed" / "000001.png").write_bytes(b"no image")
    found = open_images(tmp_path / "mixed")
    assert found.shape == (9, 9, 3) and found.notes == ("skipped 2 of 4 files: 2 unreadable",)
    for name in ("000002.png", "000003.png"):
        (tmp_path / "mixed" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no usable image is left of 4 files .* The first: 000000\.png"):
        open_images(tmp_path / "mixed")
    with pytest.raises(DataError, match="a single image"):
        open_images(tmp_path / "mixed" / "000001.png")
    broken = zipped(tmp_path / "mixed", tmp_path / "broken.zip")
    broken.write_bytes(broken.read_bytes()[:40] + b"\0" * 40 + broken.read_bytes()[80:])
    with pytest.raises(DataError):
        open_images(broken).all()
    (tmp_path / "note.txt").write_text(json.dumps({}))
    with pytest.raises(DataError, match="no zip of images"):
        open_images(tmp_path / "note.txt")


@pytest.mark.parametrize("size", [7, 50, 64])
def test_a_full_pass_leaves_the_fingerprint_behind(tmp_path, size):
    """Features are taken in one pass over the file; what names its content is found on the way."""
    save_npz(tmp_path / "a.npz", pictures(50))
    whole = open_images(tmp_path / "a.npz")
    passes = []
    found = replace(whole, read=lambda size: passes.append(size) or whole.read(size))
    assert len(np.concatenate(list(found.batches(size)))) == 50
    assert found.fingerprint == whole.fingerprint and passes == [size]
    part = replace(whole)
    next(part.batches(7))
    assert part.fingerprint == whole.fingerprint and part.first(9).fingerprint != whole.fingerprint


def test_a_sample_file_is_opened_once(tmp_path, monkeypatch):
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda file, *rest: opened.append(file) or real(file, *rest))
    save_npz(tmp_path / "a.npz", pictures(5), np.arange(5), {"nfe": 2})
    opened.clear()
    found = open_images(tmp_path / "a.npz")
    assert found.fingerprint and len(found.all()) == 5 and found.labels is not None and found.meta
    assert opened == [tmp_path / "a.npz"]
