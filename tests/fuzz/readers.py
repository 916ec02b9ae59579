"""Every reader of files that may come from strangers, with whole examples of what it reads."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cmtool
from cmtool.checkpoint import load_tensors, read_header, save_model, verify
from cmtool.cli.info import describe_run
from cmtool.config.load import from_toml, resolve, to_toml
from cmtool.config.overrides import parse_sets
from cmtool.data.decode import read_image
from cmtool.data.images import read_png_text
from cmtool.data.packed import read_packed
from cmtool.data.pickles import read_array_pickle
from cmtool.data.shards import ShardStore, read_request
from cmtool.data.sources.imagenet import read_class_map
from cmtool.data.sources.sniff import open_source
from cmtool.evaluation.references import resolve_reference
from cmtool.evaluation.samples import open_images
from cmtool.interop import diffusers, jax
from cmtool.interop.pickles import read_pickle
from cmtool.interop.reading import ImportOptions, read_foreign
from cmtool.interop.torch_file import load_torch
from cmtool.models import load
from cmtool.reporting.page import Gallery, render
from cmtool.reporting.runs import read_run
from cmtool.studio.work import TASKS, Workshop
from cmtool.theory.chain import read_points
from cmtool.training.lock import check_free
from cmtool.training.run_folder import RunFolder
from tests.cli.tiny import write_model
from tests.data.lmdb_file import lmdb_file
from tests.fuzz import examples
from tests.fuzz.sandbox import Reader
from tests.test_models import random_model
from tests.training.tiny import config_of


def _packed(folder: Path) -> bytes:
    from cmtool.config.schema import DataConfig
    from cmtool.data.load import rules_of
    from cmtool.data.packed import pack

    photos = folder / "photos"
    photos.mkdir(parents=True)
    for index in range(3):
        Image.fromarray(np.roll(examples.PIXELS, index, 0)).save(photos / f"{index}.png")
    cfg = DataConfig(source="folder", path=str(photos), resolution=4, small="upscale")
    pack(open_source(photos, cfg), folder / "p.cmdata", rules_of(cfg))
    return (folder / "p.cmdata").read_bytes()


def _model(folder: Path) -> bytes:
    model = random_model(network="mlp")
    save_model(folder / "m.safetensors", model.network.state_dict(), model.header)
    return (folder / "m.safetensors").read_bytes()


def _all_safetensors(path: Path) -> None:
    for step in (read_header, verify, load_tensors, load):
        step(path)


def _records(path: Path) -> None:
    for record in open_source(path).records():
        if isinstance(record.data, bytes):
            read_image(record.data, name=record.name)


def readers(folder: Path) -> dict[str, Reader]:
    """Return every reader by name; `folder` is for making the examples."""
    folder.mkdir(parents=True, exist_ok=True)
    gif, png, jpeg = examples.animation(), examples.image("PNG"), examples.image("JPEG")
    model = _model(folder)
    preset = b'[data]\nsource = "digits"\nresolution = 8\nchannels = 1\n[train]\nsteps = 5\nlr = 1e-3\n[recipe.ct]\nlr = 2e-3\n'
    small = folder / "small.toml"
    small.write_bytes(preset)
    images = examples.zipped(
        {"a/0.png": png, "b/1.jpg": jpeg, "dataset.json": b'{"labels": [["a/0.png", 0], ["b/1.jpg", 1]]}'}
    )
    arrays = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    state = {"w.weight": torch.zeros(2, 3), "b": torch.arange(3)}
    unet = json.dumps({"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [32, 32]}).encode()
    batch = {"arr_0": np.zeros((3, 4, 4, 3), np.uint8), "arr_1": np.arange(3)}
    samples = examples.npz(**batch)
    listed = [
        Reader("safetensors", "m.safetensors", (model,), _all_safetensors),
        Reader("config.toml", "config.toml", (to_toml(config_of("ict-pm")).encode(),), from_toml),
        Reader("preset", "p.toml", (preset,), lambda path: resolve(str(path), recipe="ct")),
        Reader("--set", "t.txt", (b"train.lr=1e-4", b"recipe.gap.q=[1,{a=2}]"), lambda path: _sets(path, small)),
        Reader("metrics.jsonl", "metrics.jsonl", (b'{"step": 2, "loss": 0.5}\n{"step": 4}\n',), _metrics),
        Reader("run.lock", "run.lock", (b'{"pid": 1234, "host": "a"}',), lambda path: check_free(path.parent)),
        Reader("png", "i.png", (png, examples.image("PNG", "P"), examples.image("PNG", "I;16")), _picture),
        Reader("jpeg", "i.jpg", (jpeg, examples.image("JPEG", "CMYK"), examples.image("JPEG", "L")), _picture),
        Reader("gif", "i.gif", (gif,), _picture),
        Reader(
            "webp, tiff, bmp",
            "i.webp",
            (examples.image("WEBP"), examples.image("TIFF"), examples.image("BMP")),
            _picture,
        ),
        Reader("image zip", "i.zip", (images,), _records),
        Reader("data npz", "d.npz", tuple(examples.npz(flag, **batch) for flag in (False, True)), _records),
        Reader("samples npz", "s.npz", (samples, examples.npz(True, **batch)), _samples),
        Reader("samples zip", "s.zip", (images,), _samples),
        Reader("packed", "p.cmdata", (_packed(folder / "packed"),), lambda path: _touch(read_packed(path))),
        Reader("data pickle", "b.pkl", tuple(pickle.dumps(arrays, n) for n in (2, 4)), _array_pickle),
        Reader(
            "network pickle",
            "n.pkl",
            tuple(pickle.dumps({"ema": [1, b"x", {"a": 2.5}]}, n) for n in (2, 4)),
            read_pickle,
        ),
        Reader(
            "torch",
            "w.pt",
            (examples.torch_file(state), examples.torch_file(state, _use_new_zipfile_serialization=False)),
            load_torch,
        ),
        Reader(
            "foreign",
            "ct_w.pt",
            (examples.torch_file(state), model, examples.msgpack()),
            lambda path: read_foreign(path, ImportOptions()),
        ),
        Reader("msgpack", "c.msgpack", (examples.msgpack(),), jax.read_leaves),
        Reader("diffusers", "d/unet/config.json", (unet,), lambda path: diffusers.read(path.parent.parent)),
        Reader(
            "lmdb", "d.mdb", (lmdb_file({b"a": png, b"b": jpeg, b"c": png * 20}, 512), examples.deep_lmdb()), _records
        ),
        Reader("dataset.json", "d/dataset.json", (examples.edm_labels(),), _edm_folder),
        Reader("class map", "map_clsloc.txt", (examples.class_map(),), read_class_map),
        Reader("statistics", "r.npz", (examples.statistics(), samples), lambda path: resolve_reference(str(path))),
        Reader("points", "p.npy", (examples.npy(np.eye(3)), examples.npz(x=np.eye(2))), _points),
        Reader("points in words", "p.csv", (b"1.5,2\n-3,4e1\n", b"1 2\n"), _points),
        Reader("a whole run", "metrics.jsonl", (examples.rows_of_a_run(),), _run),
        Reader("request.json", "s.npz.partial/request.json", (b'{"seeds": "0-7", "nfe": 1}',), _request),
        Reader("shard", "shard.npz", (examples.npz(samples=np.zeros((3, 4)), labels=np.arange(3)),), _shard),
        Reader(
            "studio",
            "r.json",
            tuple(examples.page_request(task) for task in TASKS),
            _page(write_model(folder, num_classes=2)),
        ),
    ]
    if find_spec("pyarrow"):
        listed.append(Reader("parquet", "t.parquet", examples.parquet_tables(png, jpeg), _records))
        listed.append(Reader("arrow", "t.arrow", examples.arrow_tables(png, jpeg), _records))
    return {reader.name: reader for reader in listed}


def _edm_folder(path: Path) -> None:
    for name in ("a.png", "b.png"):
        if not (path.parent / name).exists():
            (path.parent / name).write_bytes(examples.image("PNG"))
    _records(path.parent)


def _points(path: Path) -> None:
    for suffix in (".npy", ".npz", ".csv", ".txt"):
        if path.suffix == ".csv" or suffix in (".npy", ".npz"):
            other = path.with_suffix(suffix)
            other.write_bytes(path.read_bytes())
            read_points(other)


def _run(path: Path) -> None:
    """A run as `cmtool report`, `runs` and `info` see it; the input stands for each of its files of rows."""
    folder = path.parent
    if not (folder / "config.toml").exists():
        (folder / "config.toml").write_text(to_toml(config_of("ict-pm")))
    for name in ("evaluations.jsonl", "run.log"):
        (folder / name).write_bytes(path.read_bytes())
    render([read_run(folder)], [Gallery()])
    describe_run(folder)


def _request(path: Path) -> None:
    read_request(path, {"seeds": "0-7", "nfe": 1})


def _shard(path: Path) -> None:
    """The input as the first two of a large sample set's parts, put together as at the end of `cmtool sample`."""
    store = ShardStore(path.parent / "s.npz", {})
    for name in ("000000000-000000003.npz", "000000003-000000006.npz"):
        (store.folder / name).write_bytes(path.read_bytes())
    ShardStore(path.parent / "s.npz", {}).assemble({})


