"""The experiment behind the plan with a trainer and a judge that cost nothing."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import plan_laws
from cmtool.checkpoint import save_model
from cmtool.files.atomic import atomic_text


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Four small data sets of which the first six pictures train."""
    made = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "avatars16.npz", arr_0=made)
    np.savez(tmp_path / "toon64.npz", arr_0=made.repeat(4, 1).repeat(4, 2))
    np.savez(tmp_path / "mnist32.npz", arr_0=made[..., :1], arr_1=np.arange(10))
    with zipfile.ZipFile(tmp_path / "emoji64.zip", "w") as archive:
        for index in range(10):
            image = Image.new("RGBA", (64, 64), (255, 0, 0, 255 if index % 2 else 0))
            stream = io.BytesIO()
            image.save(stream, "PNG")
            archive.writestr(f"{index}.png", stream.getvalue())
    small = {name: plan_laws.Pictures(one.file, 6, one.read) for name, one in plan_laws.SETS.items()}
    monkeypatch.setattr(plan_laws, "SETS", small)
    return tmp_path


def trains(words, log):
    """Leave what a run leaves: its plan, and the models of its stages."""
    folder = Path(words[words.index("--out") + 1])
    (folder / "teacher").mkdir(parents=True)
    rows = '{ recipe = "edm", share = 0.4, folder = "teacher" }, { recipe = "icd", share = 0.6, folder = "student" }'
    text = f'[data]\nresolution = 16\n[network]\nkind = "dit"\nwidth = 96\ndepth = 4\n[train]\nbatch_size = 32\nlr = 1e-3\n[plan]\nstages = [{rows}]\n'
    atomic_text(folder / "plan.toml", text)
    for place, step in ((folder / "teacher", 70), (folder, 50)):
        save_model(place / "model.safetensors", {"a": torch.zeros(1)}, {"step": step})


def judges(folder, training, held):
    figures = {"precision": 0.5, "recall": 0.25, "copies": 0.5}
    return {str(steps): {"fid": (100.0 if "plan" in folder.name else 80.0) / steps, **figures} for steps in (1, 2, 4)}


def test_runs_are_typed_judged_kept_and_not_repeated(pictures, capsys):
    typed = []

    def fails_once(words, log):
        typed.append(words)
        if "emoji64" in words[2] and len(typed) < 5:
            raise subprocess.CalledProcessError(1, words)
        trains(words, log)

    out = pictures / "out"
    asked = ["--pictures", str(pictures), "--out", str(out), "--minutes", "0.05", "--variations", "plan,rate-5e-4"]
    plan_laws.main(asked, fails_once, judges)
    assert [words[words.index("--time") + 1] for words in typed] == ["3s"] * 8
    assert typed[0][0] == "train-ct" and typed[4][-2:] == ["--set", "train.lr=5e-4"]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and sum("error" in row for row in rows) == 1
    assert rows[0]["plan"] == {
        "resolution": 16, "network": {"kind": "dit", "width": 96, "depth": 4}, "batch_size": 32, "lr": 1e-3,
        "steps": {"edm": 70, "icd": 50},
    }  # fmt: skip
    capsys.readouterr()
    plan_laws.main(asked, fails_once, judges)  # only what had failed
    printed = capsys.readouterr().out
    assert len(typed) == 9 and "emoji64" in typed[-1][2]
    assert (
        "| avatars16 | 0.05 | plan | 1 | 100.0 | 50.0 | 25.0 | 1.25 | 0.50 | 0.25 | 0.50 | "
        "16 px, dit 96 4, edm 70 icd 50 |" in printed
    )
    plan_laws.main([*asked[2:], "--table"])
    assert capsys.readouterr().out == printed[printed.index("| set") :]
    # What trains and what judges are parts of one set, at the size that the experiment is about.
    shapes = {"avatars16": (16, 16, 3), "toon64": (32, 32, 3), "emoji64": (32, 32, 3), "mnist32": (16, 16, 1)}
    for name, shape in shapes.items():
        for part, count in (("train", 6), ("held", 4)):
            found = plan_laws.arrays(out / "data" / f"{name}-{part}.npz")
            assert found["arr_0"].shape == (count, *shape) and ("arr_1" in found) == (name == "mnist32")
    whole = np.load(pictures / "avatars16.npz")["arr_0"]
    assert (plan_laws.arrays(out / "data/toon64-held.npz")["arr_0"] == whole[6:].repeat(2, 1).repeat(2, 2)).all()
    emoji = plan_laws.drawn(pictures / "emoji64.zip")["arr_0"]
    assert (emoji == 255).all((1, 2, 3)).sum() == 5  # clear ones are white


def test_any_zip_of_pictures_is_a_set_of_which_a_fifth_is_held_out(pictures):
    (pictures / "emoji64.zip").rename(pictures / "others.zip")
    made = plan_laws.parser().parse_args(["--sets", "mnist32,others.zip"])
    assert made.sets == ["mnist32", "others.zip"]
    parts = [plan_laws.arrays(path)["arr_0"] for path in plan_laws.prepare("others.zip", pictures, pictures / "out")]
    assert [part.shape for part in parts] == [(8, 32, 32, 3), (2, 32, 32, 3)]
    assert (np.concatenate(parts) == plan_laws.drawn(pictures / "others.zip")["arr_0"]).all()


def test_a_list_says_what_would_be_typed(tmp_path, capsys):
    plan_laws.main(["--list", "--out", str(tmp_path / "none"), "--sets", "mnist32", "--variations", "plan,16px"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (3 + 1 + 1) + 1
    assert lines[0].startswith("cmtool train-ct --data ") and "--time 300s --seed 0" in lines[0]
    assert lines[-1] == "10 of 10 runs are left, 3.2 hours of training"
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        plan_laws.main(["--sets", "nope", "--list"])


def test_samples_are_judged_at_the_size_of_the_pictures():
    pixels = np.full((3, 16, 16, 3), 200, np.uint8)
    assert (plan_laws.sized(pixels, 32) == 200).all() and plan_laws.sized(pixels, 32).shape == (3, 32, 32, 3)
    assert plan_laws.sized(pixels, 16) is pixels
