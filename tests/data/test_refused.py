"""Files that try to run code, escape, or exhaust the memory, and files that are merely damaged: one sentence each."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset
from cmtool.data.packed import MAGIC, packed_writer, read_packed
from cmtool.data.pickles import read_array_pickle
from cmtool.data.sources.sniff import open_source
from cmtool.errors import DataError
from cmtool.files.archives import NpzReader, open_zip, read_member


class Payload:
    """Writes a file when a plain unpickler loads it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def refused(path, says, **kw):
    with pytest.raises(DataError, match=says):
        load_dataset(DataConfig(source="folder", path=str(path), resolution=8, **kw))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, protocol):
    trap = tmp_path / "trap"
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": Payload(trap)}, protocol))
    refused(tmp_path / "batch", r"refused: it names '.*open'")
    assert not trap.exists()
    pickle.loads((tmp_path / "batch").read_bytes())["data"].close()
    assert trap.exists(), "the control: a plain unpickler springs the trap"


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile", "torch._utils._rebuild"]
)
def test_no_other_name_is_answered(name):
    module, function = name.rsplit(".", 1)
    with pytest.raises(DataError, match=name):
        read_array_pickle(f"c{module}\n{function}\n(S'x'\ntR.".encode(), "it")


def test_object_arrays_registry_codes_and_memory_bombs_in_pickles():
    with pytest.raises(DataError, match="type object"):
        read_array_pickle(pickle.dumps({"data": np.array([{}], dtype=object)}, 2), "it")
    with pytest.raises(DataError, match="extension code 5"):
        read_array_pickle(b"\x80\x02\x82\x05.", "it")
    with pytest.raises(DataError, match="damaged"):
        read_array_pickle(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"xx", "it")
    assert read_array_pickle(b"\x80\x02}r\xff\xff\xff\x7f.", "it") == {}
    with pytest.raises(DataError, match="holds a list"):
        read_array_pickle(pickle.dumps([1]), "it")
    whole = pickle.dumps({"data": np.zeros((2, 12), np.uint8)}, 2)
    with pytest.raises(DataError, match="damaged"):
        read_array_pickle(whole[: len(whole) // 2], "it")


@pytest.mark.parametrize("protocol", range(6))
def test_honest_pickles_of_every_protocol_are_read(protocol):
    held = {
        "data": np.arange(24, dtype=np.uint8).reshape(2, 12),
        "labels": [3, 1],
        "mean": np.ones(3, ">f8"),
        "n": np.int64(7),
    }
    made = read_array_pickle(pickle.dumps(held, protocol), "it")
    assert np.array_equal(made["data"], held["data"]) and made["labels"] == [3, 1] and made["n"] == 7
    assert made["mean"].tolist() == [1, 1, 1]
    columns = pickle.dumps({"data": np.asfortranarray(held["data"])}, protocol)
    assert np.array_equal(read_array_pickle(columns, "it")["data"], held["data"])


def test_a_python_2_pickle_is_read():
    """CIFAR's own files are Python 2's: texts are byte strings, and so are the pixels."""
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02K\x03t" + kind
    made = read_array_pickle(
        b"\x80\x02(U\x06labels](K\x05K\x07eU\x04data" + array + b"\x89U\x06\x00\xff\x80\n\r\x01tbd.", "it"
    )
    assert made["data"].tolist() == [[0, 255, 128], [10, 13, 1]] and made["labels"] == [5, 7]


def test_npz_of_objects_is_refused_and_does_nothing(tmp_path):
    trap = tmp_path / "trap"
    np.savez(tmp_path / "x.npz", arr_0=np.array([Payload(trap)], dtype=object))
    refused(tmp_path / "x.npz", "refused: arr_0.npy holds Python objects")
    assert not trap.exists()


@pytest.mark.parametrize("member", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "C:/evil.png", "..\\evil.png"])
def test_zip_members_outside_the_archive(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("dataset.json", "{}")
        archive.writestr(zipfile.ZipInfo(member), b"x")
    refused(tmp_path / "x.zip", "points outside")
    assert not [name for name in os.listdir(tmp_path) if name not in ("x.zip", "cache")]


def test_zip_and_npz_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr("cmtool.files.archives._LARGE", 1_000_000)
    np.savez_compressed(tmp_path / "x.npz", arr_0=np.zeros((2000, 32, 32, 3), np.uint8))
    refused(tmp_path / "x.npz", "decompression bomb")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.png", bytes(5_000_000))
    refused(tmp_path / "x.zip", "decompression bomb")
    monkeypatch.undo()
    with open_zip(tmp_path / "x.zip") as archive, pytest.raises(DataError, match="larger than 1 MB"):
        read_member(archive, "a/b.png", limit=1_000_000)


def write_npy(path, header, body=b""):
    text = header.encode().ljust(118) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body)


def test_an_array_that_claims_more_than_it_holds(tmp_path):
    path = tmp_path / "x.npz"
    write_npy(path, "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 64, 64, 3)}")
    refused(path, "shorter or longer than its header says")
    write_npy(path, "{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os')}")
    refused(path, "damaged")
    write_npy(path, "{'descr': '|u1', 'fortran_order': True, 'shape': (1, 8, 8, 3)}", bytes(192))
    refused(path, "by columns")


@pytest.mark.parametrize("cut", [10, 300, -5])
def test_truncated_archives(tmp_path, cut):
    np.savez(tmp_path / "whole.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:cut])
    refused(tmp_path / "cut.npz", "damaged")


def test_a_flipped_byte_in_an_archive_is_noticed(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    refused(tmp_path / "x.npz", "damaged|truncated")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, r"read in \[0, 1\] and in \[-1, 1\]"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.int32)}, "images are uint8, or floats"),
        ({"arr_0": np.zeros((2, 100), np.uint8)}, "no square RGB"),
        ({"arr_0": np.zeros((2, 8, 8, 7), np.uint8)}, "no batch of images"),
        ({"weights": np.zeros(3)}, "has no images: its arrays are weights"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, "class numbers are expected"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([-1, 0])}, "class numbers are expected"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([0, 1 << 40])}, "at most 100,000 classes"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds no image"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, says):
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", says)