def _page(model: Path) -> Callable[[Path], None]:
    """Every action of the studio, asked as its server asks."""
    workshop = Workshop(cmtool.load(model, "cpu"), "m")

    def ask(path: Path) -> None:
        try:
            asked = json.loads(path.read_bytes())
        except ValueError:
            return
        if isinstance(asked, dict):
            for action in ("about", "sample", "edit", "walk"):
                workshop.ask(action, asked)

    return ask


def _sets(path: Path, preset: Path) -> None:
    for override in parse_sets([path.read_text(errors="replace")], "ct"):
        resolve(str(preset), recipe="ct", sets=[".".join(override.keys) + f"={override.value}"])


def _metrics(path: Path) -> None:
    folder = RunFolder(path.parent)
    folder.damaged_rows()
    folder.forget_after(3)


def _picture(path: Path) -> None:
    read_image(path)
    read_image(path.read_bytes(), channels=4, animated=True)
    if path.suffix == ".png":
        read_png_text(path)


def _samples(path: Path) -> None:
    found = open_images(path)
    for _ in found.batches(2):
        pass


def _touch(data: object) -> None:
    data.batch(torch.arange(len(data)))  # type: ignore[attr-defined,arg-type]


def _array_pickle(path: Path) -> None:
    read_array_pickle(path.read_bytes(), str(path))
