"""`import cmtool`: light, typed, and the same numbers as the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmtool
from cmtool.errors import CheckpointError, DataError, UserError
from tests.cli.tiny import write_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cmtool.load(write_model(tmp_path_factory.mktemp("model")), "cpu")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return cmtool.load(write_model(tmp_path_factory.mktemp("classes"), num_classes=2, names=["disk", "ring"]), "cpu")


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_importing_takes_less_than_a_tenth_of_a_second(tmp_path):
    probe = "import time; a = time.process_time(); import cmtool; print(time.process_time() - a)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def seconds():
        done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
        return float(done.stdout)

    assert min(seconds() for _ in range(3)) < 0.1


def test_what_is_offered_is_listed_and_nothing_else_is_there():
    assert set(cmtool.__all__) <= set(dir(cmtool))
    assert all(getattr(cmtool, name) is not None for name in cmtool.__all__)
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        cmtool.smaple  # noqa: B018
    assert (ROOT / "cmtool" / "py.typed").is_file()


def test_samples_depend_on_their_seeds_alone_and_are_those_of_the_command_line(model, cmtool_command):
    images = model.sample(5, seed=2)
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.float32
    assert images.abs().max() <= 1
    again = model.sample(seeds=[2_000_004, 2_000_001], batch_size=1)
    assert torch.allclose(again, images[[4, 1]], atol=1e-5)
    assert torch.equal(cmtool.sample(model, 5, seed=2), images)
    cmtool_command("sample", "--model", model.path, "--num", 5, "--seed", 2, "--out", "a.npz")
    cmtool.save(images, "b.npz")
    with np.load("a.npz") as a, np.load("b.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])


@pytest.fixture
def cmtool_command(request):
    typed = request.getfixturevalue("cmtool")

    def run(*words):
        said = typed(*words)
        assert said.code == 0, said.err

    return run


def test_steps_times_and_labels(model, classes):
    assert not torch.equal(model.sample(2, steps=2), model.sample(2))
    assert torch.equal(model.sample(2, times=(80, 0.8)), model.sample(2, steps=2))
    disks, rings = classes.sample(3, label="disk"), classes.sample(3, label=1)
    assert not torch.equal(disks, rings)
    assert torch.allclose(
        classes.sample(3, label=["disk", "ring"]), torch.stack([disks[0], rings[1], disks[2]]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"label": "cube"}, "unknown label 'cube'"),
        ({"num": 0}, "num must be at least 1"),
        ({"num": 3, "seeds": [1, 2]}, "disagree"),
        ({"steps": 2, "times": (80,)}, "give one of them"),
        ({"sampler": "heun"}, "is for a diffusion model"),
    ],
)
def test_wrong_requests_are_user_errors(classes, wrong, words):
    with pytest.raises(UserError, match=words):
        classes.sample(**wrong)


def test_labels_need_classes_and_models_a_place(model, tmp_path):
    with pytest.raises(UserError, match="not conditioned"):
        model.sample(1, label=0)
    with pytest.raises(CheckpointError, match="no model at"):
        cmtool.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown device"):
        cmtool.load(model.path, "gpu")


def test_a_call_is_the_consistency_function(model):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(x, torch.full((2,), model.module.sigma_min)), x, atol=1e-6)
    assert "3 x 8 x 8" in repr(model)


def test_inpainting_keeps_what_is_black_in_the_mask(model, photo):
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:5, 2:5] = True
    edits = cmtool.edit.inpaint(model, photo, mask, num=3, seed=1)
    assert edits.shape == (3, 8, 8, 3) and edits.dtype == np.uint8
    assert np.array_equal(edits[:, ~mask], np.broadcast_to(photo[~mask], (3, 55, 3)))
    assert not np.array_equal(edits[0], edits[1])
    assert np.array_equal(cmtool.edit.inpaint(model, photo, mask, num=3, seed=1), edits)


def test_every_form_of_picture_gives_the_same_edit(model, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "p.png")
    as_tensor = torch.from_numpy(photo).permute(2, 0, 1).float() / 127.5 - 1
    forms = [tmp_path / "p.png", str(tmp_path / "p.png"), Image.fromarray(photo), photo, as_tensor]
    edits = [cmtool.edit.colorize(model, form) for form in forms]
    assert all(np.array_equal(edit, edits[0]) for edit in edits)


def test_the_other_edits_keep_their_promises(model, photo):
    small = photo[::2, ::2]
    large = cmtool.edit.superres(model, small)[0].astype(float)
    assert np.abs(large.reshape(4, 2, 4, 2, 3).mean((1, 3)) - small).max() <= 1
    luma = np.array([0.2989, 0.587, 0.114]) / 0.9999
    gray = cmtool.edit.colorize(model, photo)[0]
    assert np.abs(gray @ luma - photo @ luma).max() <= 1
    assert cmtool.edit.stroke(model, photo, num=2).shape == (2, 8, 8, 3)
    assert cmtool.edit.denoise(model, photo, 0.3).shape == (1, 8, 8, 3)


def test_wrong_edits_are_user_errors(model, photo, tmp_path):
    with pytest.raises(UserError, match="the mask is empty"):
        cmtool.edit.inpaint(model, photo, np.zeros((8, 8), dtype=bool))
    with pytest.raises(UserError, match="outside the model's range"):
        cmtool.edit.denoise(model, photo, 1e9)
    with pytest.raises(DataError, match="no picture"):
        cmtool.edit.stroke(model, photo.astype(float))
    with pytest.raises(UserError, match="a teacher"):
        cmtool.edit.stroke(write_model(tmp_path, kind="diffusion"), photo)
    with pytest.raises(UserError, match="num=0"):
        cmtool.edit.stroke(model, photo, num=0)


def test_images_are_judged_from_memory_as_from_their_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    model = cmtool.load(write_model(tmp_path, channels=1, source="digits"), "cpu")
    images = model.sample(60)
    cmtool.save(images, tmp_path / "s.npz")
    metrics = ("fid", "pr")
    from_file = cmtool.evaluate(tmp_path / "s.npz", "digits", metrics=metrics)
    assert set(from_file) == {"fid", "precision", "recall"}
    assert cmtool.evaluate(images, "digits", metrics=metrics) == pytest.approx(from_file)
    assert cmtool.evaluate(model, "digits", num=60, metrics=metrics) == pytest.approx(from_file, rel=1e-3)
    with pytest.raises(UserError, match="against a reference"):
        cmtool.evaluate(images[:, :, :4, :4], "digits")


def test_saving_tells_the_form_from_the_name(model, tmp_path):
    images = model.sample(2)
    assert Image.open(cmtool.save(images, tmp_path / "grid.png")).width > 100
    assert Image.open(cmtool.save(images[:1], tmp_path / "one.png")).size == (8, 8)
    assert len(list(cmtool.save(images, tmp_path / "folder").glob("*.png"))) == 2
    with pytest.raises(DataError, match=re.escape(".png, .npz or into a folder")):
        cmtool.save(images, tmp_path / "a.tiff")


@pytest.mark.slow
def test_a_program_that_uses_the_package_type_checks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import cmtool\n"
        "model = cmtool.load('demo/digits')\n"
        "reveal_type(model.sample(4))\n"
        "reveal_type(cmtool.edit.inpaint(model, 'a.png', 'm.png'))\n"
        "reveal_type(cmtool.evaluate(model, 'digits'))\n"
        "model.sample('four')\n"
    )
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", str(program)],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    said = done.stdout
    assert "Tensor" in said and "ndarray" in said and "dict[str, float]" in said.replace("builtins.", "")
    assert said.count("error:") == 1 and 'incompatible type "str"' in said
