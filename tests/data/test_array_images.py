"""Arrays of images: axes, values and labels are what the file says, and never a guess from a first element."""

import numpy as np
import pytest

from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset
from cmtool.data.array_images import layout
from cmtool.errors import DataError
from cmtool.evaluation.samples import open_images


def pixels(count=6, side=8, channels=3):
    return np.random.default_rng(1).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def both(path, **kw):
    """The pixels as training and as eval read them; they must agree."""
    table = DataConfig(source="npz", path=str(path), resolution=8, channels=3, **kw)
    trained = load_dataset(table).images.permute(0, 2, 3, 1).numpy()
    judged = open_images(path).all()
    assert np.array_equal(trained, np.broadcast_to(judged, trained.shape))
    return trained


@pytest.mark.parametrize("key", ["arr_0", "images", "data", "x", "samples"])
@pytest.mark.parametrize("kind", ["NHWC", "NCHW", "flat"])
def test_layouts_and_names_are_the_same_in_training_and_eval(tmp_path, key, kind):
    images = pixels()
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    stored = {"NHWC": images, "NCHW": planar, "flat": planar.reshape(6, -1)}[kind]
    np.savez(tmp_path / "x.npz", **{key: stored})
    assert np.array_equal(both(tmp_path / "x.npz"), images)
    notes = open_images(tmp_path / "x.npz").notes
    assert bool(notes) == (kind == "flat") and all("a plane of red" in note for note in notes)


@pytest.mark.parametrize(
    ("shape", "kind", "image"),
    [
        ((5, 8, 8, 3), "NHWC", (8, 8, 3)),
        ((5, 3, 8, 8), "NCHW", (8, 8, 3)),
        ((5, 8, 6), "NHW", (8, 6, 1)),
        ((5, 4, 4, 3), "NHWC", (4, 4, 3)),
        ((5, 3, 4, 4), "NCHW", (4, 4, 3)),
        ((5, 48), "flat", (4, 4, 3)),
    ],
)
def test_axes_by_hand(shape, kind, image, tmp_path):
    assert layout(shape, tmp_path) == (kind, image)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((5, 3, 32, 3), "can be read as"),
        ((5, 4, 4, 4), "can be read as"),
        ((64, 64, 3), "one picture in color or 64 gray ones"),
        ((5, 8, 8, 2), "no batch of images"),
        ((5, 2, 2, 2, 3), "no batch of images"),
        ((7,), "no batch of images"),
    ],
)
def test_axes_that_fit_two_ways_are_refused(shape, says, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.full(shape, 9, np.uint8))
    for reader in (both, open_images):
        with pytest.raises(DataError, match=says):
            reader(tmp_path / "x.npz")


@pytest.mark.parametrize("low", [0, -0.02, -0.4])
def test_floats_whose_range_is_not_plain_are_refused(tmp_path, low):
    values = np.full((2, 8, 8, 3), 0.5, np.float32)
    values[1, 0, 0, 0] = low
    np.savez(tmp_path / "x.npz", arr_0=values)
    for reader in (both, open_images):
        with pytest.raises(DataError, match=r"read in \[0, 1\] and in \[-1, 1\]") as caught:
            reader(tmp_path / "x.npz")
        assert "'range'" in caught.value.hint


def test_a_range_that_is_named_is_used(tmp_path):
    images = pixels()
    unit = images.astype(np.float32) / 255
    np.savez(tmp_path / "unit.npz", arr_0=unit, range=[0, 1])
    np.savez(tmp_path / "signed.npz", arr_0=unit * 2 - 1)
    np.savez(tmp_path / "said.npz", arr_0=unit * 2 - 1, range=np.float32([-1, 1]))
    np.savez(tmp_path / "deep.npz", arr_0=images.astype(np.uint16) * 257, range=[0, 65535])
    for name in ("unit", "signed", "said", "deep"):
        assert np.array_equal(both(tmp_path / f"{name}.npz"), images)
    bright = np.full((2, 8, 8, 3), 0.5, np.float32)
    np.savez(tmp_path / "bright.npz", arr_0=bright, range=[-1, 1])
    assert (both(tmp_path / "bright.npz") == 191).all()


def test_the_range_is_that_of_all_rows(tmp_path):
    """The first 256 rows alone would leave it open."""
    values = np.full((600, 4, 4, 3), 0.5, np.float32)
    values[599] = -1
    np.savez(tmp_path / "x.npz", arr_0=values)
    assert open_images(tmp_path / "x.npz").all()[599].max() == 0
    values[599] = 1.5
    np.savez(tmp_path / "x.npz", arr_0=values)
    with pytest.raises(DataError, match=r"must lie in \[-1, 1\]"):
        open_images(tmp_path / "x.npz").all()


@pytest.mark.parametrize("bad", [[1, 0], [0], [0, np.nan], ["a", "b"]])
def test_a_range_that_is_none(tmp_path, bad):
    np.savez(tmp_path / "x.npz", arr_0=pixels(), range=np.array(bad))
    with pytest.raises(DataError, match="'range' must"):
        open_images(tmp_path / "x.npz")


def test_bytes_of_a_mask_are_not_taken_for_black(tmp_path):
    masks = pixels() >> 7
    np.savez(tmp_path / "x.npz", arr_0=masks)
    for reader in (both, open_images):
        with pytest.raises(DataError, match="only the bytes 0 and 1"):
            reader(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", arr_0=masks, range=[0, 1])
    assert set(np.unique(both(tmp_path / "x.npz"))) == {0, 255}


def test_two_arrays_of_images_or_labels_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=pixels(), samples=pixels())
    np.savez(tmp_path / "y.npz", images=pixels(), labels=np.zeros(6, int), y=np.ones(6, int))
    for reader in (both, open_images):
        with pytest.raises(DataError, match="several arrays of images: images, samples"):
            reader(tmp_path / "x.npz")
        with pytest.raises(DataError, match="several arrays of labels: labels, y"):
            reader(tmp_path / "y.npz")


def test_labels_are_whole_numbers(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=pixels(), arr_1=np.array([0, 1, 2, 0, 1, 2.0]))
    assert open_images(tmp_path / "x.npz").labels.tolist() == [0, 1, 2, 0, 1, 2]
    np.savez(tmp_path / "x.npz", arr_0=pixels(), arr_1=np.full(6, 0.7))
    for reader in (both, open_images):
        with pytest.raises(DataError, match="class numbers are expected"):
            reader(tmp_path / "x.npz")


def test_only_image_nets_own_batches_number_classes_from_one(tmp_path):
    labels = np.array([0, 1, 2, 0, 1, 2])
    for name, given, key in (
        ("val_data.npz", labels, "data"),
        ("val_data_2.npz", labels + 1, "data"),
        ("a.npz", labels, "x"),
    ):
        np.savez(tmp_path / name, **{key: pixels()}, labels=given)
        table = DataConfig(source="npz", path=str(tmp_path / name), resolution=8, labels=True)
        assert load_dataset(table).labels.tolist() == labels.tolist()