def test_npz_reader_names_what_is_there(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.arange(6).reshape(2, 3), b=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    reader = NpzReader(tmp_path / "x.npz")
    assert np.array_equal(reader.read("a"), np.arange(6).reshape(2, 3)) and np.array_equal(
        reader.read("b"), reader.read("a")
    )
    with pytest.raises(DataError, match="no array 'c'; it has a, b"):
        reader.read("c")


@pytest.mark.parametrize(
    "table",
    [
        '{"labels": [["a.png", 0]]}',
        '{"labels": [["0.png", 0.5]]}',
        "[1]",
        "{",
        '{"labels": 3}',
        '{"labels": [["0.png", [1, 1]]]}',
    ],
)
def test_dataset_json_in_another_form(tmp_path, pixels, table):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels(0)).save(stream, "PNG")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("0.png", stream.getvalue())
        archive.writestr("dataset.json", table)
    refused(tmp_path / "x.zip", "dataset.json")


@pytest.mark.parametrize("spoil", ["cut", "longer", "header", "shape", "magic"])
def test_damaged_packed_files(tmp_path, class_folder, spoil):
    load_dataset(DataConfig(source="folder", path=str(class_folder), resolution=8))
    [path] = (tmp_path / "cache" / "packed").iterdir()
    data = path.read_bytes()
    offset, length = struct.unpack("<QQ", data[8:24])
    if spoil == "cut":
        data = data[:-10]
    elif spoil == "longer":
        data += b"x"
    elif spoil == "header":
        data = data[:offset] + b"{" * length
    elif spoil == "shape":
        header = json.loads(data[offset:]) | {"shape": [10**9, 3, 8, 8]}
        text = json.dumps(header).encode()
        data = MAGIC + struct.pack("<QQ", offset, len(text)) + data[24:offset] + text
    else:
        data = b"x" + data[1:]
    (tmp_path / "bad.cmdata").write_bytes(data)
    with pytest.raises(DataError, match="damaged, truncated or no packed"):
        read_packed(tmp_path / "bad.cmdata")


def test_a_packed_file_with_absurd_or_outside_labels(tmp_path, pixels):
    for name, label, classes, says in (("a", 1 << 40, None, "at most 100,000"), ("b", 5, 3, "outside its 3 classes")):
        with packed_writer(tmp_path / name, 3, 8) as writer:
            writer.append(pixels(0, 8, 8), label)
            writer.finish({"classes": classes})
        with pytest.raises(DataError, match=says):
            read_packed(tmp_path / name)


def test_unknown_forms_say_what_is_known(tmp_path, class_folder):
    (tmp_path / "x.bin").write_bytes(b"hello there")
    refused(tmp_path / "x.bin", "no known form; known are a folder of images")
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    refused(tmp_path / "x.tar.gz", "is not CIFAR-10's archive")
    refused(class_folder / "cat" / "0.png", "single image")
    with pytest.raises(DataError, match="there is no data at"):
        open_source(tmp_path / "nothing")
