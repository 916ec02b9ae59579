import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset
from cmtool.data.sources import arrays, known
from cmtool.data.sources.imagenet import read_class_map
from cmtool.errors import DataError, OfflineError
from tests.data.lmdb_file import lmdb_file

GOLDEN = Path(__file__).parent / "golden"
LABELS = [2, 0, 1, 1, 2, 0]


def load(path, **kw):
    return load_dataset(
        DataConfig(**{"source": "folder", "path": str(path), "resolution": 8, "labels": True, "holdout": 0.0, **kw})
    )


def golden_pixels():
    return np.load(GOLDEN / "samples_6x8x8x3.npz")["arr_0"]


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", ["edm_tiny.zip", "cifar_like_batch", "train_data_batch_1.npz", "samples_6x8x8x3.npz"])
def test_the_same_six_images_in_four_formats(name):
    data = load(GOLDEN / name)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), golden_pixels())
    assert data.labels.tolist() == LABELS and data.num_classes == 3
    assert load(GOLDEN / name, labels=False).labels is None


def test_folders_and_prefixes_hold_the_same_images():
    folders, prefix = load(GOLDEN / "folders"), load(GOLDEN / "prefix", kind="prefix")
    assert folders.fingerprint == prefix.fingerprint and folders.labels.tolist() == [0, 0, 1, 1, 2, 2]
    whole = golden_pixels()
    for index, number in enumerate([1, 5, 2, 3, 0, 4]):  # the files are named by class and number
        assert np.array_equal(folders.images[index].permute(1, 2, 0).numpy(), whole[number])


def test_downsampled_imagenet_says_and_maps_its_class_order(tmp_path):
    source = (GOLDEN / "train_data_batch_1.npz").read_bytes()
    for number in (1, 2, 10):
        (tmp_path / f"train_data_batch_{number}.npz").write_bytes(source)
    plain = load(tmp_path)
    assert len(plain) == 18 and plain.labels.tolist() == LABELS * 3
    assert any("development kit" in note for note in plain.info.notes) and plain.info.duplicates == 12
    # Devkit numbers 1, 2, 3 are given the ids n00000999, n00000998, n00000997: sorted ranks 999, 998, 997.
    lines = [f"n{1000 - number:08d} {number} name_{number}" for number in range(1, 1001)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines))
    mapped = load(tmp_path)
    assert mapped.labels.tolist() == [999 - label for label in LABELS] * 3
    assert mapped.num_classes == 1000 and mapped.class_names[999] == "n00000999"
    assert not any("development kit" in note for note in mapped.info.notes)
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="each class from 1 to 1000"):
        read_class_map(tmp_path / "map_clsloc.txt")


def test_imagenet_batches_as_pickles(tmp_path):
    held = dict(np.load(GOLDEN / "train_data_batch_1.npz"))
    (tmp_path / "train_data_batch_1").write_bytes(pickle.dumps({**held, "labels": held["labels"].tolist()}, 4))
    data = load(tmp_path)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), golden_pixels()) and data.labels.tolist() == LABELS


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of six images per batch, with the table of digests to match."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    digests = {}
    for name in arrays.CIFAR_MD5:
        (folder / name).write_bytes((GOLDEN / "cifar_like_batch").read_bytes())
        digests[name] = arrays.file_digest(folder / name)
    monkeypatch.setattr(arrays, "CIFAR_MD5", digests)
    return folder


