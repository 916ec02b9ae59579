"""As typed: a preset whose pictures are replaced, and models whose classes are numbered in another order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool import models
from cmtool.checkpoint import load_tensors, read_header, save_model
from cmtool.config.schema import DataConfig
from cmtool.data import load, load_dataset
from cmtool.data.sources.sniff import open_source
from tests.training.tiny import same

TINY = ("--set", "network.channels=8", "--set", "network.head_channels=8", "--batch-size", "8", "--steps", "4")
SHAPES = ("--preset", "shapes", *TINY, "--set", "network.group_channels=1")


def write_pictures(folder, count=24, labels=False, skip=(), rename=None):
    """Write pictures of the shapes data into `folder`, one folder a class if asked."""
    data = load_dataset(DataConfig(source="shapes", resolution=16, channels=3, labels=True, size=count))
    for index, image in enumerate(data.images):
        name = data.class_names[int(data.labels[index])]
        if name in skip:
            continue
        place = Path(folder) / ((rename or {}).get(name, name) if labels else ".")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(place / f"{index:04d}.png")


@pytest.fixture(scope="module")
def shapes_models(tmp_path_factory):
    """A teacher and a consistency model of the shapes, with the preset's order of classes, both with random weights."""
    from cmtool.config.load import resolve
    from cmtool.training.setup import fresh_student

    folder = tmp_path_factory.mktemp("models")
    sets = ("network.channels=8", "network.head_channels=8", "network.group_channels=1", "data.size=64")
    for recipe, name in (("edm", "teacher"), ("ict", "student")):
        config = resolve("shapes", recipe=recipe, sets=sets).config
        model = fresh_student(config, load_dataset(config.data))
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
        save_model(folder / f"{name}.safetensors", model.network.state_dict(), model.header)
    return folder


def renamed(path, target, names):
    """Copy a model with other names for its classes."""
    tensors, header = load_tensors(path)
    save_model(target, tensors, header | {"data": header["data"] | {"class_names": names}})
    return target


# --- other pictures ---


@pytest.fixture
def of_faces(cmtool):
    """A finished run of preset shapes on other pictures, and what was said."""
    write_pictures("faces")
    typed = cmtool("train-ct", *SHAPES, "--set", "data.labels=false", "--data", "faces", "--name", "f")
    assert typed.code == 0, typed.err
    return typed


def test_pictures_without_classes_train_a_preset_that_has_some(cmtool, monkeypatch):
    write_pictures("faces")
    write_pictures("classes", labels=True)
    listed = []
    monkeypatch.setattr(load, "open_source", lambda *given: listed.append(given) or open_source(*given))
    typed = cmtool("train-ct", *SHAPES, "--data", "faces", "--name", "plain")
    assert typed.code == 0 and typed.err.count("faces has no classes, so the model learns none") == 1
    assert len(listed) == 1  # millions of files take minutes
    assert read_header("runs/plain/model.safetensors")["data"]["num_classes"] is None
    assert "finished" in cmtool("train-ct", *SHAPES, "--data", "faces", "--name", "plain").err
    typed = cmtool("train-ct", *SHAPES, "--data", "classes", "--name", "classes", "--dry-run")
    assert typed.code == 0 and "no classes" not in typed.err and "labels = true" in typed.out
    typed = cmtool("train-ct", *SHAPES, "--data", "faces", "--name", "asked", "--set", "data.labels=true")
    assert typed.code == 1 and "has no class labels" in typed.err


def test_a_run_on_other_pictures_carries_no_judgment(of_faces, cmtool):
    assert of_faces.err.count("no sampling times are searched") == 1
    assert "searching sampling times" not in of_faces.err
    header = read_header("runs/f/model.safetensors")
    assert header["times"] == {} and "figures" not in header
    assert header["data"]["source"] == "folder of images" and header["data"]["path"] == "faces"
    assert header["recipe"]["expected"] is None and header["edit"]["colorize"]["class_last"] is None
    before = sorted(Path().rglob("*"))
    judged = cmtool("eval", "--model", "runs/f", "--num", 20)
    assert judged.code == 2 and "--ref" in judged.err and "faces" in judged.err and not judged.out
    searched = cmtool("search-times", "--model", "runs/f", "--num", 20)
    assert searched.code == 2 and "--ref" in searched.err
    assert sorted(Path().rglob("*")) == before
    told = json.loads(cmtool("info", "runs/f", "--json").out)
    assert told["data"]["source"] == "folder of images" and told["data"]["path"] == "faces"
    assert "shapes" not in cmtool("report", "runs/f").err
    page = Path("runs/f/report.html")
    assert not page.is_file() or "a shape on a two-color ground" not in page.read_text()


