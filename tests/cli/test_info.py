"""`cmtool info`: models, unfinished runs, and damaged files, read without torch."""

from __future__ import annotations

import json
import struct

import pytest

from cmtool.checkpoint import save_model
from cmtool.cli.info import describe_model
from cmtool.config.load import resolve, to_toml
from cmtool.config.networks import NETWORKS
from cmtool.models import build_model
from cmtool.networks.build import parameter_count

HEADER = {
    "format": 1,
    "kind": "consistency",
    "preset": "digits",
    "recipe_name": "ict",
    "step": 4400,
    "network": {"kind": "adm", "channels": 32, "dropout": None},
    "process": {"sigma_max": 80.0},
    "data": {"source": "digits", "num_classes": None},
    "times": {"1": [80.0], "2": [80.0, 0.8]},
    "versions": {"torch": "2.10"},
}


def write(path, header=HEADER, shapes=((3, 4), (5,)), metadata="cmtool"):
    """A safetensors file by hand: the length of the preamble, the preamble, the bytes."""
    preamble, offset = {"__metadata__": {metadata: json.dumps(header)}}, 0
    for index, shape in enumerate(shapes):
        size = 4
        for side in shape:
            size *= side
        preamble[f"w{index}"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(preamble).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    return path


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_not_learned_is_no_parameter(workdir, kind):
    """Positions of a transformer and frequencies of an embedding are tensors of the file, and no parameters."""
    fourier = {"embedding": "fourier"} if "embedding" in NETWORKS[kind].model_fields else {}
    sides = {"resolution": 1, "channels": 2} if kind == "mlp" else {"resolution": 8, "channels": 3}
    model = build_model({
        "kind": "consistency", "network": {"kind": kind, "channels": 16, "width": 16, "depth": 1, "heads": 2, **fourier},
        "process": {}, "data": {"source": "shapes", "num_classes": None, **sides},
    })  # fmt: skip
    save_model(workdir / "m.safetensors", dict(model.network.state_dict()), model.header)
    assert describe_model(workdir / "m.safetensors")["parameters"] == parameter_count(model.network)


def test_a_model_file(cmtool, workdir):
    write(workdir / "m.safetensors")
    typed = cmtool("info", "m.safetensors")
    lines = {" ".join(line.split()) for line in typed.out.splitlines()}
    assert typed.code == 0
    assert {"kind consistency", "parameters 17", "step 4400", "times 1 [80], 2 [80 0.8]"} <= lines
    assert "network kind adm, channels 32" in lines, "what is not set is not shown"
    document = json.loads(cmtool("info", "m.safetensors", "--json").out)
    assert document["parameters"] == 17 and document["tensors"] == 2 and document["network"]["dropout"] is None
    assert document["bytes"] == (workdir / "m.safetensors").stat().st_size


def test_a_finished_run_is_its_model(cmtool, workdir):
    (workdir / "runs" / "a").mkdir(parents=True)
    write(workdir / "runs" / "a" / "model.safetensors")
    assert json.loads(cmtool("info", "runs/a", "--json").out)["recipe_name"] == "ict"


def test_a_run_that_has_not_finished(cmtool, workdir):
    run = workdir / "runs" / "a"
    (run / "checkpoints" / "step-20").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(resolve("digits", recipe="ict").config))
    assert json.loads(cmtool("info", "runs/a", "--json").out)["step"] is None
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n{"step": 3')
    document = json.loads(cmtool("info", "runs/a", "--json").out)
    assert (document["kind"], document["step"], document["steps"]) == ("unfinished run", 20, 3100)
    assert document["checkpoints"] == ["step-20"] and document["recipe_name"] == "ict"
    assert "unfinished run" in cmtool("info", "runs/a").out


def damaged(workdir):
    whole = write(workdir / "whole.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return {
        "empty": b"",
        "short": whole[:5],
        "half a header": whole[:60],
        "half the weights": whole[:-10],
        "noise": bytes(range(256)) * 4,
        "huge length": struct.pack("<Q", 2**63) + whole[8:],
        "no json": whole[:8] + b"{" * length + whole[8 + length :],
        "a list": struct.pack("<Q", 2) + b"[]",
    }


@pytest.mark.parametrize(
    "what", ["empty", "short", "half a header", "half the weights", "noise", "huge length", "no json", "a list"]
)
def test_a_damaged_file_is_one_sentence(cmtool, workdir, what):
    (workdir / "bad.safetensors").write_bytes(damaged(workdir)[what])
    typed = cmtool("info", "bad.safetensors")
    assert (typed.code, typed.out) == (1, "")
    assert typed.err.startswith("Error: bad.safetensors is damaged") and typed.err.count("\n") == 1


def test_files_that_are_no_models(cmtool, workdir):
    write(workdir / "other.safetensors", metadata="format")
    assert "is no cmtool model" in cmtool("info", "other.safetensors").err
    write(workdir / "newer.safetensors", header={**HEADER, "format": 99})
    assert "newer.safetensors has format 99" in cmtool("info", "newer.safetensors").err
    assert cmtool("info", "gone").err.startswith("Error: there is no model at gone")
    (workdir / "folder").mkdir()
    assert cmtool("info", "folder").err.startswith("Error: folder holds no model.safetensors")


SAID = {"model_hash": "0123456789ab", "seeds": "0-2", "command": "cmtool sample --out 'ä b.npz'"}


def test_samples_say_what_made_them(cmtool, workdir):
    import numpy as np

    from cmtool.data.images import save_grid

    np.savez("ä b.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8), meta=np.array(json.dumps(SAID)))
    save_grid(np.zeros((3, 8, 8, 1), np.uint8), "grid.PNG", text=SAID | {"label": "Größe 東"})
    for name, more in (("ä b.npz", {"shape": [3, 8, 8, 1]}), ("grid.PNG", {"label": "Größe 東"})):
        document = json.loads(cmtool("info", name, "--json").out)
        assert {**SAID, **more}.items() <= document.items() and document["kind"] == "samples"
        assert "0123456789ab" in cmtool("info", name).out


@pytest.mark.parametrize("name", ["foreign.npz", "foreign.png", "photos.cmdata"])
def test_images_that_say_nothing_are_no_model(cmtool, workdir, name):
    import numpy as np
    from PIL import Image

    np.savez("foreign.npz", arr_0=np.zeros(3))
    Image.new("L", (4, 4)).save("foreign.png")
    (workdir / "photos.cmdata").write_bytes(b"x")
    typed = cmtool("info", name)
    assert (typed.code, typed.err) == (
        1,
        f"Error: {name} holds images, not a model.\nHint: cmtool data show {name}\n",
    )


@pytest.mark.parametrize("name", ["a.npz", "a.png"])
def test_damaged_samples_are_one_sentence(cmtool, workdir, name):
    import numpy as np

    from cmtool.data.images import save_grid

    np.savez("a.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8), meta=np.array(json.dumps(SAID)))
    save_grid(np.zeros((3, 8, 8, 1), np.uint8), "a.png", text=SAID)
    whole = (workdir / name).read_bytes()
    for cut in (0, 5, 20, len(whole) // 2):
        (workdir / name).write_bytes(whole[:cut])
        typed = cmtool("info", name)
        assert typed.code == 0 or typed.err.startswith(f"Error: {name} ")
        assert "should not happen" not in typed.err
    for place in range(0, len(whole), 7):
        (workdir / name).write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert "should not happen" not in cmtool("info", name).err


def test_samples_are_read_without_numpy(workdir):
    import subprocess
    import sys
    from pathlib import Path

    import numpy as np

    np.savez("a.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8), meta=np.array(json.dumps(SAID)))
    code = (
        "import sys; from cmtool.cli.app import run\n"
        "assert run(['info', 'a.npz']) == 0; assert 'numpy' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, cwd=workdir).returncode == 0