def test_cifar_folder_digest_first(cifar, monkeypatch):
    assert len(load(cifar)) == len(load(cifar.parent)) == 30 and len(load(cifar, kind="test")) == 6
    with pytest.raises(DataError, match="Did you mean test"):
        load(cifar, kind="tests")
    monkeypatch.setattr(arrays, "read_array_pickle", lambda *_: pytest.fail("read before its digest was compared"))
    (cifar / "data_batch_3").write_bytes(b"\x80\x02}.")
    with pytest.raises(DataError, match="data_batch_3 is damaged or is not CIFAR-10's"):
        load(cifar)
    (cifar / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        load(cifar)


def test_cifar_archive_is_read_in_place(cifar, tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(cifar, "cifar-10-batches-py")
    monkeypatch.setattr(arrays, "CIFAR10_MD5", arrays.file_digest(path))
    assert load(path).fingerprint == load(cifar).fingerprint
    monkeypatch.setenv("CMTOOL_DATA", str(tmp_path))
    (tmp_path / "cifar-10-batches-py").rename(tmp_path / "away")
    found = load_dataset(DataConfig(source="cifar10", resolution=8, labels=True))
    assert len(found) == 30 and found.info.source == "cifar10"


def test_published_sets_that_are_not_there(tmp_path):
    with pytest.raises(OfflineError, match="CMTOOL_OFFLINE forbids") as caught:
        load_dataset(DataConfig(source="cifar10", resolution=32))
    assert "cifar-10-python.tar.gz" in caught.value.hint and str(tmp_path / "cache" / "data") in caught.value.hint
    for name in ("imagenet64", "lsun", "celeba64"):
        with pytest.raises(DataError, match=f"{name} is not at .*comes from http") as other:
            load_dataset(DataConfig(source=name, resolution=64))
        assert "--data PATH" in other.value.hint
    with pytest.raises(DataError, match="needs a path"):
        load_dataset(DataConfig(source="npz", resolution=64))


def test_names_where_a_path_may_stand():
    data = load("digits", channels=1)
    assert len(data) == 1797 and data.info.source == "digits"
    assert set(known.KNOWN) == {"cifar10", "imagenet32", "imagenet64", "lsun", "celeba64"}


def test_zip_of_class_folders_inside_one_folder(tmp_path, pixels):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("photos/readme.txt", "x")
        archive.writestr("__MACOSX/photos/cat/._0.png", "x")
        for index, name in enumerate(["cat/0.png", "dog/1.png", "dog/2.png"]):
            archive.writestr(f"photos/{name}", png(pixels(index)))
    data = load(tmp_path / "x.zip")
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 1, 1]
    assert data.summary["skipped"] == {"not an image": 1} and data.summary["found"] == 4


def test_edm_folder_one_hot_labels_and_gaps(tmp_path, pixels):
    folder = tmp_path / "edm"
    (folder / "00000").mkdir(parents=True)
    for index in range(3):
        (folder / "00000" / f"img{index}.png").write_bytes(png(pixels(index)))
    names = [f"00000/img{index}.png" for index in range(3)]
    (folder / "dataset.json").write_text(json.dumps({"labels": [[names[2], 4], [names[0], 0], [names[1], 1]]}))
    data = load(folder)
    assert data.labels.tolist() == [0, 1, 4] and data.num_classes == 5 and "3" not in data.summary["skipped"]
    assert data.info.notes == ("dataset.json leaves 2 of 5 class numbers unused",)
    hot = [[name, [float(k == i) for k in range(3)]] for i, name in enumerate(names)]
    (folder / "dataset.json").write_text(json.dumps({"labels": hot}))
    assert load(folder).labels.tolist() == [0, 1, 2]
    (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    with pytest.raises(DataError, match="no class labels"):
        load(folder)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "flat"])
def test_npz_layouts(tmp_path, layout):
    images = golden_pixels()
    stored = {
        "NHWC": images,
        "NCHW": images.transpose(0, 3, 1, 2),
        "NHW": images[..., 0],
        "flat": images.transpose(0, 3, 1, 2).reshape(6, -1),
    }
    np.savez_compressed(
        tmp_path / "x.npz", images=np.ascontiguousarray(stored[layout]), labels=np.array(LABELS, np.uint8)
    )
    data = load(tmp_path / "x.npz")
    expected = np.repeat(images[..., :1], 3, 3) if layout == "NHW" else images
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), expected) and data.labels.tolist() == LABELS


def test_gray_of_arrays_and_of_files_agree(tmp_path, pixels):
    image = pixels(0, 8, 8)
    np.savez(tmp_path / "x.npz", arr_0=image[None])
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "0.png").write_bytes(png(image))
    pair = [load(tmp_path / name, channels=1, labels=False).images for name in ("x.npz", "f")]
    assert torch.equal(*pair)


def test_lsun_lmdb(tmp_path, pixels):
    records = {b"zzz": b"no image"}
    for index, key in enumerate([b"ccc", b"aaa", b"bbb"]):
        stream = io.BytesIO()
        Image.fromarray(pixels(index)).save(stream, "WEBP", lossless=True)
        records[key] = stream.getvalue()
    (tmp_path / "set_lmdb").mkdir()
    (tmp_path / "set_lmdb" / "data.mdb").write_bytes(lmdb_file(records))
    before = sorted(path.name for path in (tmp_path / "set_lmdb").iterdir())
    for place in (tmp_path / "set_lmdb", f"lsun:{tmp_path / 'set_lmdb'}", tmp_path / "set_lmdb" / "data.mdb"):
        data = load(place, resolution=12, labels=False)
        assert data.summary["skipped"] == {"unreadable": 1} and len(data) == 3
        for row, index in enumerate([1, 2, 0]):
            assert np.array_equal(data.images[row].permute(1, 2, 0).numpy(), pixels(index))
    assert sorted(path.name for path in (tmp_path / "set_lmdb").iterdir()) == before
    (tmp_path / "bad.mdb").write_bytes(b"nonsense" * 2000)
    with pytest.raises(DataError, match="no lmdb"):
        load(tmp_path / "bad.mdb")