def test_the_run_goes_on_and_is_extended_without_them(of_faces, cmtool):
    again = cmtool("train-ct", *SHAPES, "--set", "data.labels=false", "--data", "faces", "--name", "f")
    assert again.code == 0 and "is finished" in again.err
    longer = cmtool("train-ct", "--extend", "runs/f", "--steps", 6, "--name", "g")
    assert longer.code == 0, longer.err
    assert "no sampling times are searched" in longer.err
    header = read_header("runs/g/model.safetensors")
    assert header["times"] == {} and header["eval"]["reference"] is None and header["data"]["path"] == "faces"


def test_the_teacher_of_other_pictures_is_not_taken_unasked(cmtool):
    write_pictures("faces")
    unlabeled = ("--set", "data.labels=false")
    edm = cmtool("train-edm", *SHAPES, *unlabeled, "--data", "faces", "--name", "t")
    assert edm.code == 0 and "no sampling times" not in edm.err
    assert "train-cd --preset shapes --data faces --set data.labels=false --teacher runs/t\n" in edm.err
    wrong = cmtool("train-cd", *SHAPES, *unlabeled, "--dry-run")
    assert wrong.code == 1 and "needs a teacher" in wrong.err
    right = cmtool("train-cd", *SHAPES, *unlabeled, "--data", "faces", "--dry-run")
    assert right.code == 0 and "runs/t/model.safetensors" in right.out
    named = cmtool("train-cd", *SHAPES, *unlabeled, "--set", "data.size=16", "--teacher", "runs/t", "--set",
                   "eval.reference=")  # fmt: skip
    assert named.code == 0, named.err
    assert "was trained on other pictures (faces) than the student sees (shapes)" in named.err
    same_ones = cmtool("train-cd", *SHAPES, *unlabeled, "--data", "faces", "--teacher", "runs/t", "--name", "s")
    assert same_ones.code == 0 and "other pictures (" not in same_ones.err


def test_a_reference_named_by_hand_is_used(cmtool):
    write_pictures("faces", 40)
    typed = cmtool("train-ct", *SHAPES, "--set", "data.labels=false", "--data", "faces", "--set",
                   "eval.reference=shapes", "--set", "eval.count=20", "--set", "train.eval_every=4", "--dry-run")  # fmt: skip
    assert typed.code == 0 and 'reference = "shapes"' in typed.out and "the reference is shapes" in typed.err


def test_models_of_different_references_are_not_judged_by_the_first(cmtool, of_faces, shapes_models):
    shutil.copy(shapes_models / "student.safetensors", "own.safetensors")
    typed = cmtool("eval", "own.safetensors", "runs/f", "--num", 20)
    assert typed.code == 2 and "differ" in typed.err and "shapes" in typed.err


# --- classes by name ---


def test_a_student_numbers_its_classes_as_the_model_it_starts_from(cmtool, shapes_models):
    write_pictures("mine", 40, labels=True)
    student = shapes_models / "student.safetensors"
    words = (*SHAPES, "--recipe", "ict", "--data", "mine", "--init", student, "--set", "train.lr=1e-9")
    typed = cmtool("train-ct", *words, "--name", "m")
    assert typed.code == 0, typed.err
    assert "matched by name" in typed.err and "plus" in typed.err
    header = read_header("runs/m/model.safetensors")
    assert header["data"]["class_names"] == read_header(student)["data"]["class_names"]
    # The rows of the label embedding are where the names say: at a rate of nearly 0 they are the model's.
    assert same(
        {"rows": models.load("runs/m").network.label_emb.weight.round(decimals=5)},
        {"rows": models.load(student).network.label_emb.weight.round(decimals=5)},
    )


def test_every_image_goes_with_the_name_of_its_folder(cmtool, shapes_models):
    from cmtool.config.load import from_toml
    from cmtool.talk import SILENCE
    from cmtool.training.classes import settle_classes

    write_pictures("mine", 40, labels=True)
    student = shapes_models / "student.safetensors"
    words = (*SHAPES, "--recipe", "ict", "--data", "mine", "--init", student)
    Path("config.toml").write_text(cmtool("train-ct", *words, "--dry-run").out)
    config = from_toml("config.toml")
    read = load_dataset(config.data)
    settled = settle_classes(config, read, None, SILENCE)
    assert read.class_names != settled.class_names
    names = [[data.class_names[int(label)] for label in data.labels] for data in (read, settled)]
    assert names[0] == names[1] and torch.equal(read.images, settled.images)


@pytest.mark.parametrize("role", ["init", "teacher"])
def test_other_names_are_refused(cmtool, shapes_models, role):
    write_pictures("mine", 40, labels=True, rename={"plus": "cross"})
    file = shapes_models / ("student.safetensors" if role == "init" else "teacher.safetensors")
    command = ("train-ct", "--recipe", "ict") if role == "init" else ("train-cd",)
    typed = cmtool(*command, *SHAPES, "--data", "mine", f"--{role}", file, "--name", "m")
    assert typed.code == 1 and "cross" in typed.err and "plus" in typed.err
    assert not Path("runs").exists()


