"""Tar files and WebDataset shards: order, classes, and archives that are refused."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.config.schema import DataConfig
from cmtool.data.load import load_dataset
from cmtool.data.sources.sniff import open_source
from cmtool.errors import DataError


def picture(value, side=8):
    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(path, members):
    """Write {name: bytes, or as text the type of a member without content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = content.encode(), "elsewhere"
                content = b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def load(path, **more):
    return load_dataset(DataConfig(source="folder", path=str(path), resolution=8, **more))


def test_shards_in_order_with_their_classes_and_the_same_again(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    write(shards / "b-000001.tar", {"s2.png": picture(30), "s2.cls": b"0\n"})
    write(shards / "b-000000.tar", {"s1.png": picture(10), "s1.cls": b"2", "s0.png": picture(20),
                                    "s0.json": b'{"label": 1, "text": "x"}', "s0.txt": b"a caption"})  # fmt: skip
    data = load(shards, labels=True)
    assert data.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert data.labels.tolist() == [2, 1, 0] and data.num_classes == 3
    assert data.info.source == "2 tar shards" and data.info.skipped == {"not an image": 1}
    again = load(shards, labels=True)
    assert again.fingerprint == data.fingerprint and torch.equal(again.images, data.images)


def test_a_plain_tar_of_class_folders_is_what_the_folder_is(tmp_path):
    members = {f"all/{name}/{n}.png": picture(n) for name, n in (("dog", 3), ("cat", 1), ("cat", 2))}
    path = write(tmp_path / "x.tar", {"all": tarfile.DIRTYPE.decode(), **members, "._junk.png": b"no"})
    data = load(path, labels=True)
    assert data.images[:, 0, 0, 0].tolist() == [3, 1, 2]
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [1, 0, 0]


def test_classes_that_some_images_lack_are_none(tmp_path):
    path = write(tmp_path / "x.tar", {"a.png": picture(1), "a.cls": b"0", "b.png": picture(2), "b.json": b"{}"})
    source = open_source(path)
    assert source.classes is None and source.notes == ("1 images have no class, so there are none",)


def test_links_and_devices_are_counted_and_never_followed(tmp_path):
    path = write(tmp_path / "x.tar", {"a.png": picture(1), "b.png": tarfile.SYMTYPE.decode(), "c.png": tarfile.CHRTYPE.decode(),
                                      "d.png": tarfile.LNKTYPE.decode()})  # fmt: skip
    source = open_source(path)
    assert source.count == 1
    assert source.skipped == {"a link inside an archive": 2, "no plain file": 1}


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "c:/a.png"])
def test_members_that_climb_out_are_refused(tmp_path, name):
    path = write(tmp_path / "x.tar", {"b.png": picture(1), name: picture(2)})
    with pytest.raises(DataError, match="points outside the archive"):
        open_source(path)


def test_an_archive_cut_off_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "x.tar", {f"{n}.png": picture(n) for n in range(3)}).read_bytes()
    member = 512 + 512 * -(-len(picture(0)) // 512)
    for length in (513, member - 10, member, member + 100, 2 * member, 3 * member):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut off|damaged"):
            open_source(tmp_path / "cut.tar")


@pytest.mark.parametrize("content", [b"cat", b"-1", b"1.5", b"true", b"[1]", b'{"label": "cat"}', b"\xff"])
def test_labels_that_are_no_class_index_are_refused(tmp_path, content):
    path = write(tmp_path / "x.tar", {"a.png": picture(1), "a.cls": content})
    with pytest.raises(DataError, match="holds no class index"):
        open_source(path)


def test_images_beside_a_tar_are_what_a_folder_holds(tmp_path):
    write(tmp_path / "old.tar", {"a.png": picture(1), "b.png": picture(2)})
    (tmp_path / "new.png").write_bytes(picture(3))
    assert (open_source(tmp_path).kind, open_source(tmp_path).count) == ("folder of images", 1)


def test_a_tar_without_images(tmp_path):
    with pytest.raises(DataError, match=r"holds no images \(1 not an image\)"):
        open_source(write(tmp_path / "x.tar", {"a.txt": b"hello"}))