def parquet_rows(pixels, count=3):
    return [{"bytes": png(pixels(index)), "path": f"/etc/{index}.png"} for index in range(count)]


def test_parquet_as_the_hub_stores_it(tmp_path, pixels):
    arrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": parquet_rows(pixels), "label": [1, 0, 1]})
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet.write_table(table, tmp_path / "set" / "data" / f"{name}.parquet")
    data = load(tmp_path / "set", resolution=12)
    assert len(data) == 6 and data.labels.tolist() == [1, 0, 1] * 2 and data.class_names == ("cat", "dog", "owl")
    assert np.array_equal(data.images[4].permute(1, 2, 0).numpy(), pixels(1))
    parquet.write_table(
        arrow.table({"img": [row["bytes"] for row in parquet_rows(pixels)]}), tmp_path / "plain.parquet"
    )
    assert len(load(tmp_path / "plain.parquet", labels=False)) == 3
    gone = [{"bytes": None, "path": str(GOLDEN / "folders" / "n01440764" / "00001.png")}, *parquet_rows(pixels, 1)]
    parquet.write_table(arrow.table({"image": gone}), tmp_path / "gone.parquet")
    assert load(tmp_path / "gone.parquet", labels=False).summary["skipped"] == {"unreadable": 1}
    parquet.write_table(arrow.table({"x": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column of images; its columns are x"):
        load(tmp_path / "x.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "plain.parquet").read_bytes()[:200])
    with pytest.raises(DataError, match="damaged or no parquet"):
        load(tmp_path / "cut.parquet")
    whole = bytearray((tmp_path / "plain.parquet").read_bytes())
    whole[4:40] = bytes(36)  # the first page's header: found only while the rows are read
    (tmp_path / "torn.parquet").write_bytes(whole)
    with pytest.raises(DataError, match="damaged or no parquet"):
        load(tmp_path / "torn.parquet")


def saved_to_disk(folder, rows, labels, names, shards=2, per_batch=2):
    """Write what `datasets.save_to_disk` writes: streams of record batches and two JSON files beside them."""
    import pyarrow as arrow

    folder.mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    form = arrow.schema(
        {"image": arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}), "label": arrow.int64()},
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    files, step = [], -(-len(rows) // shards)
    for number in range(shards):
        part = slice(number * step, (number + 1) * step)
        files.append({"filename": f"data-{number:05}-of-{shards:05}.arrow"})
        table = arrow.table({"image": rows[part], "label": labels[part]}, form)
        with arrow.ipc.new_stream(folder / files[-1]["filename"], form) as writer:
            writer.write_table(table, per_batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def test_arrow_as_the_hub_saves_it_to_disk(tmp_path, pixels):
    arrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    saved = saved_to_disk(tmp_path / "set" / "train", parquet_rows(pixels, 5), [1, 0, 1, 2, 0], ["cat", "dog", "owl"])
    data = load(saved, resolution=12)
    assert data.labels.tolist() == [1, 0, 1, 2, 0] and data.class_names == ("cat", "dog", "owl")
    for index in range(5):
        assert np.array_equal(data.images[index].permute(1, 2, 0).numpy(), pixels(index))
    again = load(saved, resolution=12)
    assert again.fingerprint == data.fingerprint and again.info.source == "Arrow"
    saved_to_disk(tmp_path / "set" / "test", parquet_rows(pixels, 1), [0], ["cat"], shards=1)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    whole = load(tmp_path / "set", resolution=12)
    assert whole.fingerprint == data.fingerprint and whole.info.notes[0] == "of the splits test, train train is used"
    one = saved / "data-00001-of-00002.arrow"
    assert load(one, resolution=12).labels.tolist() == [2, 0]
    table = arrow.table({"image": [row["bytes"] for row in parquet_rows(pixels)]})
    with arrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    assert len(load(tmp_path / "file.arrow", labels=False)) == 3
    one.write_bytes(one.read_bytes()[:-300])
    with pytest.raises(DataError, match="damaged or no Arrow table"):
        load(saved)
    one.unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow is missing; .*state.json names it"):
        load(saved)
    for names, words in (('["../x.arrow"]', "is refused"), ("3", "is damaged"), ("[]", "names no files")):
        (saved / "state.json").write_text(f'{{"_data_files": {names}}}')
        with pytest.raises(DataError, match=words):
            load(saved)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs the package pyarrow") as caught:
        load(tmp_path / "x.parquet")
    assert caught.value.hint == "pip install 'cmtool-consistency[data]'"
