"""An ICC profile with wide primaries and gamma 2.2, as cameras' Adobe RGB has, and one of gray with gamma 1.0."""

import struct


def _fixed(value):
    return struct.pack(">i", round(value * 65536))


def _xyz(*values):
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def _named(text):
    words = text.encode() + b"\0"
    body = b"desc\0\0\0\0" + struct.pack(">I", len(words)) + words + b"\0" * (4 + 4 + 2 + 1 + 67)
    return body + b"\0" * (-len(body) % 4)


def profile(name, space, tags):
    """Return an ICC profile of version 2.1."""
    tags = [(b"desc", _named(name)), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"wtpt", _xyz(0.9642, 1, 0.8249)), *tags]
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for key, data in tags:
        table += key + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _xyz(0.9642, 1, 0.8249)[8:]
    return head.ljust(128, b"\0") + table + body


WIDE = profile(
    "wide test",
    b"RGB ",
    [
        (b"rXYZ", _xyz(0.60974, 0.31111, 0.01947)),
        (b"gXYZ", _xyz(0.20528, 0.62567, 0.06087)),
        (b"bXYZ", _xyz(0.14919, 0.06322, 0.74457)),
        *((key, _gamma(2.2)) for key in (b"rTRC", b"gTRC", b"bTRC")),
    ],
)
LINEAR_GRAY = profile("linear gray", b"GRAY", [(b"kTRC", _gamma(1.0))])
