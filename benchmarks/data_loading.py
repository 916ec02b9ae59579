"""How fast data reach the network: packing image files once, then batches from the memory-mapped file.

    python benchmarks/data_loading.py [--images 20000] [--device cuda]

Prints images per second: decoding and fitting JPEG files into a packed file (paid once, cached), the same for images of
64 pixels in files, tar shards and Arrow tables, and training batches in random order, on the CPU as bytes, as floats,
and as floats on the device. A loader keeps a GPU busy when the last number is well above the images per second of a
training step.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cmtool.config.schema import DataConfig
from cmtool.data.packed import Rules, pack, packed_writer, read_packed
from cmtool.data.shapes import shapes_images
from cmtool.data.sources.sniff import open_source
from cmtool.training.batches import batch_indices


def photos(folder: Path, count: int, side: int, ending: str = "jpg") -> None:
    """Write files that cost as much to decode as photographs: shapes with noise; JPEG of quality 90."""
    generator = np.random.default_rng(0)
    images, _ = shapes_images(0, min(count, 64), side)
    for index in range(count):
        noise = generator.integers(-20, 20, (side, side * 4 // 3, 3))
        wide = np.pad(images[index % len(images)].transpose(1, 2, 0), ((0, 0), (0, side // 3), (0, 0)), mode="edge")
        Image.fromarray(np.clip(wide[:, : noise.shape[1]] + noise, 0, 255).astype(np.uint8)).save(
            folder / f"{index:05d}.{ending}", quality=90
        )


def packing(folder: Path, count: int, side: int, resolution: int) -> float:
    """Images per second from JPEG files to a packed file."""
    source = folder / f"jpeg{side}"
    source.mkdir(exist_ok=True)
    photos(source, count, side)
    return _packed(source, folder / "photos.cmdata", count, resolution)


def _packed(source: Path, out: Path, count: int, resolution: int) -> float:
    opened = open_source(source, DataConfig(source="folder", path=str(source), resolution=resolution))
    start = time.perf_counter()
    pack(opened, out, Rules(resolution))
    return count / (time.perf_counter() - start)


def forms(folder: Path, count: int, side: int, ending: str) -> Iterator[tuple[str, float]]:
    """Yield images per second from files, tar shards and Arrow tables of images that have the side already."""
    files = folder / f"{ending}{side}"
    files.mkdir()
    photos(files, count, side, ending)
    names = sorted(files.iterdir())
    half = -(-count // 2)
    (folder / "shards").mkdir(exist_ok=True)
    for number in range(2):
        with tarfile.open(folder / "shards" / f"{number}.tar", "w") as archive:
            for file in names[number * half : (number + 1) * half]:
                archive.add(file, file.name)
    yield "files", _packed(files, folder / "f.cmdata", count, side)
    yield "tar", _packed(folder / "shards", folder / "t.cmdata", count, side)
    try:
        import pyarrow
    except ImportError:
        return
    table = pyarrow.table({"image": [{"bytes": file.read_bytes(), "path": file.name} for file in names]})
    with pyarrow.ipc.new_stream(folder / "t.arrow", table.schema) as writer:
        writer.write_table(table, 100)
    yield "Arrow", _packed(folder / "t.arrow", folder / "a.cmdata", count, side)


def mapped(folder: Path, count: int, resolution: int) -> Path:
    """Write a packed file of random pixels."""
    path = folder / f"random{resolution}.cmdata"
    generator = np.random.default_rng(0)
    with packed_writer(path, 3, resolution) as writer:
        for index in range(count):
            writer.append(generator.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8), index % 10)
        writer.finish({"source": "random", "found": count, "skipped": {}, "notes": [], "classes": 10})
    return path


def batches(path: Path, batch: int, device: str, seconds: float = 2.0) -> tuple[float, float, float]:
    """Images per second of batches in random order: as bytes, as floats, and as floats on `device`."""
    data = read_packed(path)

    def rate(step_of: int) -> float:
        start, step = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            rows = batch_indices(0, step, batch, len(data))
            if step_of == 0:
                data.images.index_select(0, rows)
            else:
                data.batch(rows, "cpu" if step_of == 1 else device)
            step += 1
        if step_of == 2 and device.startswith("cuda"):
            torch.cuda.synchronize()
        return step * batch / (time.perf_counter() - start)

    return rate(0), rate(1), rate(2)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="images of the memory-mapped file")
    parser.add_argument("--files", type=int, default=1_000, help="JPEG files to pack")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more only help on a quiet machine")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"device {asked.device}, {torch.get_num_threads()} threads; images per second")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side, resolution in ((256, 64), (512, 256)):
            made = packing(folder, asked.files, side, resolution)
            print(f"packing JPEG {side * 4 // 3} x {side} to {resolution} px     {made:12,.0f}")
        for ending in ("jpg", "png"):
            for form, made in forms(folder, 2 * asked.files, 64, ending):
                print(f"packing {ending} of 64 px from {form:5}          {made:12,.0f}")
        for resolution, batch in ((32, 512), (64, 2048), (256, 128)):
            path = mapped(folder, asked.images * 32 // resolution, resolution)
            raw, floats, there = batches(path, batch, asked.device)
            speeds = f"bytes {raw:12,.0f}  floats {floats:12,.0f}  {asked.device} {there:12,.0f}"
            print(f"batches of {batch:4d} at {resolution:3d} px: {speeds}")


if __name__ == "__main__":
    main()
