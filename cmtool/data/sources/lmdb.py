"""LSUN's lmdb, read without the library, which can crash the process on a damaged or hostile file.

The format (LMDB 0.9, data version 1, as written by little-endian 64-bit machines): all pages have one size; pages 0 and
1 say where the tree starts, and the one with the higher transaction number is valid; branch pages list pages, leaf
pages list keys and values; a value too long for a leaf has pages of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cmtool.data.sources.base import Record, Source, sign_file
from cmtool.errors import DataError

_PAGE = struct.Struct("<QHHHH")  # number, unused, flags, end of the list of nodes, start of the nodes
_HEAD = struct.Struct("<II")  # magic, version
_TREE = struct.Struct("<IHHQQQQQ")  # page size (in the first of two), flags, depth, three counts, entries, root
_NODE = struct.Struct("<HHHH")  # low and high half of a number, flags, length of the key
_MAGIC = 0xBEEFC0DE
_NO_PAGE = (1 << 64) - 1
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_LONG, _NESTED = 1, 2 | 4
_KEY_ORDERS = 2 | 8  # keys compared in reverse or as integers; the pages are already in that order
_PAGE_SIZES = frozenset(1 << power for power in range(9, 17))


class _Bad(Exception):
    """Something does not fit; it is reported with the name of the file."""


@dataclass(frozen=True)
class _Tree:
    """Where the records are: page size, order of keys, page of the root, depth of the tree, number of records."""

    page_size: int
    flags: int
    root: int
    depth: int
    entries: int
    transaction: int


def _meta(data: bytes) -> _Tree:
    """Read a meta page."""
    magic, version = _HEAD.unpack_from(data, 16)
    if magic != _MAGIC or version != 1:
        raise _Bad(f"version {version}" if magic == _MAGIC else "it does not begin as one")
    page_size = _TREE.unpack_from(data, 40)[0]
    _, flags, depth, _, _, _, entries, root = _TREE.unpack_from(data, 88)
    if page_size not in _PAGE_SIZES or depth > 64 or (depth == 0) != (root == _NO_PAGE):
        raise _Bad("its first pages do not fit")
    return _Tree(page_size, flags, root, depth, entries, struct.unpack_from("<Q", data, 144)[0])


class _Pages:
    """Pages of an open file. A pass over a valid file reads each page once, so reading more means pages form a loop."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = self.left = size

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`."""
        self.left -= length
        if start + length > self.size:
            raise _Bad("it points beyond its end")
        if self.left < 0:
            raise _Bad("its pages form a loop")
        self.stream.seek(start)
        data = self.stream.read(length)
        if len(data) < length:
            raise _Bad("it ends early")
        return data

    def tree(self) -> _Tree:
        """Return the newer of the two states stored in the file."""
        first = _meta(self.read(0, 152))
        try:
            second = _meta(self.read(first.page_size, 152))
        except _Bad:  # the previous state is intact, which is why there are two
            second = first
        newer = max(first, second, key=lambda tree: tree.transaction)
        if newer.flags & ~_KEY_ORDERS:
            raise _Bad("it holds several values to a key")
        return newer

    def records(self, tree: _Tree) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) in the order of the keys."""
        if tree.root != _NO_PAGE:
            yield from self._walk(tree, tree.root, tree.depth)

    def _walk(self, tree: _Tree, number: int, depth: int) -> Iterator[tuple[bytes, bytes]]:
        page = self.read(number * tree.page_size, tree.page_size)
        _, _, flags, lower, _ = _PAGE.unpack_from(page)
        expected = _LEAF if depth == 1 else _BRANCH
        if flags & 0xF != expected or not _PAGE.size <= lower <= len(page):
            raise _Bad(f"page {number} is damaged")
        for at in struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", page, _PAGE.size):
            if at + _NODE.size > len(page):
                raise _Bad(f"page {number} is damaged")
            low, high, marks, key_length = _NODE.unpack_from(page, at)
            begin = at + _NODE.size
            if depth > 1:
                yield from self._walk(tree, low | high << 16 | marks << 32, depth - 1)
                continue
            if marks & _NESTED:
                raise _Bad("it holds databases, not images")
            key, value = page[begin : begin + key_length], begin + key_length
            length = low | high << 16
            if value + (8 if marks & _LONG else length) > len(page):
                raise _Bad(f"page {number} is damaged")
            yield key, self._long(tree, page, value, length) if marks & _LONG else page[value : value + length]

    def _long(self, tree: _Tree, page: bytes, at: int, length: int) -> bytes:
        start = int.from_bytes(page[at : at + 8], "little") * tree.page_size
        if not _PAGE.unpack(self.read(start, _PAGE.size))[2] & _OVERFLOW:
            raise _Bad("a long value is damaged")
        return self.read(start + _PAGE.size, length)


def open_lmdb(path: Path) -> Source:
    """Open an LSUN lmdb (a folder with data.mdb, or the .mdb file): values are WebP or JPEG files, in key order.

    The file is read without a lock, on the assumption that nobody writes to it, and no lock file is made.

    Raises:
        DataError: the file is damaged or not an lmdb.
    """
    file = path / "data.mdb" if path.is_dir() else path
    size = file.stat().st_size

    def refused(error: _Bad) -> DataError:
        return DataError(f"{path} is damaged or no lmdb ({error}).")

    def records() -> Iterator[Record]:
        try:
            with open(file, "rb") as stream:
                pages = _Pages(stream, size)
                number = 0
                for key, value in pages.records(tree):
                    number += 1
                    yield Record(key.decode("latin1"), value)
            if number != tree.entries:
                raise _Bad(f"{number:,} records where {tree.entries:,} are counted")
        except _Bad as error:
            raise refused(error) from None

    try:
        with open(file, "rb") as stream:
            tree = _Pages(stream, size).tree()
        if tree.entries * _NODE.size > size:
            raise _Bad(f"{tree.entries:,} records do not fit in {size:,} bytes")
    except _Bad as error:
        raise refused(error) from None
    return Source("lmdb", path, tree.entries, records, sign_file("lmdb", file))
