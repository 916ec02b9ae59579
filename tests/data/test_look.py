"""The quick look at pictures before a plan: counts, sizes, colors, classes, duplicates, without decoding."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cmtool.data import look as looks
from cmtool.data.look import Look, look
from cmtool.errors import DataError


def save(path, size=(8, 8), mode="RGB", seed=0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **more)


def test_a_mixed_folder(tmp_path):
    for index in range(6):
        save(tmp_path / f"cats/{index}.png", (20, 10), seed=index)
    save(tmp_path / "dogs/gray.png", (9, 9), "L", seed=7)
    save(tmp_path / "dogs/clear.png", (9, 9), "RGBA", seed=8)
    save(tmp_path / "dogs/big.png", (30, 40), seed=9)
    (tmp_path / "dogs/copy.png").write_bytes((tmp_path / "cats/3.png").read_bytes())
    (tmp_path / "dogs/broken.png").write_bytes(b"no picture")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "dogs/turned.jpg", (10, 30), seed=10, exif=exif)
    found = look(str(tmp_path))
    assert (found.count, found.looked, found.usable) == (12, 12, 11)
    assert found.sizes == Counter({(20, 10): 7, (9, 9): 2, (30, 40): 1, (30, 10): 1})
    assert (found.gray, found.color, found.transparent, found.duplicates) == (1, 10, 1, 1)
    assert found.classes == {"cats": 6, "dogs": 6}
    assert found.unusable == {"unreadable": 1}
    assert found.smaller_than(10) == 2 and found.oblong == 9


def test_files_of_one_length_and_different_content_are_no_duplicates(tmp_path):
    for name, text in (("a", b"1" * 50), ("b", b"2" * 50), ("c", b"1" * 50), ("d", b"1" * 50), ("e", b"1" * 49)):
        (tmp_path / name).write_bytes(text)
    same = looks._Duplicates()
    assert [same.seen(tmp_path / name) for name in "abcde"] == [False, False, True, True, False]
    assert [same.seen(text) for text in (b"x", b"y", b"x")] == [False, False, True]


def test_arrays_built_in_and_packed_sets(tmp_path, workdir, cmtool):
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 1), dtype=np.uint8)
    images[7] = images[3]
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(20) % 4)
    found = look(str(tmp_path / "a.npz"))
    assert (found.count, found.gray, found.duplicates) == (20, 20, 1) and found.side() == 12
    assert found.classes == {"0": 5, "1": 5, "2": 5, "3": 5}
    digits = look("digits")
    assert (digits.count, digits.side(), len(digits.classes)) == (1797, 8, 10)
    assert cmtool("data", "make", tmp_path / "a.npz", "--resolution", 8, "--out", "p.cmdata").code == 0
    packed = look("p.cmdata")
    assert (packed.count, packed.side(), packed.color, packed.duplicates) == (20, 8, 20, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "holds no images"),
        (lambda folder: (folder / "a.png").write_bytes(b"x"), "the only picture in .* cannot be read"),
        (lambda folder: (folder / "a.heic").write_bytes(b"x"), "holds no images"),
    ],
)
def test_nothing_that_can_be_read(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(DataError, match=words):
        look(str(tmp_path))


def test_places_and_points_are_refused():
    with pytest.raises(DataError, match="there is no data at"):
        look("no/where")
    with pytest.raises(DataError, match="points and no pictures"):
        look("toy2d")


def test_a_giant_picture_counts_as_unusable(tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "MAX_PIXELS", 99)
    save(tmp_path / "small.png", (9, 9))
    save(tmp_path / "giant.png", (10, 11))
    found = look(str(tmp_path))
    assert found.unusable == {"too large": 1} and found.usable == 1


def test_the_side_that_a_share_of_the_pictures_falls_below():
    many = Look("x", 100, 100, Counter({(10, 99): 20, (50, 60): 70, (500, 400): 10}))
    assert many.side(0.1) == 10 and many.side(0.5) == 50 and many.side(0.99) == 400
    assert Look("x", 1, 1, Counter({(7, 9): 1})).side() == 7
