"""Whole examples of every kind of file that is read, as bytes."""

from __future__ import annotations

import base64
import io
import json
import zipfile

import numpy as np
import torch
from PIL import Image

from cmtool.training.report import Report
from tests.data.lmdb_file import lmdb_file

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def image(form: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def animation() -> bytes:
    frames = [Image.fromarray(np.roll(PIXELS, shift, 0)) for shift in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def zipped(members: dict[str, bytes], compress: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compress) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def npz(compress: bool = False, **arrays: object) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(stream, **arrays)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def torch_file(content: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def msgpack() -> bytes:
    """{"params": {"w": ext(1, [[2], "float32", 8 bytes])}}, as flax writes arrays, by hand."""
    array = b"\x93\x91\x02\xa7float32\xc4\x08" + np.float32([1, 2]).tobytes()
    return b"\x81\xa6params\x81\xa1w\xc7" + bytes([len(array)]) + b"\x01" + array


def deep_lmdb() -> bytes:
    """Return an lmdb with branches above its leaves."""
    return lmdb_file({str(index).encode(): bytes(index % 90) for index in range(60)}, 512)


def parquet_tables(*images: bytes) -> tuple[bytes, ...]:
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": data, "path": "a"} for data in images]
    table = pyarrow.table({"image": rows, "label": list(range(len(rows)))})
    made = []
    for options in ({}, {"compression": "none", "use_dictionary": False}, {"compression": "zstd"}):
        stream = io.BytesIO()
        parquet.write_table(table, stream, **options)
        made.append(stream.getvalue())
    return tuple(made)


def arrow_tables(*images: bytes) -> tuple[bytes, ...]:
    import pyarrow

    table = pyarrow.table({"image": [{"bytes": data, "path": "a"} for data in images], "label": [*range(len(images))]})
    made = []
    for writer in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        stream = io.BytesIO()
        with writer(stream, table.schema) as written:
            written.write_table(table, 1)
        made.append(stream.getvalue())
    return tuple(made)


def edm_labels() -> bytes:
    return b'{"labels": [["a.png", 0], ["b.png", [0, 1]]]}'


def class_map() -> bytes:
    return "".join(f"n{number:08d} {number} name_{number}\n" for number in range(1, 1001)).encode()


def statistics() -> bytes:
    meta = json.dumps({"count": 5, "samples": 5, "features": "inception", "mode": "clean"})
    return npz(mu=np.zeros(3), sigma=np.eye(3), meta=np.array(meta))


def rows_of_a_run() -> bytes:
    """Two reports, a judgment on the way, an evaluation, and a line of the log, as a run writes them."""
    first = Report(2, 9, 0.5, 0.4, {"<0.1": 0.1, ">=10": 0.3}, 11, 0.9, 1e-3, 1.5, 90.5, 20).row()
    judged = {"step": 4, "eval": {"fid": 1.5, "precision": 0.5}}
    result = {"created": "2026-01-02T03:04:05Z", "protocol": {"reference": "digits", "features": "digits"}, "nfe": 1,
              "times": [80.0, 1.5], "count": 10, "metrics": {"fid": 1.5, "precision": 0.5, "kid": None}}  # fmt: skip
    machine = {"command": ["cmtool", "train-ct"], "device": "cpu", "versions": {"torch": "2"}, "threads": 1}
    rows = [json.dumps(row) for row in (first, {**first, "step": 3, "images_seen": 30}, judged, result)]
    return "\n".join([*rows, f"2026-01-02T03:04:05Z start at step 0 of 9 {json.dumps(machine)}"]).encode() + b"\n"


def page_request(task: str) -> bytes:
    """A request of the studio's page for an edit, in small pictures of one color."""
    pictures = []
    for mode in ("RGB", "L"):
        stream = io.BytesIO()
        Image.new(mode, (8, 8), 200).save(stream, "PNG")
        pictures.append(f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}")
    asked = {"task": task, "picture": pictures[0], "mask": pictures[1], "seed": 1, "num": 1, "factor": 2, "sigma": 0.4}
    return json.dumps({**asked, "label": "0", "from": 0, "to": 1, "place": 3}).encode()
