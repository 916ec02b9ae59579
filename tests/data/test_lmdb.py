"""The reader of lmdb files against the library's own files, hand-made ones, and damage."""

from __future__ import annotations

import random
import struct

import pytest

from cmtool.data.sources.lmdb import open_lmdb
from cmtool.errors import DataError
from tests.data.lmdb_file import lmdb_file

LONG = random.Random(0).randbytes(9000)
RECORDS = {f"key-{index:04d}".encode(): bytes([index % 256]) * (index % 300) for index in range(400)} | {b"long": LONG}


def read(path, data: bytes) -> dict[bytes, bytes]:
    path.write_bytes(data)
    source = open_lmdb(path)
    found = [(record.name.encode("latin1"), record.data) for record in source.records()]
    assert source.count == len(found) and [key for key, _ in found] == sorted(key for key, _ in found)
    return dict(found)


@pytest.mark.parametrize("size", [512, 4096, 16384])
def test_records_come_back_in_the_order_of_their_keys(tmp_path, size):
    assert read(tmp_path / "a.mdb", lmdb_file(RECORDS, size)) == RECORDS
    assert read(tmp_path / "b.mdb", lmdb_file({b"one": b"1"}, size)) == {b"one": b"1"}


def test_the_library_agrees(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    (tmp_path / "ours.mdb").write_bytes(lmdb_file(RECORDS))
    with (
        lmdb.open(str(tmp_path / "ours.mdb"), subdir=False, readonly=True, lock=False) as made,
        made.begin() as reading,
    ):
        assert dict(reading.cursor()) == RECORDS
    kept = {}
    with lmdb.open(str(tmp_path / "theirs"), map_size=1 << 24) as made:
        for turn in range(4):  # free pages, a tree of several levels, both states in use
            with made.begin(write=True) as writing:
                for key, value in RECORDS.items():
                    name = key + str(turn).encode()
                    writing.put(name, value * (turn + 1))
                    kept[name] = value * (turn + 1)
                for key in list(kept)[:: 5 + turn]:
                    writing.delete(key)
                    del kept[key]
    assert read(tmp_path / "copy.mdb", (tmp_path / "theirs" / "data.mdb").read_bytes()) == kept


def test_the_older_state_is_used_where_the_newer_is_torn(tmp_path):
    data = bytearray(lmdb_file(RECORDS))
    data[:4096], data[4096:8192] = data[4096:8192], data[:4096]
    data[4096 + 16] ^= 1
    assert read(tmp_path / "a.mdb", bytes(data)) == RECORDS


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


SMALL = lmdb_file({b"a": b"x" * 10, b"b": b"y"})  # two first pages and a leaf
LEAF = 2 * 4096
MAIN = 4096 + 88
FIRST_NODE = LEAF + 4096 - 20


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "points beyond its end"),
        (b"nonsense" * 2000, "does not begin as one"),
        (put(SMALL, 16 + 4, "<I", 2), "version 2"),
        (put(SMALL, 40, "<I", 3), "first pages do not fit"),
        (SMALL[: LEAF + 100], "points beyond its end"),
        (put(SMALL, MAIN + 40, "<Q", 1 << 50), "points beyond its end"),
        (put(SMALL, MAIN + 32, "<Q", 3), "2 records where 3 are counted"),
        (put(SMALL, MAIN + 32, "<Q", 1 << 60), "do not fit in"),
        (put(SMALL, MAIN + 4, "<H", 4), "several values to a key"),
        (put(SMALL, LEAF + 10, "<H", 1), "page 2 is damaged"),
        (put(SMALL, LEAF + 12, "<H", 5000), "page 2 is damaged"),
        (put(SMALL, LEAF + 16, "<H", 4095), "page 2 is damaged"),
        (put(SMALL, FIRST_NODE, "<H", 5000), "page 2 is damaged"),
        (put(SMALL, FIRST_NODE + 4, "<H", 2), "holds databases"),
        (put(lmdb_file({b"a": LONG}), LEAF + 10, "<H", 2), "long value is damaged"),
    ],
)
def test_damage_is_one_sentence(tmp_path, data, why):
    with pytest.raises(DataError, match=why):
        read(tmp_path / "a.mdb", data)


def test_pages_in_a_loop_end(tmp_path):
    """A branch whose every node is itself, under a depth that would make 60^64 records of it."""
    nodes = b"".join(struct.pack("<HHHH", 2, 0, 0, 0) for _ in range(60))
    page = struct.pack("<QHHHH", 2, 0, 1, 16 + 120, 4096 - 480)
    page += struct.pack("<60H", *range(4096 - 480, 4096, 8))
    data = put(put(SMALL, MAIN + 6, "<H", 64), MAIN + 32, "<Q", 5)[:LEAF] + page.ljust(4096 - 480, b"\0") + nodes
    with pytest.raises(DataError, match="form a loop"):
        read(tmp_path / "a.mdb", data)
