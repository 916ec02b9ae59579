import os
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.config.schema import DataConfig
from cmtool.data import describe, load_dataset
from cmtool.data import load as load_module
from cmtool.data.dataset import count_duplicates, fingerprint
from cmtool.errors import DataError


def config(path, **kw):
    return DataConfig(**{"source": "folder", "path": str(path), "resolution": 8, "labels": True, "holdout": 0.0, **kw})


class Told:
    """A Talk that remembers."""

    def __init__(self):
        self.said, self.moved = [], []

    def say(self, text):
        self.said.append(text)

    @contextmanager
    def progress(self, total, description=""):
        yield lambda advance=1, note="", completed=None: self.moved.append((description, total, completed))


def test_class_folders(class_folder):
    data = load_dataset(config(class_folder))
    assert data.class_names == ("cat", "dog", "owl") and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.summary["found"] == 7 and data.summary["used"] == 6 and data.summary["skipped"] == {"not an image": 1}
    assert data.summary["duplicates"] == 1 == count_duplicates(data.images)
    assert data.fingerprint == fingerprint(data.images, data.labels)
    assert describe(data) == [
        "folder of images: 6 images of 8 x 8 x 3",
        "3 classes, 2 to 2 images each",
        "1 exact duplicate among them (kept)",
        "skipped 1 of 7 files: 1 not an image",
    ]


def test_same_size_images_keep_their_bytes(class_folder, pixels):
    data = load_dataset(config(class_folder, resolution=12, labels=False))
    assert np.array_equal(data.images[1].permute(1, 2, 0).numpy(), pixels(1))
    assert data.labels is None and data.class_names is None


def test_second_start_reads_the_packed_copy_and_changes_are_seen(class_folder, monkeypatch, pixels):
    talk = Told()
    first = load_dataset(config(class_folder), talk)
    assert talk.said == ["packing 6 images into the cache; the next start reads that copy"]
    assert talk.moved == [("packing", 6, done) for done in range(1, 7)] and first.summary["path"] == str(class_folder)
    packs = []
    real = load_module.pack
    monkeypatch.setattr(load_module, "pack", lambda *a, **k: packs.append(1) or real(*a, **k))
    again = load_dataset(config(class_folder))
    assert not packs and torch.equal(first.images, again.images) and first.fingerprint == again.fingerprint
    load_dataset(config(class_folder, filter="edm"))
    Image.fromarray(pixels(9)).save(class_folder / "owl" / "9.png")
    assert len(load_dataset(config(class_folder))) == 7 and len(packs) == 2


def test_a_damaged_packed_copy_is_made_again(class_folder, tmp_path):
    first = load_dataset(config(class_folder)).images.clone()
    [copy] = (tmp_path / "cache" / "packed").iterdir()
    with open(copy, "r+b") as stream:
        stream.truncate(5000)
    assert torch.equal(load_dataset(config(class_folder)).images, first)


def test_prefix_labels_and_folders_give_the_same_classes(tmp_path, pixels):
    for index, name in enumerate(["n02_5.png", "n01_7.png", "n02_1.png", "n03_0_0.png"]):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(pixels(index)).save(tmp_path / "flat" / name)
        nested = tmp_path / "nested" / name[:3]
        nested.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "flat" / name, nested / name)
    flat = load_dataset(config(tmp_path / "flat", kind="prefix"))
    nested = load_dataset(config(tmp_path / "nested"))
    assert flat.class_names == nested.class_names == ("n01", "n02", "n03")
    assert flat.fingerprint == nested.fingerprint
    with pytest.raises(DataError, match="no class labels"):
        load_dataset(config(tmp_path / "flat"))
    with pytest.raises(DataError, match="Did you mean prefix"):
        load_dataset(config(tmp_path / "flat", kind="prefixes"))


def test_deeper_folders_belong_to_the_class_above(class_folder, pixels):
    (class_folder / "cat" / "kittens" / ".hidden").mkdir(parents=True)
    Image.fromarray(pixels(11)).save(class_folder / "cat" / "kittens" / "a.PNG")
    Image.fromarray(pixels(12)).save(class_folder / "cat" / "kittens" / ".hidden" / "b.png")
    os.symlink(class_folder, class_folder / "cat" / "loop")
    data = load_dataset(config(class_folder))
    assert torch.bincount(data.labels).tolist() == [3, 2, 2]


def test_small_and_broken_ones_are_counted(class_folder, pixels):
    Image.fromarray(pixels(20, 5, 40)).save(class_folder / "cat" / "thin.png")
    (class_folder / "dog" / "text.jpg").write_text("no")
    (class_folder / "dog" / "IMG_1.HEIC").write_text("no")
    whole = class_folder / "owl" / "cut.png"
    Image.fromarray(pixels(21, 64, 64)).save(whole)
    whole.write_bytes(whole.read_bytes()[:3000])
    data = load_dataset(config(class_folder))
    converted = "in a format to be converted first (HEIC, raw, ...)"
    assert data.summary["skipped"] == {"not an image": 1, "too small": 1, "unreadable": 2, converted: 1}
    assert len(load_dataset(config(class_folder, small="upscale"))) == 7


def test_nothing_left_is_refused_with_the_reasons(tmp_path, pixels):
    with pytest.raises(DataError, match="there is no data at"):
        load_dataset(config(tmp_path / "missing"))
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(DataError, match="holds no image"):
        load_dataset(config(root))
    (root / "a.txt").write_text("x")
    with pytest.raises(DataError, match="1 not an image"):
        load_dataset(config(root))
    Image.fromarray(pixels(0, 4, 4)).save(root / "a.png")
    with pytest.raises(DataError, match=r"1 too small.*The first: a.png: 4 x 4") as caught:
        load_dataset(config(root, labels=False))
    assert "upscale" in caught.value.hint
    assert not list((tmp_path / "cache" / "packed").iterdir())


def test_gray_and_size_and_class_limits(class_folder):
    assert load_dataset(config(class_folder, channels=1)).images.shape == (6, 1, 8, 8)
    some = load_dataset(config(class_folder, size=4))
    assert len(some) == 4 and some.num_classes == 3
    wider = load_dataset(config(class_folder, num_classes=5))
    assert wider.num_classes == 5 and "without any image: 3, 4" in describe(wider)
    with pytest.raises(DataError, match=r"3 classes, more than data\.num_classes = 2"):
        load_dataset(config(class_folder, num_classes=2))


def test_without_a_writable_cache_it_still_loads(class_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "file" / "cache"))
    data = load_dataset(config(class_folder))
    assert len(data) == 6 and data.images.float().mean() > 50


def test_short_disk_is_said_before_anything_is_written(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50))
    with pytest.raises(DataError, match=r"needs 1.15 kB in .*50 bytes are free"):
        load_dataset(config(class_folder))


def test_leftovers_of_killed_packings_are_swept(class_folder, tmp_path):
    folder = tmp_path / "cache" / "packed"
    folder.mkdir(parents=True)
    old, new = folder / ".a.tmp-1-0.cmdata", folder / ".b.tmp-2-0.cmdata"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    load_dataset(config(class_folder))
    assert not old.exists() and new.exists()