def test_a_teacher_is_asked_for_the_class_of_the_name(cmtool, shapes_models):
    names = ["triangle", "plus", "circle", "square"]
    renamed(shapes_models / "teacher.safetensors", "other.safetensors", names)
    typed = cmtool("train-cd", *SHAPES, "--set", "data.size=64", "--set", "eval.reference=", "--teacher",
                   "other.safetensors")  # fmt: skip
    assert typed.code == 0, typed.err
    assert "matched by name" in typed.err
    assert read_header("runs/shapes-icd/model.safetensors")["data"]["class_names"] == names


def test_names_on_one_side_alone_are_a_warning(cmtool, shapes_models):
    renamed(shapes_models / "student.safetensors", "nameless.safetensors", None)
    typed = cmtool("train-ct", *SHAPES, "--recipe", "ict", "--set", "data.size=64", "--set", "eval.reference=", "--init",
                   "nameless.safetensors")  # fmt: skip
    assert typed.code == 0 and "has no class names" in typed.err


def test_fewer_classes_are_refused_or_take_their_places(cmtool, shapes_models):
    write_pictures("mine", 40, labels=True, skip=("square",))
    student = shapes_models / "student.safetensors"
    words = ("train-ct", *SHAPES, "--recipe", "ict", "--data", "mine", "--init", student, "--name", "m")
    typed = cmtool(*words)
    assert typed.code == 1 and "3 classes" in typed.err and "--set data.num_classes=4" in typed.err
    right = cmtool(*words, "--set", "data.num_classes=4")
    assert right.code == 0, right.err
    assert read_header("runs/m/model.safetensors")["data"]["class_names"] == ["circle", "square", "triangle", "plus"]


def test_a_run_goes_on_with_the_numbers_it_began_with(cmtool):
    """A folder whose classes sort in another way than when the run began."""
    write_pictures("mine", 40, labels=True)
    words = (
        "train-ct",
        *SHAPES,
        "--recipe",
        "ict",
        "--data",
        "mine",
        "--name",
        "m",
        "--set",
        "train.checkpoint_every=2",
    )
    assert cmtool(*words).code == 0
    names = read_header("runs/m/model.safetensors")["data"]["class_names"]
    assert names == ["circle", "plus", "square", "triangle"]
    Path("runs/m/model.safetensors").unlink()
    shutil.rmtree("runs/m/checkpoints/step-0000004")
    shutil.move("mine/triangle", "mine/Atriangle")
    gone_on = cmtool(*words)
    assert gone_on.code == 1 and "Atriangle" in gone_on.err
    shutil.move("mine/Atriangle", "mine/Triangle")  # sorts first, and is the same name
    gone_on = cmtool(*words)
    assert gone_on.code == 0, gone_on.err
    assert "matched by name" in gone_on.err
    assert read_header("runs/m/model.safetensors")["data"]["class_names"] == names


def test_a_frozen_predictor_must_number_alike(cmtool, shapes_models):
    other = renamed(
        shapes_models / "student.safetensors", "other.safetensors", ["plus", "circle", "square", "triangle"]
    )
    words = ("--recipe", "ict-gc", "--set", "data.size=64", "--set", "recipe.coupling.predictor=frozen")
    typed = cmtool("train-ct", *SHAPES, *words, "--set", f"recipe.coupling.model={other}", "--name", "m")
    assert typed.code == 1 and "numbers its classes plus" in typed.err and not Path("runs").exists()


def test_what_comes_after_a_teacher_can_be_typed_as_it_stands(cmtool):
    """A student sees the picture that its teacher sees, and a weak model that sees another is refused before a folder is made."""
    seen = ("--set", "data.labels=false", "--set", "data.condition=gray")
    edm = cmtool("train-edm", *SHAPES, *seen, "--name", "t")
    assert edm.code == 0
    then = next(line for line in edm.err.splitlines() if line.startswith("then: cmtool "))
    assert cmtool(*then.split()[2:], "--dry-run").code == 0, then
    assert cmtool("train-edm", *SHAPES, *seen[:2], "--name", "plain").code == 0
    weak = ("--set", "recipe.direction.guidance=2", "--set", "recipe.direction.weak=runs/t")
    wrong = cmtool("train-cd", *SHAPES, *seen[:2], "--teacher", "runs/plain", *weak, "--name", "s")
    assert wrong.code == 1 and "cannot be the weak model: it is conditioned on gray" in wrong.err
    assert not Path("runs/s").exists()
