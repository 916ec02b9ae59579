"""A writer of lmdb files, small and slow, so that the reader is tested where the library is not installed."""

from __future__ import annotations

import struct

BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
NO_PAGE = (1 << 64) - 1


def _node(number: int, flags: int, key: bytes, data: bytes = b"") -> bytes:
    node = struct.pack("<HHHH", number & 0xFFFF, number >> 16 & 0xFFFF, flags, len(key)) + key + data
    return node + b"\0" * (len(node) % 2)


def _page(number: int, flags: int, nodes: list[bytes], size: int) -> bytes:
    """Nodes are laid from the end of the page to its middle, their places listed from its beginning."""
    places, at = [], size
    for node in nodes:
        at -= len(node)
        places.append(at)
    head = struct.pack("<QHHHH", number, 0, flags, 16 + 2 * len(nodes), at)
    return (head + struct.pack(f"<{len(places)}H", *places)).ljust(at, b"\0") + b"".join(reversed(nodes))


def lmdb_file(records: dict[bytes, bytes], size: int = 4096) -> bytes:
    """Return the bytes of a data.mdb with pages of `size` bytes that holds `records`."""
    pages: list[bytes] = [b"", b""]
    counts = {BRANCH: 0, LEAF: 0, OVERFLOW: 0}

    def add(flags: int, nodes: list[bytes]) -> int:
        counts[flags] += 1
        pages.append(_page(len(pages), flags, nodes, size))
        return len(pages) - 1

    def level(flags: int, entries: list[tuple[bytes, bytes]]) -> list[tuple[bytes, int]]:
        """Lay (key, node) out on pages; return the first key and the number of each page."""
        made, held, first, room = [], [], b"", size - 16
        for key, node in entries:
            if held and len(node) + 2 > room:
                made.append((first, add(flags, held)))
                held, room = [], size - 16
            first = first if held else key
            held.append(node)
            room -= len(node) + 2
        return [*made, (first, add(flags, held))]

    leaves = []
    for key, value in sorted(records.items()):
        if len(value) <= size // 4:
            leaves.append((key, _node(len(value), 0, key, value)))
            continue
        number, needed = len(pages), -(-(16 + len(value)) // size)
        counts[OVERFLOW] += needed
        whole = (struct.pack("<QHHI", number, 0, OVERFLOW, needed) + value).ljust(needed * size, b"\0")
        pages.extend(whole[at : at + size] for at in range(0, len(whole), size))
        leaves.append((key, _node(len(value), 1, key, struct.pack("<Q", number))))
    root, depth = NO_PAGE, 0
    if leaves:
        above, depth = level(LEAF, leaves), 1
        while len(above) > 1:
            # The key of a branch's first node is empty: whatever comes before the second belongs to it.
            above = level(BRANCH, [(key, _node(page, page >> 32, key)) for key, page in above])
            depth += 1
        root = above[0][1]
    main = (depth, counts[BRANCH], counts[LEAF], counts[OVERFLOW], len(records), root)
    for number, tree in enumerate(((0, 0, 0, 0, 0, NO_PAGE), main)):
        meta = struct.pack("<QHHHH", number, 0, META, 0, 0) + struct.pack("<IIQQ", 0xBEEFC0DE, 1, 0, 1 << 20)
        meta += struct.pack("<IHHQQQQQ", size, 8, 0, 0, 0, 0, 0, NO_PAGE) + struct.pack("<IHHQQQQQ", 0, 0, *tree)
        pages[number] = (meta + struct.pack("<QQ", len(pages) - 1, number)).ljust(size, b"\0")
    return b"".join(pages)
