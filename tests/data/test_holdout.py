"""Images held out of training: the same ones wherever they are read from, for good, and never in a batch."""

from __future__ import annotations

import hashlib
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.config.load import resolve
from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset
from cmtool.data.dataset import from_tensors
from cmtool.data.holdout import LEAST, MOST, content_keys, hold_out, share_of
from cmtool.data.packed import Rules
from cmtool.data.survey import make
from cmtool.errors import ConfigError
from cmtool.training.batches import Batches


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def data_of(images):
    return from_tensors(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), None, "test")


def rows(images):
    """The images as a set of their bytes."""
    return set(map(bytes, images.contiguous().numpy().reshape(len(images), -1)))


def test_a_key_is_the_hash_of_the_bytes():
    images = torch.from_numpy(pictures(3)).permute(0, 3, 1, 2)
    expected = [
        int.from_bytes(hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest(), "little") / 2**64
        for image in images
    ]
    assert np.allclose(content_keys(images), expected, atol=2**-53, rtol=0)


def test_the_share_is_that_of_a_uniform_law_and_both_parts_are_the_whole():
    data = data_of(pictures(4000))
    split = hold_out(data, 0.1)
    assert abs(len(split.held_out) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert len(split) + len(split.held_out) == 4000
    assert rows(split.images) | rows(split.held_out.images) == rows(data.images)
    assert not rows(split.images) & rows(split.held_out.images)
    assert split.fingerprint != data.fingerprint != split.held_out.fingerprint
    assert f"{len(split.held_out)} of 4,000" in split.info.notes[-1]


def test_every_source_of_the_same_images_is_split_alike(tmp_path):
    images = pictures(300)
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile("zipped.zip", "w") as archive:
        for row, image in enumerate(images):
            name = f"{(7 * row) % 300:04d}.png"  # in another order than the array
            Image.fromarray(image).save(tmp_path / "folder" / name)
            archive.write(tmp_path / "folder" / name, name)
    np.savez("array.npz", arr_0=images)
    make("folder", tmp_path / "packed.cmdata", Rules(4, 3))
    held = []
    for path in ("folder", "zipped.zip", "array.npz", "packed.cmdata"):
        table = DataConfig(source="folder", path=path, resolution=4)
        assert table.holdout == 0.05
        data = load_dataset(table)
        assert len(data) + len(data.held_out) == 300
        held.append(rows(data.held_out.images))
    assert len(held[0]) >= LEAST and all(one == held[0] for one in held)


def test_added_images_change_no_side_and_duplicates_share_theirs():
    images = pictures(1000)
    before, after = hold_out(data_of(images[:600]), 0.1), hold_out(data_of(images[::-1].copy()), 0.1)
    assert rows(before.held_out.images) < rows(after.held_out.images)
    assert rows(before.images) < rows(after.images)
    twice = hold_out(data_of(np.concatenate([images[:600], images[:600]])), 0.1)
    assert len(twice.held_out) == 2 * len(before.held_out)
    assert rows(twice.held_out.images) == rows(before.held_out.images)


def test_at_most_two_thousand_and_none_that_was_trained_on():
    keys = np.random.default_rng(0).random(100_000)
    few, many = share_of(keys[:50_000], 0.1), share_of(keys, 0.1)
    assert (keys[:50_000] < few).sum() == (keys < many).sum() == MOST
    assert many < few < 0.1  # with more images the bound falls: nothing moves from training to the held-out ones
    tied = np.repeat(np.arange(1, 700) / 10_000, 3)  # a cut between duplicates would part them
    assert (tied < share_of(tied, 0.5)).sum() == MOST // 3 * 3


def test_no_held_out_image_is_ever_drawn():
    split = hold_out(data_of(pictures(120)), 0.2)
    config = resolve("shapes", recipe="ict", sets=["data.labels=false"], flags={"train.batch_size": 50}).config
    batches = Batches(config, split, torch.device("cpu"), torch.float32)
    seen = set()
    for step in range(12):
        images = batches.take(step, 0, 50)[0]
        seen |= rows(((images + 1) * 127.5).round().to(torch.uint8))
    assert seen == rows(split.images) and not seen & rows(split.held_out.images)


def test_labels_go_with_their_images():
    images, labels = pictures(200), torch.arange(200) % 7
    whole = from_tensors(torch.from_numpy(images).permute(0, 3, 1, 2), labels, "test")
    split = hold_out(whole, 0.2)
    named = {bytes(image.tobytes()): int(label) for image, label in zip(whole.images.numpy(), labels, strict=True)}
    for part in (split, split.held_out):
        assert [named[image.tobytes()] for image in part.images.numpy()] == part.labels.tolist()
    turned = split.renumbered([6, 5, 4, 3, 2, 1, 0], list("abcdefg"))
    assert torch.equal(turned.held_out.labels, 6 - split.held_out.labels)


def test_too_few_images_are_all_trained_on_and_it_is_said():
    split = hold_out(data_of(pictures(100)), 0.01)
    assert split.held_out is None and len(split) == 100
    assert "at least 10" in split.info.notes[-1] and "data.holdout=0.2" in split.info.notes[-1]
    assert "too few to hold any out" in hold_out(data_of(pictures(12)), 0.05).info.notes[-1]
    whole = data_of(pictures(100))
    assert hold_out(whole, 0.0) is whole


def test_keys_of_a_large_set_are_kept(monkeypatch):
    from cmtool.data import holdout

    monkeypatch.setattr(holdout, "LARGE", 0)
    data = data_of(pictures(300))
    first = hold_out(data, 0.1)
    monkeypatch.setattr(holdout, "content_keys", None)  # a second call would fail
    assert hold_out(data, 0.1).fingerprint == first.fingerprint


@pytest.mark.parametrize(("source", "path", "share"), [("folder", "a", 0.05), ("npz", "a.npz", 0.05), ("packed", "a", 0.05),
                                                       ("lsun", "a", 0.05), ("lsun", None, 0), ("digits", None, 0),
                                                       ("cifar10", None, 0), ("cifar10", "a", 0)])  # fmt: skip
def test_the_usual_share_is_that_of_a_users_own_images(source, path, share):
    assert DataConfig(source=source, path=path, resolution=8).holdout == share


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "some"])
def test_other_shares_are_refused(value):
    with pytest.raises(ConfigError, match=r"data\.holdout"):
        resolve("folder64", flags={"data.path": "photos"}, sets=[f"data.holdout={value}"])
