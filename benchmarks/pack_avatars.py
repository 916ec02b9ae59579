"""Pack the faces that make_avatars.mjs drew into the file that the package reads: an .npy compressed with xz.

python benchmarks/pack_avatars.py faces.rgb
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np

from cmtool.data.builtin import AVATARS

SIDE = 16


def pack(raw: Path, out: Path = AVATARS) -> int:
    """Write (N, 16, 16, 3) bytes to `out`, the same file for the same faces; return N."""
    faces = np.fromfile(raw, np.uint8).reshape(-1, SIDE, SIDE, 3)
    with lzma.open(out, "wb", preset=9 | lzma.PRESET_EXTREME) as stream:
        np.save(stream, faces, allow_pickle=False)
    return len(faces)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="what make_avatars.mjs wrote")
    print(f"{AVATARS}: {pack(parser.parse_args().raw):,} faces, {AVATARS.stat().st_size:,} bytes")
